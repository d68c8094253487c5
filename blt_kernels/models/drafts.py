"""Drafts: guesses of the next bytes, which a model checks all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.ids import EOS
from blt_kernels.models.sampling import Sampling
from blt_kernels.models.state import ByteState

_NGRAMS = (12, 6, 4)  # bytes that must have stood before, the most telling first


@dataclass
class Draft:
    """The draft of a row: ids, and the distributions ``[k, A]`` that they were drawn from, if they were drawn."""

    ids: list[int]
    probabilities: Tensor | None = None


class Drafts:
    """No drafts, and what drafts of all kinds have in common.

    Attributes
    ----------
    passes : Counter
        How often a model that only drafts has run, as "draft".
    """

    def __init__(self) -> None:
        self.passes: Counter[str] = Counter()

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts."""

    def propose(
        self, state: ByteState, last: Sequence[int], room: Sequence[int], random: Sequence[Random]
    ) -> list[Draft]:
        """Return a draft of at most ``room[r]`` ids for every row, of what follows the id ``last[r]``.

        That id is not in the state yet.
        """
        return [Draft([]) for _ in last]

    def accept(self, drafts: Sequence[Draft], kept: Sequence[int], lengths: Sequence[int]) -> None:
        """Learn how many ids of each draft were kept. The rows of the state have these lengths now."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows."""


class AdaptiveDrafts(Drafts):
    """Drafts whose lengths follow what was accepted: twice as long after a whole one, else one more than accepted."""

    def __init__(self, rows: int, draft_bytes: int) -> None:
        super().__init__()
        self.most, self.length = draft_bytes, [min(4, draft_bytes)] * rows

    def accept(self, drafts: Sequence[Draft], kept: Sequence[int], lengths: Sequence[int]) -> None:
        for r, (draft, n) in enumerate(zip(drafts, kept, strict=True)):
            drafted = len(draft.ids)
            if drafted:
                self.length[r] = min(self.most, max(self.length[r], 2 * drafted) if n == drafted else n + 1)

    def select(self, rows: Sequence[int]) -> None:
        self.length = [self.length[r] for r in rows]


class PromptDrafts(AdaptiveDrafts):
    """Drafts what followed the last bytes of a row when the row had them before."""

    def __init__(self, rows: int, draft_bytes: int) -> None:
        super().__init__(rows, draft_bytes)
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        # Maps an n-gram of each row to the index of the id after it.
        self.seen: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        for r, prompt in enumerate(prompts):
            self._read(r, prompt)

    def propose(
        self, state: ByteState, last: Sequence[int], room: Sequence[int], random: Sequence[Random]
    ) -> list[Draft]:
        drafts = []
        for r, (x, most) in enumerate(zip(last, room, strict=True)):
            after = self._read(r, [x])
            drafts.append(Draft(self.ids[r][after : after + min(most, self.length[r])] if after is not None else []))
        return drafts

    def accept(self, drafts: Sequence[Draft], kept: Sequence[int], lengths: Sequence[int]) -> None:
        super().accept(drafts, kept, lengths)
        for r, (draft, n) in enumerate(zip(drafts, kept, strict=True)):
            self._read(r, draft.ids[:n])

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self.ids, self.seen = [self.ids[r] for r in rows], [self.seen[r] for r in rows]

    def _read(self, r: int, new: Sequence[int]) -> int | None:
        """Append ids to a row. Return where stands what followed when its last bytes stood in it before."""
        ids, seen, found = self.ids[r], self.seen[r], None
        for x in new:
            ids.append(x)
            places = [seen.get(tuple(ids[-n:])) for n in _NGRAMS if len(ids) >= n]
            found = next((place for place in places if place is not None), None)
            seen.update({tuple(ids[-n:]): len(ids) for n in _NGRAMS if len(ids) >= n})
        return found


