"""States: any split of rows into calls gives what one forward gives, and what is taken back leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise, repeat
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import SMALL_BLT, build
from state_cases import CASES, FEW, TOLERANCE, Checked, model_of, packed, patch_starts, rows_of_text, text
from tiers import slow, slow_unless
from torch import Tensor

from blt_kernels.ids import EOS
from blt_kernels.models import BLT
from blt_kernels.models.base import ByteModel
from blt_kernels.models.blt_state import BLTState
from blt_kernels.models.state import ByteState
from blt_kernels.nn import TransformerLayer, cache
from blt_kernels.nn.cache import RowBuffer
from blt_kernels.testing import assert_close, real_text

BLTS = [case for case in CASES if case.startswith("blt")]
EVERY_CASE = pytest.mark.parametrize("case", slow_unless(CASES, FEW))


def ragged(
    lengths: Sequence[int], seed: int, choices: Sequence[int] = (0, 0, 1, 1, 2, 3, 7, 30)
) -> Iterator[list[int]]:
    """Yield how many ids each row gets in each call, until all rows have their length."""
    rng, left = random.Random(seed), list(lengths)
    while any(left):
        counts = [min(n, rng.choice(choices)) for n in left]
        left = [n - count for n, count in zip(left, counts, strict=True)]
        yield counts


def read(model: ByteModel, rows: Sequence[Tensor], calls: Iterator[list[int]]) -> tuple[list[Tensor], ByteState]:
    """Return the logits of each row, read by these calls, and the state."""
    state, logits = model.new_state(len(rows), undo=3), [[] for _ in rows]
    for counts in calls:
        begin = state.lengths
        new = [row[b : b + n] for row, b, n in zip(rows, begin, counts, strict=True)]
        for own, part in zip(logits, model.extend(*packed(new), state=state).split(counts), strict=True):
            own.append(part)
    return [torch.cat(own) for own in logits], state


def assert_as_one_forward(model: ByteModel, rows: Sequence[Tensor], logits: Sequence[Tensor], state: Any) -> None:
    """Every row has the logits that it has alone in one forward, and its patches."""
    with torch.no_grad():
        for row, own in zip(rows, logits, strict=True):
            torch.testing.assert_close(own, model(row), rtol=0, atol=TOLERANCE)
    assert state.lengths == [len(row) for row in rows]
    if isinstance(model, BLT):
        assert state.patch_starts == patch_starts(model, rows)


# --- any split --------------------------------------------------------------------------------------------------------


@EVERY_CASE
def test_any_split_gives_one_forward(case: str) -> None:
    model, rows = model_of(case), rows_of_text()
    assert_as_one_forward(model, rows, *read(model, rows, ragged([len(row) for row in rows], 0)))
    assert_as_one_forward(model, rows, *read(model, rows, iter([[len(row) for row in rows]])))


@EVERY_CASE
def test_byte_by_byte(case: str) -> None:
    model, rows = model_of(case), [row[-45:] for row in rows_of_text()]
    calls = ([int(i < len(row)) for row in rows] for i in range(45))
    assert_as_one_forward(model, rows, *read(model, rows, calls))


@pytest.mark.parametrize("case", FEW)
def test_reference_ops_agree(case: str) -> None:
    rows = rows_of_text()
    lengths = [len(row) for row in rows]
    logits, state = read(model_of(case, ops="reference"), rows, ragged(lengths, 5))
    assert_as_one_forward(model_of(case), rows, logits, state)


@pytest.mark.parametrize("case", slow_unless(BLTS, FEW))
def test_the_rows_have_patches_of_many_lengths(case: str) -> None:
    """Otherwise the tests would not see a wrong patch."""
    starts = patch_starts(model_of(case), rows_of_text())
    lengths = Counter(end - start for row in starts for start, end in pairwise(row))
    changes = CASES[case][1]
    expected = {"byte": 1, "static": 2}.get(str(changes.get("patching")), 3)
    assert len(lengths) >= expected
    assert sum(n * count for n, count in lengths.items()) > 180
    if not changes.keys() & {"patching", "max_patch_length"}:
        assert max(lengths) > 8
        assert lengths[1] > 8


def test_the_rows_meet_every_option() -> None:
    """Rules and options of a BLT give different patches or different logits, so none is ignored on both sides."""
    ids, offsets = packed(rows_of_text())
    for name in ("split_documents", "reset_at_newlines"):
        case = {"split_documents": "blt: documents", "reset_at_newlines": "blt: newlines"}[name]
        model = model_of(case)
        plain = build("blt", **{name: False})
        plain.config = dataclasses.replace(model.config, **{name: False})
        with torch.no_grad():
            assert (model(ids, offsets) - plain(ids, offsets)).abs().max() > 1e-3


FP32 = [
    "byte_lm",
    "blt: entropy",
    "blt: space",
    "blt_cross_windows",
    "blt_grouped_cross",
    "megabyte",
    "megabyte_extended",
]
# These schemes have no entropies, which rounding to 16 bits may move over the threshold.
HALF = ["byte_lm", "blt: space", "megabyte"]
ROUNDED = [(case, torch.float32) for case in FP32]
ROUNDED += [(case, dtype) for case in HALF for dtype in (torch.bfloat16, torch.half)]
FAST_ROUNDED = [("blt: entropy", torch.float32), ("blt: space", torch.bfloat16), ("megabyte", torch.half)]


@pytest.mark.parametrize(("case", "dtype"), [x if x in FAST_ROUNDED else slow(*x) for x in ROUNDED])
def test_rounding_is_that_of_a_forward(case: str, dtype: torch.dtype) -> None:
    model, truth, rows = model_of(case, dtype=dtype), model_of(case), rows_of_text()
    logits, state = read(model, rows, ragged([len(row) for row in rows], 1))
    with torch.no_grad():
        eager, exact = model(*packed(rows)), truth(*packed(rows))
    assert state.lengths == [len(row) for row in rows]
    assert eager.dtype == dtype
    assert_close(torch.cat(logits), eager, exact)


@pytest.mark.parametrize("case", slow_unless([*HALF, "megabyte_extended"], ["blt: space"]))
def test_autocast(case: str) -> None:
    model, truth, rows = model_of(case, dtype=torch.float32), model_of(case), rows_of_text()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = read(model, rows, ragged([len(row) for row in rows], 1))
            eager = model(*packed(rows))
        assert torch.cat(logits).dtype == eager.dtype == torch.bfloat16
        assert_close(torch.cat(logits), eager, truth(*packed(rows)))


# --- taking back, selecting -------------------------------------------------------------------------------------------


@pytest.fixture(params=[4, slow(64)])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The entries by which buffers grow. With few, they drop what they need not keep in nearly every call."""
    monkeypatch.setattr(cache, "_BLOCK", request.param)
    return request.param


