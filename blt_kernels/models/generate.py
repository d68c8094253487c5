"""Generation: a model writes bytes behind its prompts, one at a time or several by a draft.

A round extends all rows by the id chosen last and by a draft of the ids after it, keeps the draft as far as the model
agrees (`Sampling.verify`), and takes the rest back. Every row has random numbers of its own, and drafts and stops by
itself: what it writes does not depend on the rows beside it. Without drafts, a round may be a step of
`blt_kernels.models.captured` instead.
"""

from __future__ import annotations

import codecs
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.ids import ALPHABET, BOS, BYTE_OFFSET, EOS, _to_ids
from blt_kernels.models.blt_state import BLTState
from blt_kernels.models.captured import ByteLMSteps, Steps
from blt_kernels.models.captured_blt import BLTSteps
from blt_kernels.models.captured_megabyte import MegaByteSteps
from blt_kernels.models.drafts import make_draft
from blt_kernels.models.megabyte_state import MegaByteState
from blt_kernels.models.quantized import quantized, weight_error
from blt_kernels.models.sampling import Sampling
from blt_kernels.models.state import ByteLMState, ByteState

STEPS: dict[type[ByteState], type[Steps]] = {
    ByteLMState: ByteLMSteps,
    BLTState: BLTSteps,
    MegaByteState: MegaByteSteps,
}


@dataclass
class Statistics:
    """Counts what a generation has cost.

    Attributes
    ----------
    prompt_bytes, bytes : int
        Ids read, and ids written, of all rows.
    patches : int
        Patches of prompts and of what was written; 0 for a model without any.
    passes : Counter
        How often each part of the model has run after the prompts were read, for all rows at once; "draft" is a model
        that only drafts.
    drafted, accepted : int
        Ids of drafts, and those of them that were written.
    rounds : Counter
        How often a draft of so many ids had so many accepted: by ``(drafted, accepted)``.
    prompt_seconds, seconds : float
        Time for the prompts, and for the rest, without what a reader of the stream takes.
    weight_error : float
        The root mean square of what rounding changed in `quantized` matrices, as a share of that of their weights.
    """

    prompt_bytes: int = 0
    bytes: int = 0
    patches: int = 0
    passes: Counter[str] = field(default_factory=Counter)
    drafted: int = 0
    accepted: int = 0
    rounds: Counter[tuple[int, int]] = field(default_factory=Counter)
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    weight_error: float = 0.0


@dataclass(frozen=True)
class Generated:
    """Holds what a model has written.

    Attributes
    ----------
    ids : list of list of int
        The new ids of each row. The EOS or the stop string that ended it are part of it.
    reasons : list of str
        Why each row ended: "length", "eos" or "stop".
    statistics : Statistics
    """

    ids: list[list[int]]
    reasons: list[str]
    statistics: Statistics

    @property
    def bytes(self) -> list[bytes]:
        """The new bytes of each row, without special ids."""
        return [_bytes(ids) for ids in self.ids]

    @property
    def text(self) -> list[str]:
        """The new text of each row; U+FFFD where bytes are no UTF-8."""
        return [data.decode(errors="replace") for data in self.bytes]