class ModelDrafts(AdaptiveDrafts):
    """Drafts what a model writes by itself, id by id.

    Parameters
    ----------
    kind : "decoder", "patcher" or ByteLM
        "decoder" is `ByteState.draft`, "patcher" the entropy model within the state of a BLT, up to where its entropy
        is above the threshold of the BLT. A ByteLM has a state of its own.
    sampling : Sampling
    rows, draft_bytes, undo : int
    eos_id : int
        A draft ends with it.
    """

    def __init__(
        self, kind: Any, sampling: Sampling, rows: int, draft_bytes: int, undo: int, eos_id: int
    ) -> None:  # fmt: skip
        super().__init__(rows, draft_bytes)
        self.kind, self.sampling, self.eos_id = kind, sampling, eos_id
        self.own = None if isinstance(kind, str) else kind.new_state(rows, undo=undo)

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        if self.own is not None:
            self.own.read(prompts)

    def propose(
        self, state: ByteState, last: Sequence[int], room: Sequence[int], random: Sequence[Random]
    ) -> list[Draft]:
        lengths, most = state.lengths, [min(a, b) for a, b in zip(room, self.length, strict=True)]
        written: list[list[int]] = [[] for _ in last]
        drawn_from: list[list[Tensor]] = [[] for _ in last]
        new = self._unread(state, last)
        while True:
            rows = [r for r, n in enumerate(most) if len(written[r]) < n]
            if not rows:
                break
            counts = [len(new[r]) if r in rows else 0 for r in range(len(last))]
            logits = self._step(state, torch.tensor([x for r in rows for x in new[r]], device=state.device), counts)
            p = self.sampling.probabilities(logits[[end - 1 for end in accumulate(counts[r] for r in rows)]])
            certain = self._is_certain(state, rows)
            for row, own, x, going in zip(
                rows, p, self.sampling.draw(p, [random[r] for r in rows]), certain, strict=True
            ):
                if not going:
                    most[row] = 0
                    continue
                written[row].append(x)
                drawn_from[row].append(own)
                new[row] = [x]
                if x == self.eos_id:
                    most[row] = 0
        if self.kind == "decoder":
            state.truncate(lengths)
        return [Draft(ids, torch.stack(p) if p else None) for ids, p in zip(written, drawn_from, strict=True)]

    def accept(self, drafts: Sequence[Draft], kept: Sequence[int], lengths: Sequence[int]) -> None:
        super().accept(drafts, kept, lengths)
        if self.own is not None:
            self.own.truncate([min(a, b) for a, b in zip(self.own.lengths, lengths, strict=True)])

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        if self.own is not None:
            self.own.select(rows)

    def _unread(self, state: ByteState, last: Sequence[int]) -> list[list[int]]:
        """Return the ids of each row that the model that drafts has not read."""
        if self.own is None:
            return [[x] for x in last]
        return [
            [*state.row_ids(r)[n:].tolist(), x] for r, (n, x) in enumerate(zip(self.own.lengths, last, strict=True))
        ]

    def _step(self, state: ByteState, ids: Tensor, counts: Sequence[int]) -> Tensor:
        if self.own is not None:
            self.passes["draft"] += 1
            return self.own.extend(ids.to(self.own.device), counts)
        return state.draft(ids, counts) if self.kind == "decoder" else state.extend_patcher(ids, counts)  # type: ignore[attr-defined]

    def _is_certain(self, state: Any, rows: Sequence[int]) -> list[bool]:
        """Return whether each of these rows goes on with its draft."""
        if self.kind != "patcher":
            return [True] * len(rows)
        (entropy,) = state.entropy.read([n - 1 for n in state.entropy.end], state.entropy.end)
        below = (entropy <= state.model.config.threshold).tolist()
        return [below[r] for r in rows]


def make_draft(draft: Any, model: Any, sampling: Sampling, draft_bytes: int, rows: int, undo: int) -> Drafts:
    """Return the drafts that `ByteModel.generate` is asked for.

    Raises
    ------
    TypeError, ValueError
        There is no such draft, the model has no such part, or the model that drafts has another alphabet.
    """
    if draft is None:
        return Drafts()
    if isinstance(draft, str) and draft == "prompt":
        return PromptDrafts(rows, draft_bytes)
    kinds = ["prompt"]
    if hasattr(model.config, "global_transformer"):
        kinds.append("decoder")
    if getattr(model, "patcher", None) is not None and model.config.patching == "entropy":
        kinds.append("patcher")
    if isinstance(draft, str):
        _checks.check_choice("draft", draft, kinds)
    elif not (hasattr(draft, "new_state") and hasattr(draft, "config")):
        raise TypeError(f"draft: expected None, one of {', '.join(map(repr, kinds))} or a model, got {draft!r}")
    elif draft.config.vocab_size != model.config.vocab_size:
        alphabet = f"a model of {model.config.vocab_size} ids"
        raise ValueError(f"draft: expected {alphabet}, got one of {draft.config.vocab_size}")
    return ModelDrafts(draft, sampling, rows, draft_bytes, undo, getattr(model.config, "eos_id", EOS))