def pieces(seed: int) -> Iterator[Tensor]:
    """Yield new ids for a row: a part of a random row of text, 0 to 25 of them."""
    rng, rows = random.Random(seed), rows_of_text()
    while True:
        row, count = rng.choice(rows), rng.choice([0, 1, 1, 2, 5, 9, 25])
        begin = rng.randrange(len(row) + 1)
        yield row[begin : begin + count]


@EVERY_CASE
def test_what_is_taken_back_leaves_no_trace(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_BLOCK", 4)
    rng, new = random.Random(case), pieces(2)
    checked = Checked(model_of(case), 3, undo=4)
    checked.extend([next(new) for _ in range(3)])
    for few in (True, False, True, True, False, True, False, False):
        for _ in range(2):
            checked.extend([next(new) for _ in range(3)])
        lengths = checked.state.lengths
        checked.truncate([max(0, n - rng.randrange(5)) if few else rng.randrange(n + 1) for n in lengths])
    checked.extend([next(new) for _ in range(3)])
    checked.truncate([0, 0, 0])
    checked.extend(rows_of_text()[:3])


@pytest.mark.parametrize("case", [*FEW, "blt: newlines", "blt: entropy, whole_characters and max_patch_length"])
def test_taken_back_to_every_place_of_a_row(case: str) -> None:
    """Among them those right before and after the end of a document, a newline and the bytes of a character."""
    row, other = text("ab\n", EOS, EOS, "\né人c", EOS, "e"), text("xy人", EOS, "z")
    checked = Checked(model_of(case), 1)
    for length in range(len(row) + 1):
        checked.extend([row])
        checked.truncate([length])
        checked.extend([other])
        checked.truncate([0])


@pytest.mark.parametrize("case", FEW)
def test_rows_are_repeated_put_into_another_order_and_emptied(case: str, block: int) -> None:
    new = pieces(3)
    checked = Checked(model_of(case), 2, undo=4)
    for rows in ([1, 0], [0, 0, 1], [2, -1, 0, 1], [-1], [], [-1, -1], [1, 1, 0, 0, 1]):
        for _ in range(3):
            checked.extend([next(new) for _ in checked.rows])
        checked.select(rows)
        checked.truncate([max(0, n - 3) for n in checked.state.lengths])
        checked.extend([next(new) for _ in checked.rows])


@pytest.mark.parametrize("case", FEW)
def test_at_the_edges_of_blocks(case: str) -> None:
    row = rows_of_text()[0].repeat(2)
    for length in (63, 64, 65, 127, 128, 129):
        checked = Checked(model_of(case), 2, undo=5)
        checked.extend([row[:length], text()])
        checked.extend([row[length:][:1], row[:1]])
        checked.extend([text(), row[:length]])
        checked.truncate([length, length - 1])
        checked.extend([row[:66], row[:1]])


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.lists(st.integers(0, 40), min_size=4, max_size=4)),
        st.tuples(st.just("extend"), st.lists(st.integers(0, 1), min_size=4, max_size=4)),
        st.tuples(st.just("take back"), st.lists(st.integers(0, 4) | st.integers(0, 200), min_size=4, max_size=4)),
        st.tuples(st.just("select"), st.lists(st.integers(-1, 3), max_size=4)),
    ),
    max_size=10,
)