class Generation:
    """An iterator over the rounds of a generation: it yields the new ids of each row, a list for every round.

    Parameters are those of `ByteModel.generate`. `result` is complete when the iterator has ended.
    """

    def __init__(
        self,
        model: Any,
        prompts: Any,
        *,
        max_new_bytes: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: Sequence[bytes | str] = (),
        draft: Any = None,
        draft_bytes: int = 8,
        weights: str | None = None,
        captured: bool | None = None,
    ) -> None:
        _checks.check_int("max_new_bytes", max_new_bytes, 0)
        _checks.check_int("draft_bytes", draft_bytes, 1)
        if draft_bytes > _checks.INT32_MAX:
            raise ValueError(f"draft_bytes: expected at most 2**31 - 1, got {draft_bytes}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed: expected an int, got {seed!r}")
        self.model = model = model if weights is None else quantized(model, weights)
        self.max_new_bytes = max_new_bytes
        self.sampling = Sampling(temperature, top_k, top_p, min_p)
        self.prompts = prompt_ids(prompts, model.config)
        self.stop = _stop_ids(stop)
        self.eos_id = getattr(model.config, "eos_id", EOS)
        count = len(self.prompts)
        self.random = [Random(f"{seed}, {row}") for row in range(count)]
        self.undo = draft_bytes + 64
        self.draft = make_draft(draft, model, self.sampling, draft_bytes, count, self.undo)
        self.captured = _captures(captured, draft, model.lm_head.weight.device)
        self.statistics = Statistics(prompt_bytes=sum(map(len, self.prompts)), weight_error=weight_error(model))
        self.result = Generated([[] for _ in range(count)], ["length"] * count, self.statistics)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[list[int]]]:
        statistics, rows = self.statistics, list(range(len(self.prompts)))
        if not rows or not self.max_new_bytes:
            return
        if self.captured:
            yield from self._captured_rounds()
            return
        state, new = self._read_prompts()
        while True:
            # The last id of every row is not in the state yet.
            of_row = dict(zip(rows, new, strict=True))
            yield [of_row.get(row, []) for row in range(len(self.prompts))]
            begin = time.perf_counter()
            going = [i for i, row in enumerate(rows) if self.goes_on(row)]
            if len(going) < len(rows):
                statistics.patches += sum(n for i, n in enumerate(state.num_patches) if i not in going)
                if not going:
                    return
                state.select(going)
                self.draft.select(going)
                rows = [rows[i] for i in going]
            new = self._round(state, rows)
            statistics.seconds += time.perf_counter() - begin

    def _captured_rounds(self) -> Iterator[list[list[int]]]:
        statistics, rows = self.statistics, range(len(self.prompts))
        state, new = self._read_prompts()
        steps, num_patches = None, state.num_patches
        while True:
            yield new
            begin = time.perf_counter()
            going = [self.goes_on(row) for row in rows]
            if not any(going):
                statistics.patches += sum(num_patches if steps is None else steps.num_patches)
                return
            if steps is None:
                steps = STEPS[type(state)](state, self.sampling)
                steps.start([self.result.ids[row][-1] for row in rows])
                del state  # its memory is not needed any more
            drawn = not self.sampling.greedy
            numbers = [self.random[row].random() if drawn and going[row] else 0.0 for row in rows]
            ids = steps.step(going, numbers)
            new = [self._keep(row, [ids[row]]) if going[row] else [] for row in rows]
            statistics.passes = steps.passes
            statistics.seconds += time.perf_counter() - begin

    def _read_prompts(self) -> tuple[ByteState, list[list[int]]]:
        """Return the state that has read the prompts, and the first id of each row."""
        begin = time.perf_counter()
        state = self.model.new_state(len(self.prompts), undo=0 if self.captured else self.undo)
        logits = state.read(self.prompts)
        self.draft.start(self.prompts)
        state.passes.clear()
        first = self.sampling.draw(self.sampling.probabilities(logits), self.random)
        new = [self._keep(row, [x]) for row, x in enumerate(first)]
        self.statistics.prompt_seconds = time.perf_counter() - begin
        return state, new

    def _round(self, state: ByteState, rows: list[int]) -> list[list[int]]:
        """Extend the rows of the state by the ids chosen last and by drafts; return the ids that they write."""
        statistics, sampling, random = self.statistics, self.sampling, [self.random[row] for row in rows]
        last = [self.result.ids[row][-1] for row in rows]
        room = [self.max_new_bytes - len(self.result.ids[row]) - 1 for row in rows]
        drafts = self.draft.propose(state, last, room, random)
        lengths, counts = state.lengths, [1 + len(draft.ids) for draft in drafts]
        ids = [x for first, draft in zip(last, drafts, strict=True) for x in (first, *draft.ids)]
        p = sampling.probabilities(state.extend(torch.tensor(ids, device=state.device), counts))
        statistics.passes = state.passes + self.draft.passes
        if len(ids) == len(rows):
            return [self._keep(row, [x]) for row, x in zip(rows, sampling.draw(p, random), strict=True)]
        new, kept = [], []
        for row, own, draft, numbers in zip(rows, p.split(counts), drafts, random, strict=True):
            accepted, following = sampling.verify(own, draft.ids, draft.probabilities, numbers)
            new.append(self._keep(row, [*draft.ids[:accepted], following]))
            kept.append(min(accepted, len(new[-1])))
            if draft.ids:
                statistics.rounds[len(draft.ids), kept[-1]] += 1
        statistics.drafted += len(ids) - len(rows)
        statistics.accepted += sum(kept)
        lengths = [before + len(written) for before, written in zip(lengths, new, strict=True)]
        state.truncate(lengths)
        self.draft.accept(drafts, kept, lengths)
        return new

    def _keep(self, row: int, ids: list[int]) -> list[int]:
        """Append chosen ids to what a row has written, up to where it ends; return those."""
        written = self.result.ids[row]
        for i, x in enumerate(ids):
            written.append(x)
            if x == self.eos_id:
                self.result.reasons[row] = "eos"
            elif any(written[-len(stop) :] == stop for stop in self.stop):
                self.result.reasons[row] = "stop"
            if not self.goes_on(row):
                ids = ids[: i + 1]
                break
        self.statistics.bytes += len(ids)
        return ids

    def goes_on(self, row: int) -> bool:
        """Return whether a row has not ended yet."""
        return self.result.reasons[row] == "length" and len(self.result.ids[row]) < self.max_new_bytes


