"""Decoding in fixed shapes: the ids, logits and patches of the ordinary path, and nothing that a CUDA graph forbids."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from capture_rules import DEVICE, forbidden
from model_cases import build
from op_calls import tensors_of
from state_cases import CASES, FEW, TOLERANCE, model_of, packed, patch_starts, rows_of_text, text
from tiers import slow_unless
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blt_kernels._checks import Documents
from blt_kernels.ids import EOS
from blt_kernels.models import BLT
from blt_kernels.models.base import ByteModel
from blt_kernels.models.captured import FixedByteLM, FixedStarts, Step, Steps
from blt_kernels.models.generate import STEPS, Generated
from blt_kernels.models.sampling import Sampling
from blt_kernels.nn.fixed_cache import FixedKeys

NEW_IDS = 40


class Dictation(Sampling):
    """Chooses the ids that it is given as numbers."""

    def distribution(self, logits: Tensor) -> Tensor:
        return logits

    def pick(self, probabilities: Tensor, numbers: Tensor) -> Tensor:
        return numbers.long()


def dictated() -> tuple[list[Tensor], list[int]]:
    """Return texts, and how many ids of each are the prompt: it ends with an EOS, or 1 to 3 ids after one."""
    whole = torch.cat([row[-45:] for row in rows_of_text()])
    ends, lengths = (whole == EOS).nonzero()[:, 0].tolist(), [1, 2, 9, 23, 60]
    after = [0, 1, 2, 3, 0]
    begin = [end + more + 1 - n for end, more, n in zip(ends, after, lengths, strict=False)]
    return [whole.roll(-b)[: n + NEW_IDS] for b, n in zip(begin, lengths, strict=True)], lengths


@torch.no_grad()
def steps_behind(model: ByteModel, prompts: Sequence[Tensor], sampling: Sampling) -> Steps:
    """Return what decodes behind these prompts."""
    state = model.new_state(len(prompts), undo=0)
    state.extend(torch.cat(list(prompts)), [len(prompt) for prompt in prompts])
    return STEPS[type(state)](state, sampling)


def dictate(steps: Steps, rows: Sequence[Tensor], lengths: Sequence[int], ended: dict[int, int]) -> Iterator[int]:
    """Append the ids of texts step by step, and yield how many were. Row r ends behind ``ended[r]`` ids."""
    steps.start([int(row[n]) for row, n in zip(rows, lengths, strict=True)])
    for count in range(1, NEW_IDS):
        going = [count < ended.get(r, NEW_IDS) for r in range(len(rows))]
        ids = [int(row[n + count]) for row, n in zip(rows, lengths, strict=True)]
        assert steps.step(going, ids) == ids
        yield count


# --- as the ordinary path ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", slow_unless(CASES, FEW))
def test_steps_give_one_forward(case: str) -> None:
    """Rows of different lengths, two of which end before the others."""
    check_one_forward(case)


@torch.no_grad()
def check_one_forward(case: str, made: Callable[[Steps], object] = id) -> Steps:
    """Compare every step with one forward; `made` is given the steps before."""
    model = model_of(case)
    rows, lengths = dictated()
    ended = {1: 5, 4: 11}
    steps = steps_behind(model, [row[:n] for row, n in zip(rows, lengths, strict=True)], Dictation(1.0))
    made(steps)
    logits = model(*packed(rows)).split([len(row) for row in rows])
    for count in dictate(steps, rows, lengths, ended):
        for r, n in enumerate(lengths):
            if count < ended.get(r, NEW_IDS):
                torch.testing.assert_close(steps.logits[r], logits[r][n + count - 1], rtol=0, atol=TOLERANCE)
    read = [row[: n + ended.get(r, NEW_IDS) - 1] for r, (row, n) in enumerate(zip(rows, lengths, strict=True))]
    state = model.new_state(len(rows))
    model.extend(*packed(read), state=state)
    assert steps.num_patches == state.num_patches
    if isinstance(model, BLT):
        assert steps.patch_starts == patch_starts(model, read)
    return steps


@pytest.mark.parametrize("case", ["byte_lm: no window", "blt: entropy, whole_characters", "megabyte_extended"])
@torch.no_grad()
def test_reference_ops_agree(case: str) -> None:
    rows, lengths = dictated()
    prompts = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    fused, reference = (steps_behind(model_of(case, ops), prompts, Dictation(1.0)) for ops in ("fused", "reference"))
    for _ in zip(*(dictate(steps, rows, lengths, {}) for steps in (fused, reference)), strict=True):
        torch.testing.assert_close(fused.logits, reference.logits, rtol=0, atol=TOLERANCE)


PROMPTS = ["hello wörld", b"", torch.tensor([1, 50, 60, 70]), "abcabcabcabcab" * 5]
MODELS = ("byte_lm", "blt", "blt_space", "megabyte_extended")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.3},
    "all": {"temperature": 0.9, "top_k": 100, "top_p": 0.95, "min_p": 1e-3},
}


def both(model: ByteModel, prompts: Any, **options: Any) -> tuple[Generated, Generated]:
    """Return what the ordinary path writes, and what is written in fixed shapes."""
    plain, fixed = (model.generate(prompts, captured=captured, **options) for captured in (False, True))
    assert (fixed.ids, fixed.reasons) == (plain.ids, plain.reasons)
    assert fixed.statistics.patches == plain.statistics.patches
    rounds = max(map(len, plain.ids)) - 1
    for part, n in plain.statistics.passes.items():  # the last ids are read by patcher and encoder, too
        assert fixed.statistics.passes[part] == n + (part in ("patcher", "encoder")), (part, rounds)
    return plain, fixed


@pytest.mark.parametrize("sampling", slow_unless(SAMPLINGS, ["all"]))
@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, sampling: str) -> None:
    both(build(name), PROMPTS, max_new_bytes=24, seed=3, **SAMPLINGS[sampling])


@pytest.mark.parametrize("name", slow_unless(MODELS, ["blt"]))
def test_rows_end_by_themselves(name: str) -> None:
    """Rows end at stop strings and EOS in turn, and one of them with its first id."""
    model = build(name)
    plain = model.generate([b""] * 12, max_new_bytes=30, temperature=2.0)
    written = [bytes(x - 4 for x in ids if 4 <= x < 260) for ids in plain.ids]
    stop = [data[at : at + 1] for data, at in zip(written, (0, 3, 7), strict=False)]
    plain, _ = both(model, [b""] * 12, max_new_bytes=30, temperature=2.0, stop=stop)
    assert len({len(ids) for ids in plain.ids}) > 3
    assert min(map(len, plain.ids)) == 1
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.mean(0) * 3
    both(model, PROMPTS, max_new_bytes=60, temperature=1.0)


@pytest.mark.parametrize("name", slow_unless(MODELS, ["blt_space"]))
def test_a_text_far_longer_than_the_windows(name: str) -> None:
    both(build(name), "x" * 100, max_new_bytes=150, temperature=1.0)


def test_a_patch_far_longer_than_all_before() -> None:
    """The step of patches takes more bytes a row then."""
    model = build("blt_static", patch_size=70)
    _, fixed = both(model, ["a", "b" * 30], max_new_bytes=80)
    assert fixed.statistics.passes["global"] == 2


@pytest.mark.parametrize("new", [0, 1, 2])
@pytest.mark.parametrize("name", slow_unless(MODELS, ["blt"]))
def test_few_bytes(name: str, new: int) -> None:
    out = build(name).generate(PROMPTS, max_new_bytes=new, captured=True)
    assert out.ids == build(name).generate(PROMPTS, max_new_bytes=new).ids
    assert build(name).generate([], max_new_bytes=new, captured=True).ids == []


@pytest.mark.parametrize("name", slow_unless(MODELS, ["blt"]))
def test_quantized_weights(name: str) -> None:
    both(build(name), PROMPTS, max_new_bytes=8, weights="int8")


@pytest.mark.parametrize("name", slow_unless(MODELS, ["blt"]))
def test_half_precision_streams_and_inference_mode(name: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    pieces = model.stream("a text", max_new_bytes=12, captured=True, temperature=1e-9)
    first = next(pieces)
    with torch.inference_mode():
        whole = model.generate("a text", max_new_bytes=12, captured=True, temperature=1e-9)
        rest = b"".join(itertools.islice(pieces, 4))
    assert first + rest + b"".join(pieces) == whole.bytes[0]


def test_wrong_arguments_are_named() -> None:
    model = build("byte_lm")
    with pytest.raises(TypeError, match="captured: expected a bool or None, got 1"):
        model.generate("a", max_new_bytes=1, captured=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="captured: expected False or None, since draft is 'prompt', got True"):
        model.generate("a", max_new_bytes=1, captured=True, draft="prompt")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="captured: expected False or None under autocast, got True"),
    ):
        model.generate("a", max_new_bytes=1, captured=True)


@torch.no_grad()
def test_a_logit_that_is_no_number() -> None:
    """It is an error, unless its row has ended."""
    model = build("byte_lm")
    model.embed_tokens.weight[9] = float("nan")  # a step reads it, and no prompt
    steps = steps_behind(model, [text("a"), text("b")], Dictation(1.0))
    steps.start([9, 50])
    assert steps.step([False, True], [60, 61])[1] == 61
    steps = steps_behind(model, [text("a"), text("b")], Sampling())
    steps.start([9, 50])
    with pytest.raises(ValueError, match="logits: expected numbers, got nan; the model has overflown"):
        steps.step([True, True], [0.0, 0.0])


# --- as a capture needs it --------------------------------------------------------------------------------------------

CAPTURED = (
    "byte_lm: documents and newlines",
    "byte_lm: no window",
    "blt: entropy, whole_characters and max_patch_length",
    "blt: threshold_add",
    "blt: monotonic, max_patch_length",
    "blt: space, whole_characters",
    "blt: static",
    "blt: bpe",
    "blt_cross_windows: documents",
    "blt: pooled at every layer",
    "megabyte_extended",
    "megabyte: patches of one",
)


def replace_tensors(thing: Any, change: Callable[[Any], Any]) -> Any:
    """Replace tensors and models by what `change` returns for them, in place where an object holds them."""
    if isinstance(thing, (Tensor, nn.Module)):
        return change(thing)
    if isinstance(thing, Documents):
        return thing._replace(offsets=change(thing.offsets))
    if isinstance(thing, list):
        return [replace_tensors(x, change) for x in thing]
    if isinstance(thing, (Steps, FixedByteLM, FixedKeys, FixedStarts)):
        for name, value in vars(thing).items():
            setattr(thing, name, replace_tensors(value, change))
    return thing


def on_device(steps: Steps) -> Steps:
    """Move steps to the device of `forbidden`."""
    replace_tensors(steps, lambda x: copy.deepcopy(x).to(DEVICE))
    steps.device = torch.device(DEVICE)
    return steps


@pytest.mark.parametrize("sampling", slow_unless(SAMPLINGS, ["greedy"]))
@pytest.mark.parametrize("case", CAPTURED)
@torch.no_grad()
def test_a_step_waits_for_the_device_once(case: str, sampling: str) -> None:
    steps = steps_behind(model_of(case), [text("a text"), text("b")], Sampling(**SAMPLINGS[sampling]))
    steps.start([70, 71])
    on_device(steps)
    assert not forbidden(steps._write_and_read)
    if steps.num_patches != [0, 0]:
        assert not forbidden(lambda: steps._close([True, True]))
    if sampling == "greedy":
        assert len(forbidden(lambda: steps.step([True, True], [0.0, 0.0]))) == 1


class Calls(TorchDispatchMode):
    """Notes the calls of a step: functions, and shapes, strides and dtypes of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        shapes = [(x.shape, x.stride(), x.dtype) for x in tensors_of((args, kwargs or {}))]
        self.found.append((func, shapes))
        return func(*args, **(kwargs or {}))