@pytest.mark.parametrize("case", FEW)
@settings(max_examples=settings().max_examples // 4)
@given(operations=OPERATIONS, undo=st.sampled_from([0, 1, 4, 64]), seed=st.integers(0, 99))
def test_any_operations(case: str, block: int, operations: list[tuple[str, list[int]]], undo: int, seed: int) -> None:
    checked, ids = Checked(model_of(case), 2, undo), torch.cat(rows_of_text())
    for i, (kind, numbers) in enumerate(operations):
        count = len(checked.rows)
        if kind == "extend":
            begin = (seed + 17 * i) % 100
            checked.extend([ids[begin + 7 * r :][: numbers[r]] for r in range(count)])
        elif kind == "take back":
            lengths = checked.state.lengths
            checked.truncate([max(0, n - back) for n, back in zip(lengths, numbers, strict=False)])
        else:
            checked.select([r for r in numbers if r < count])


@pytest.mark.parametrize("case", FEW)
def test_only_more_than_undo_bytes_are_computed_anew(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_BLOCK", 4)
    checked = Checked(model_of(case), 2, undo=6)
    for _ in range(4):
        checked.extend([rows_of_text()[0]] * 2)
    calls: list[Sequence[int]] = []
    extend = checked.state.extend
    monkeypatch.setattr(checked.state, "extend", lambda ids, counts: calls.append(counts) or extend(ids, counts))
    length = checked.state.lengths[0]
    checked.truncate([length, length - 6])
    checked.truncate([length - 6, length - 6])
    assert calls == []
    checked.truncate([length // 2, length - 6])
    assert calls == [[length // 2, 0]]


# --- memory -----------------------------------------------------------------------------------------------------------


def buffers(state: ByteState) -> list[RowBuffer]:
    patcher = getattr(state, "patcher", None)
    return [*state._buffers(), *(buffers(patcher) if patcher is not None else [])]


@pytest.mark.parametrize(("step", "total"), [slow(50, 2500), (1000, 4000)])
def test_memory_of_local_layers_does_not_grow(step: int, total: int) -> None:
    ids = text(real_text(total))
    for case in ("byte_lm", "blt: entropy", "blt_cross_windows", "megabyte"):
        model = model_of(case)
        state = model.new_state(undo=8)
        bounded = [b for name, b in vars(state).items() if name in LOCAL_BUFFERS]
        bounded += [state.patcher.cache] if case.startswith("blt") else []
        assert len(bounded) == {"byte_lm": 1, "megabyte": 2}.get(case, 6)
        for part in ids.split(step):
            model.extend(part, state=state)
            assert max(buffer.capacity for buffer in bounded) < 640
        assert state.nbytes == sum(x.nbytes for buffer in buffers(state) for x in buffer.flat)


LOCAL_BUFFERS = ("cache", "encoder_keys", "decoder_keys", "encoded", "patches", "entropy", "parts", "local_keys")


@pytest.mark.parametrize("case", ["blt: entropy", "blt: static", "megabyte"])
def test_memory_of_the_global_transformer_grows_with_patches(case: str) -> None:
    model, ids = model_of(case), text(real_text(4000))
    state = model.new_state()
    for part in ids.split(100):
        model.extend(part, state=state)
        keys: RowBuffer = state.global_keys  # type: ignore[attr-defined]
        assert keys.end[0] < 0.8 * state.lengths[0] + 2
        assert keys.capacity <= 1.25 * keys.end[0] + 256
    assert keys.first == [0]
    assert keys.end[0] > len(ids) // 10


def test_memory_is_given_back() -> None:
    model = model_of("byte_lm")
    state = model.new_state(undo=8)
    model.extend(text(real_text(20000)), state=state)
    assert state.nbytes < 4 * 20000 * 1.5 + 200 * sum(x[0].nbytes for x in state.cache.flat)


# --- places and modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_inference_mode(case: str, modes: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A state made and extended in inference mode goes on outside of it, and the reverse."""
    monkeypatch.setattr(cache, "_BLOCK", 4)
    with torch.inference_mode(modes[0]):
        checked = Checked(model_of(case), 2, undo=2)
        checked.extend(rows_of_text()[::3][:2])
    with torch.inference_mode(modes[1]):
        checked.extend(rows_of_text()[:2])
        checked.truncate([n // 2 for n in checked.state.lengths])
        checked.select([1, 0, 0])
    with torch.inference_mode(modes[0]):
        checked.truncate([n - 1 for n in checked.state.lengths])
        checked.extend(rows_of_text()[2:])


@pytest.mark.parametrize("case", FEW)
def test_no_graph_is_kept(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_BLOCK", 4)
    model = copy.deepcopy(model_of(case)).requires_grad_(True)
    checked = Checked(model, 2, undo=1)
    for _ in range(2):
        logits = checked.extend([rows_of_text()[0], rows_of_text()[3]])
        assert not logits.requires_grad
    checked.truncate([90, 31])
    checked.select([1, 0])
    assert not any(x.requires_grad for buffer in buffers(checked.state) for x in buffer.flat)


@pytest.mark.parametrize("case", FEW)
def test_copies(case: str) -> None:
    """A copy of a state is one of the same model. Pickled with its model, it belongs to the model that is loaded."""
    model, (row, *_) = model_of(case), rows_of_text()
    state = model.new_state(undo=2)
    model.extend(row[:90], state=state)
    twin, (other, stored) = copy.deepcopy(state), pickle.loads(pickle.dumps((model, state)))
    assert twin.model is model
    both_model, both_state = copy.deepcopy((model, state))
    assert both_state.model is both_model
    expected = model.extend(row[90:], state=state)
    state.truncate([1])
    for owner, own in ((model, twin), (other, stored), (both_model, both_state)):
        assert torch.equal(owner.extend(row[90:], state=own), expected)
        own.truncate([40])
        assert own.lengths == [40]


@pytest.mark.parametrize("case", FEW)
def test_an_interrupted_call_leaves_no_trace(case: str, block: int) -> None:
    checked = Checked(model_of(case), 2, undo=2)
    model, (row, *_) = checked.model, rows_of_text()
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for module in (layers[0], layers[len(layers) // 2], layers[-1], model.lm_head):
        for count in (20, 90):
            checked.extend([row[:30], row[5:6]])
            state, before = checked.state, checked.state.lengths
            once = mock.Mock(side_effect=chain([KeyboardInterrupt], repeat(None)))
            handle = module.register_forward_hook(once)
            with pytest.raises(KeyboardInterrupt):
                model.extend(*packed([row[30 : 30 + count], row[:count]]), state=state)
            handle.remove()
            assert state.lengths == before
            checked.extend([row[30:33], row[40:90]])


@pytest.mark.parametrize("case", FEW)
def test_many_rows_and_int32_ids(case: str) -> None:
    rows, lengths = rows_of_text(), [i % 23 for i in range(200)]
    checked = Checked(model_of(case), 200, dtype=torch.int32)
    checked.extend([rows[i % 5][:n] for i, n in enumerate(lengths)])
    checked.extend([row[:1] for row in rows[:1] * 200])
    checked.truncate([len(row) // 2 for row in checked.rows])
    checked.extend([row[i % 3 :][:2] for i, row in enumerate(rows * 40)])


@pytest.mark.parametrize("case", FEW)
def test_padded_and_empty(case: str) -> None:
    model, (row, *_) = model_of(case), rows_of_text()
    state, tokens = model.new_state(3), row[:18].view(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.extend(tokens, state=state), model(tokens), rtol=0, atol=TOLERANCE)
    assert model.extend(tokens[:, :0], state=state).shape == (3, 0, 260)
    none = model.new_state(0)
    assert model.extend(text(), torch.tensor([0]), state=none).shape == (0, 260)
    none.truncate([])
    assert none.lengths == []
    assert none.rows == 0
    single = model.new_state()
    with torch.no_grad():
        torch.testing.assert_close(model.extend(row, state=single), model(row), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["byte_lm", "blt: global window", "megabyte: global window"])
def test_a_hundred_thousand_bytes_then_steps(case: str) -> None:
    model, ids = model_of(case, dtype=torch.float32), text(real_text(100_040))
    state = model.new_state(undo=4)
    logits = [model.extend(ids[:100_000], state=state)[-1:]]
    logits += [model.extend(ids[i : i + 1], state=state) for i in range(100_000, 100_030)]
    state.truncate([100_026])
    logits = [*logits[:27], model.extend(ids[100_026:], state=state)]
    with torch.no_grad():
        eager = model(ids)[99_999:]
    torch.testing.assert_close(torch.cat(logits), eager, rtol=0, atol=1e-4)


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW)
def test_wrong_arguments_are_named_and_change_nothing(case: str) -> None:
    model, rows = model_of(case), rows_of_text()
    for name, wrong in {"rows": (-1, 1.5, True, None), "undo": (-1, 1.5, None)}.items():
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
                model.new_state(**{name: value})  # type: ignore[arg-type]
    checked = Checked(model, 2)
    checked.extend([rows[0], rows[3]])
    state, one = checked.state, torch.tensor([0, 1, 1])
    extends: list[tuple[str, Any, Any, Any]] = [
        ("state", rows[0][:1], one, None),
        ("state", rows[0][:1], one, model_of("byte_lm: no window").new_state(2)),
        ("tokens", rows[0][:1], torch.tensor([0, 1]), state),
        ("tokens", rows[0][:1], None, state),
        ("tokens", rows[0][:1].float(), one, state),
        ("tokens", [70], one, state),
        ("tokens", torch.tensor([260]), one, state),
        ("tokens", torch.tensor([-1]), one, state),
        ("cu_seqlens", rows[0][:2], one, state),
        ("cu_seqlens", rows[0][:1], torch.tensor([0, 1, 0]), state),
    ]
    for name, tokens, offsets, own in extends:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            model.extend(tokens, offsets, state=own)
        checked.check()
    length = len(rows[0])
    for lengths in ([length], [length, 0, 0], [length + 1, 0], [-1, 0], [1.0, 0], ["1", 0], 3, None):
        with pytest.raises((TypeError, ValueError), match=r"^lengths: expected"):
            state.truncate(lengths)  # type: ignore[arg-type]
        checked.check()
    for row in (2, -1, 0.0, None):
        with pytest.raises((TypeError, ValueError), match=r"^row: expected"):
            state.row_ids(row)  # type: ignore[arg-type]
    for selected in ([2], [-2], [0.0], ["0"], 0, None):
        with pytest.raises((TypeError, ValueError), match=r"^rows: expected"):
            state.select(selected)  # type: ignore[arg-type]
        checked.check()
    checked.truncate(torch.tensor([20, 3]))  # type: ignore[arg-type]
    checked.extend([rows[4], rows[1]])


def test_a_state_is_of_the_dtype_that_the_model_had() -> None:
    model = build("byte_lm")
    state = model.new_state()
    model.float()
    with pytest.raises(ValueError, match=r"^state: expected .*torch\.float32 on cpu.*torch\.float64"):
        model.extend(text("a"), state=state)


def test_a_model_that_patches_by_entropy_needs_its_patcher() -> None:
    model = BLT(dataclasses.replace(SMALL_BLT, patcher=None))
    with pytest.raises(ValueError, match=r"^patcher: expected a ByteLM"):
        model.new_state()


# --- drafts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in FEW if not case.startswith("byte_lm")])
def test_a_draft_leaves_no_trace(case: str, block: int) -> None:
    """`draft` and `extend_patcher` go ahead of the rows; after `truncate` the state is what it was."""
    new = pieces(4)
    checked = Checked(model_of(case), 3, undo=30)
    checked.extend([text("a")] * 3)
    for turn in range(6):
        checked.extend([next(new) for _ in range(3)])
        state, guess = checked.state, [next(new) for _ in range(3)]
        lengths, counts = state.lengths, [len(ids) for ids in guess]
        if isinstance(state, BLTState) and state.patcher is not None and turn % 2:
            with torch.no_grad():
                state.extend_patcher(torch.cat(guess), counts)
            state.patcher._truncate([n + count // 2 for n, count in zip(lengths, counts, strict=True)])
            state.entropy.truncate([n + count // 2 for n, count in zip(lengths, counts, strict=True)])
            checked.extend([ids[: len(ids) // 2 + 1] for ids in guess])
        else:
            with torch.no_grad():
                assert state.draft(torch.cat(guess), counts).shape == (sum(counts), 260)
            checked.truncate(lengths)