class Stream(Iterator[Any]):
    """The bytes of the only row of a generation as they come; as str of whole characters, if `text`.

    Attributes
    ----------
    result : Generated
        What was written so far. It is complete, with its statistics, when the iterator has ended.
    """

    def __init__(self, generation: Generation, text: bool) -> None:
        self.result = generation.result
        self._pieces = _pieces(generation, text)

    def __next__(self) -> Any:
        return next(self._pieces)


def _pieces(generation: Generation, text: bool) -> Iterator[Any]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for (ids,) in generation:
        data: Any = _bytes(ids)
        data = decoder.decode(data) if text else data
        if data:
            yield data
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def prompt_ids(prompts: Any, config: Any) -> list[list[int]]:
    """Return the ids of every prompt: text with BOS in front, ids as they are; BOS alone where there is nothing.

    Raises
    ------
    TypeError, ValueError
        A prompt is neither text nor ids, or an id is outside of the alphabet.
    """
    prompts = _array_as_tensor("prompts", prompts)
    if isinstance(prompts, Tensor) and prompts.dim() == 2:
        prompts = list(prompts)
    elif not isinstance(prompts, (list, tuple)) or (prompts and all(isinstance(x, int) for x in prompts)):
        prompts = [prompts]
    names = [f"prompts[{i}]" for i in range(len(prompts))]
    return [_ids_of_prompt(n, _array_as_tensor(n, x), config) for n, x in zip(names, prompts, strict=True)]


def _array_as_tensor(name: str, x: Any) -> Any:
    if not hasattr(x, "__array__") or isinstance(x, Tensor):
        return x
    try:
        return torch.as_tensor(x, device="cpu")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of integers, got {type(x).__name__}: {error}") from None


def _ids_of_prompt(name: str, prompt: Any, config: Any) -> list[int]:
    if isinstance(prompt, Tensor):
        _checks.check_tensor(name, prompt, 1, (torch.uint8, *_checks.INTS))
    if isinstance(prompt, (list, tuple)) and all(isinstance(x, int) and not isinstance(x, bool) for x in prompt):
        ids = list(prompt)
    elif isinstance(prompt, Tensor) and prompt.dtype != torch.uint8:
        ids = prompt.tolist()
    elif isinstance(prompt, (str, bytes, bytearray, memoryview, Tensor)):
        if getattr(config, "patching", None) == "bpe":
            raise ValueError(f"{name}: expected ids of `to_ids(..., tokenizer=...)`, since patching is 'bpe', got text")
        ids = _ids_of_text(name, prompt, bos=True)
    else:
        raise TypeError(f"{name}: expected str, bytes or ids, got {type(prompt).__name__}")
    ids = ids or [BOS]
    wrong = [x for x in ids if not 0 <= x < config.vocab_size]
    if wrong:
        raise ValueError(f"{name}: expected ids from 0 to {config.vocab_size - 1}, got {wrong[0]}")
    return ids


def _ids_of_text(name: str, text: Any, bos: bool) -> list[int]:
    ids = _to_ids(name, text, bos, False, torch.int64, None)
    assert isinstance(ids, Tensor)
    return ids.tolist()


def _captures(captured: bool | None, draft: Any, device: torch.device) -> bool:
    """Return whether ids are written in fixed shapes."""
    if captured is not None and not isinstance(captured, bool):
        raise TypeError(f"captured: expected a bool or None, got {captured!r}")
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if captured and draft is not None:
        raise ValueError(f"captured: expected False or None, since draft is {draft!r}, got {captured!r}")
    if captured and autocast:
        raise ValueError(f"captured: expected False or None under autocast, got {captured!r}")
    if captured is not None:
        return captured
    return device.type == "cuda" and draft is None and not autocast and not torch.are_deterministic_algorithms_enabled()


def _stop_ids(stop: Sequence[bytes | str]) -> list[list[int]]:
    if isinstance(stop, (str, bytes)):
        stop = (stop,)
    if not isinstance(stop, (list, tuple)):
        raise TypeError(f"stop: expected a sequence of bytes or str, got {type(stop).__name__}")
    ids = []
    for i, x in enumerate(stop):
        if not isinstance(x, (str, bytes)):
            raise TypeError(f"stop[{i}]: expected bytes or str, got {type(x).__name__}")
        if not x:
            raise ValueError(f"stop[{i}]: expected at least one byte, got {x!r}")
        ids.append(_ids_of_text(f"stop[{i}]", x, bos=False))
    return ids


def _bytes(ids: Sequence[int]) -> bytes:
    """Return the bytes of ids; an alphabet may have special ids on both sides of theirs."""
    return bytes(x - BYTE_OFFSET for x in ids if BYTE_OFFSET <= x < ALPHABET)