def addresses(steps: Steps) -> list[int]:
    """Return where the tensors of steps are."""
    found: list[int] = []

    def note(x: Any) -> Any:
        found.extend([x.data_ptr()] if isinstance(x, Tensor) else [])
        return x

    replace_tensors(steps, note)
    return found


@pytest.mark.parametrize("case", slow_unless(CAPTURED, FEW))
@torch.no_grad()
def test_every_step_is_the_same_calls_on_the_same_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows read: documents that end, patches that close, rows that have ended."""
    calls: dict[int, list[Any]] = {}

    def run(step: Step) -> None:
        with Calls() as mode:
            step.function()
        assert mode.found == calls.setdefault(id(step), mode.found)
        counts[id(step)] = counts.get(id(step), 0) + 1

    counts: dict[int, int] = {}
    monkeypatch.setattr(Step, "__call__", run)
    model = model_of(case)
    rows, lengths = dictated()
    steps = steps_behind(model, [row[:n] for row, n in zip(rows, lengths, strict=True)], Dictation(1.0))
    before = addresses(steps)
    for _ in dictate(steps, rows, lengths, {0: 20}):
        pass
    assert addresses(steps) == before
    assert len(before) > 10
    assert sum(counts.values()) == NEW_IDS - 1 + steps.passes["global"]
    assert max(counts.values()) == NEW_IDS - 1


class Graph:
    """Stands in for a CUDA graph: a replay calls the function again, and must use the same tensors of the steps."""

    def __init__(self, function: Callable[[], None], steps: Steps) -> None:
        self.function, self.steps, self.used = function, steps, set[int]()

    def replay(self) -> None:
        with Addresses() as mode:
            self.function()
        used = mode.found & set(addresses(self.steps))
        self.used = self.used or used
        assert used == self.used


class Addresses(TorchDispatchMode):
    """Notes where the tensors are that calls are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.found.update(x.data_ptr() for x in tensors_of((args, kwargs or {})))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have room for few entries more than they have, and windows of any size are large."""
    for module in ("blt_kernels.nn.fixed_cache", "blt_kernels.models.captured_blt"):
        monkeypatch.setattr(f"{module}.ROOM", 8)
    monkeypatch.setattr("blt_kernels.nn.fixed_cache.LARGE_WINDOW", 0)


# So many graphs are captured: keys of windows stay where they are, those of all bytes or patches need more room.
GROWING = {
    "byte_lm": 1,
    "byte_lm: no window": 2,
    "blt: byte": 3,
    "blt: global window": 2,
    "blt: no local windows": 3,
    "blt_cross_windows": 2,
    "megabyte_extended": 2,
}


@pytest.mark.parametrize("case", slow_unless(GROWING, ["blt: byte", "blt: no local windows"]))
def test_steps_are_captured_once_and_anew_where_they_need_more_room(
    case: str, little_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Steps] = []
    captured: list[Graph] = []
    init = Step.__init__

    def captures(step: Step, function: Callable[[], None], device: torch.device) -> None:
        init(step, function, device)
        step.captures = True

    def capture(function: Callable[[], None], _stream: Any) -> tuple[Graph, None]:
        captured.append(Graph(function, *made))
        return captured[-1], None

    monkeypatch.setattr(Step, "__init__", captures)
    monkeypatch.setattr("blt_kernels.models.captured.capture", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    check_one_forward(case, made.append)
    assert len(captured) == GROWING[case]


def test_a_window_that_is_longer_than_the_rows_at_first(little_room: None) -> None:
    both(build("byte_lm", window=90), ["a", "bc"], max_new_bytes=200, temperature=1.0)


def test_a_patch_far_longer_than_the_room(little_room: None) -> None:
    """One of the two rows ends before its patch does."""
    model = build("blt_static", patch_size=70)
    plain = model.generate(["a", "b" * 30], max_new_bytes=20)
    both(model, ["a", "b" * 30], max_new_bytes=100, stop=[plain.bytes[0][-2:]])
    both(model, ["a", "b" * 30], max_new_bytes=160, temperature=1.0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_write_what_the_ordinary_path_writes(name: str) -> None:
    model = build(name, dtype=torch.float32).cuda()
    both(model, PROMPTS, max_new_bytes=40)
    both(model, PROMPTS, max_new_bytes=40, temperature=1.0)
