"""PatchLayout from padded patch lengths and back: of facebookresearch/blt, of transformers, and of known sizes."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from capture_rules import forbidden
from hypothesis import given
from hypothesis import strategies as st
from test_layout import DOCUMENTS, as_lists, from_documents

import blt_kernels as bk
from blt_kernels import PatchLayout
from blt_kernels.testing import assert_equal, ragged_layout

# --- lengths ----------------------------------------------------------------------------------------------------------


@given(DOCUMENTS)
def test_lengths_both_ways(documents: list[list[bool]]) -> None:
    layout = from_documents(documents)
    again = PatchLayout.from_lengths(layout.to_lengths())
    assert again.to_lengths().tolist() == layout.to_lengths().tolist()
    # Lengths without the byte to come do not say whether it opens a patch, but keep all else.
    quiet = from_documents([[*d[:-1], False] if d else d for d in documents])
    assert as_lists(again.compact()) == as_lists(quiet.compact())


@given(st.integers(0, 9), st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=5))
def test_lengths_with_the_byte_to_come_both_ways(size: int, rows: list[list[bool]]) -> None:
    layout = from_documents([row[:size] for row in rows])
    lengths = layout.to_lengths(include_next_byte=True)
    assert lengths.sum(1).tolist() == [size + 1] * len(rows)
    again = PatchLayout.from_lengths(lengths, seq_len=size)
    assert as_lists(again.compact()) == as_lists(layout.compact())


def test_lengths_by_hand() -> None:
    lengths = torch.tensor([[1, 3, 2, 0], [1, 1, 1, 3]])
    layout = PatchLayout.from_lengths(lengths)
    assert layout.patch_offsets[:8].tolist() == [0, 1, 4, 6, 7, 8, 9, 12]
    assert layout.decode_ids.tolist() == [0, 0, 0, 1, 1, 1, 3, 4, 5, 5, 5, 5]
    with_next = PatchLayout.from_lengths(torch.tensor([[1, 3, 2, 1], [1, 1, 1, 4]]), seq_len=6)
    assert with_next.patch_ids.tolist() == layout.patch_ids.tolist()
    assert with_next.decode_ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 5, 5]
    # A row may leave the byte to come out where another counts it.
    mixed = PatchLayout.from_lengths(torch.tensor([[1, 3, 2, 1], [1, 1, 1, 3]]), seq_len=6)
    assert as_lists(mixed) == as_lists(with_next)


def test_lengths_skip_zeros_in_between() -> None:
    layout = PatchLayout.from_lengths(torch.tensor([[0, 2, 0, 1]]))
    assert layout.to_lengths().tolist() == [[2, 1]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_lengths_of_any_integer_dtype(dtype: torch.dtype) -> None:
    layout = PatchLayout.from_lengths(torch.tensor([[1, 200], [3, 0]], dtype=dtype))
    assert layout.cu_seqlens.tolist() == [0, 201, 204]


@pytest.mark.parametrize(
    ("lengths", "seq_len", "error", "message"),
    [
        ([[1, 2]], None, TypeError, "lengths.*list"),
        (torch.ones(1, 2), None, TypeError, "lengths.*float32"),
        (torch.ones(1, 2, dtype=torch.bool), None, TypeError, "lengths.*bool"),
        (torch.ones(2, dtype=torch.int64), None, ValueError, r"lengths.*\[B, Pmax\].*\[2\]"),
        (torch.tensor([[1, -2]]), None, ValueError, "lengths.*-2"),
        (torch.tensor([[1, 2], [1, 5]]), 3, ValueError, "row 1 sums to 6.*3"),
        (torch.tensor([[1, 1]]), 3, ValueError, "row 0 sums to 2.*3"),
        (torch.tensor([[1, 2], [2, -1]]), 3, ValueError, "row 1 sums to 1, expected seq_len = 3$"),
        (torch.tensor([[1, 2, 0], [1, -1, 2]]), 3, ValueError, "zeros behind the -1 of row 1, got 2"),
        (torch.tensor([[1, -1, -1]]), None, ValueError, "zeros behind the -1 of row 0, got -1"),
        (torch.tensor([[-1, 0], [1, 2]]), None, ValueError, "row 0 sums to -1, expected 0 or more"),
        (torch.tensor([[2**31]]), None, ValueError, "lengths.*up to 2147483647, got 2147483648"),
        (torch.tensor([[2**62, 2**62, 2**62, 2**62, 5]]), 5, ValueError, "lengths.*got 4611686018427387904"),
        (
            torch.tensor([[2**31 - 1], [1]]),
            None,
            ValueError,
            "at most 2147483647 bytes in all, got 2147483648",
        ),
        (torch.tensor([[1]]), 2**63, ValueError, "seq_len: expected 0 to 2147483647, got 9223372036854775808"),
        (torch.tensor([[1]]), -1, ValueError, "seq_len: expected 0 to 2147483647, got -1"),
    ],
)
def test_wrong_lengths_are_named(lengths: Any, seq_len: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PatchLayout.from_lengths(lengths, seq_len)


def test_wrong_padding_is_named() -> None:
    layout = ragged_layout(5)
    for call in (layout.to_lengths, lambda padding: PatchLayout.from_lengths(torch.ones(1, 2).long(), padding=padding)):
        with pytest.raises(ValueError, match=r"padding: expected .*0 or -1, got 3"):
            call(padding=3)
    with pytest.raises(ValueError, match="lengths: expected values >= 0 up to 2147483647, got -1"):
        PatchLayout.from_lengths(torch.tensor([[1, -1]]), padding=0)
    with pytest.raises(ValueError, match="include_next_byte: expected False with padding = -1, got True"):
        layout.to_lengths(True, padding=-1)


# --- lengths of transformers ------------------------------------------------------------------------------------------


def test_lengths_of_transformers_by_hand() -> None:
    """A length of 0 at S is a start there, and -1 pads."""
    theirs = torch.tensor([[1, 1, 3, 0], [1, 1, 4, -1]])
    ours = PatchLayout.from_lengths(torch.tensor([[1, 1, 3, 1], [1, 1, 4, 0]]), seq_len=5)
    for seq_len in (None, 5):
        assert as_lists(PatchLayout.from_lengths(theirs, seq_len)) == as_lists(ours)
    assert ours.to_lengths(padding=-1).tolist() == theirs.tolist()
    # The pads of a row with fewer starts are zeros, before the -1 that ends the longest row's width.
    wide = torch.tensor([[1, 1, 1, 2, 2, 0, -1], [1, 6, 0, 0, 0, 0, -1], [1, 1, 1, 1, 1, 1, 0]])
    layout = PatchLayout.from_lengths(wide, seq_len=6)
    assert layout.to_lengths(True).tolist() == [[1, 1, 1, 2, 2, 0, 0], [1, 6, 0, 0, 0, 0, 0], [1] * 7]
    assert layout.to_lengths(padding=-1).tolist() == wide.tolist()
    assert as_lists(PatchLayout.from_lengths(torch.nn.functional.pad(wide, (0, 2)), 6).compact()) == as_lists(
        layout.compact()
    )


def test_lengths_of_transformers_without_padding_need_to_be_called_so() -> None:
    even = torch.tensor([[1, 1, 3, 0], [1, 1, 2, 1]])
    read = [PatchLayout.from_lengths(even, 5, padding).to_lengths(True)[0].tolist() for padding in (None, 0, -1)]
    assert read == [[1, 1, 4, 0], [1, 1, 4, 0], [1, 1, 3, 1]]


@given(st.integers(0, 9), st.lists(st.lists(st.booleans(), min_size=9, max_size=9), max_size=5))
def test_lengths_of_transformers_both_ways(size: int, rows: list[list[bool]]) -> None:
    layout = from_documents([row[:size] for row in rows])
    lengths = layout.to_lengths(padding=-1)
    assert lengths.sum(1).tolist() == [size] * len(rows)
    for seq_len in (None, size):
        again = PatchLayout.from_lengths(lengths, seq_len, padding=-1)
        assert as_lists(again.compact()) == as_lists(layout.compact())
        assert again.to_lengths(padding=-1).tolist() == lengths.tolist()


@given(st.integers(1, 12), st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=5))
def test_lengths_of_transformers_itself(size: int, rows: list[list[bool]]) -> None:
    """Its patcher's lengths are those of `to_lengths`, and give the layout of `patch_starts`."""
    modeling = pytest.importorskip("transformers.models.blt.modeling_blt")
    entropy = torch.tensor([row[:size] for row in rows]).float()
    theirs = modeling.BltPatcher.patch_lengths_from_entropies(entropy, sequence_length=size, threshold=0.5)
    layout = bk.patch_starts(entropy, threshold=0.5)
    assert layout.to_lengths(padding=-1).tolist() == theirs.tolist()
    assert as_lists(PatchLayout.from_lengths(theirs, size, padding=-1).compact()) == as_lists(layout.compact())
    if int(theirs.min()) < 0:
        assert as_lists(PatchLayout.from_lengths(theirs).compact()) == as_lists(layout.compact())


# --- lengths whose sizes are known ------------------------------------------------------------------------------------

ANY_LENGTH = st.integers(-3, 9) | st.sampled_from([-(2**63), 2**63 - 1, 2**31])


def starts_of_lengths(row: list[int], size: int, padding: int | None) -> list[int]:
    """Return the starts of a row of any lengths, as the docstring of `from_lengths` has them."""
    counted = [max(0, min(n, 2**31 - 1)) for n in row]
    starts = [sum(counted[:i]) for i in range(len(row))]
    lengths_of_transformers = padding == -1
    real = {s for s, n in zip(starts, row, strict=True) if s and s <= size and n > 0}
    if lengths_of_transformers:
        real |= {s for s, n in zip(starts, row, strict=True) if s == size > 0 and n == 0}
    return sorted(real | {0}) if size else []


@given(
    st.integers(0, 9),
    st.lists(st.lists(ANY_LENGTH, min_size=6, max_size=6), max_size=4),
    st.sampled_from([None, 0, -1]),
    st.integers(0, 30),
)
def test_any_lengths_make_a_layout(size: int, rows: list[list[int]], padding: int | None, room: int) -> None:
    """Values are not checked where all sizes are given, and never lead out of bounds."""
    capacity = len(rows) + room
    lengths = torch.tensor(rows, dtype=torch.int64).view(len(rows), 6)
    layout = PatchLayout.from_lengths(lengths, size, padding, capacity)
    found = (-1 if any(n < 0 for row in rows for n in row) else 0) if padding is None else padding
    starts = [starts_of_lengths(row, size, found) for row in rows]
    assert as_lists(layout) == oracle.layout_of(starts, [size] * len(rows), capacity)


@given(
    st.integers(0, 9), st.lists(st.lists(st.booleans(), min_size=9, max_size=9), max_size=5), st.sampled_from([0, -1])
)
def test_known_sizes_change_nothing(size: int, rows: list[list[bool]], padding: int) -> None:
    layout = from_documents([row[:size] for row in rows])
    lengths = layout.to_lengths(include_next_byte=padding == 0, padding=padding)
    checked = PatchLayout.from_lengths(lengths, size, padding)
    known = PatchLayout.from_lengths(lengths, size, padding, max_patches=checked.capacity)
    assert as_lists(known) == as_lists(checked)
    if lengths.shape[1]:
        again = layout.to_lengths(include_next_byte=padding == 0, padding=padding, width=lengths.shape[1])
        assert again.tolist() == lengths.tolist()


def test_lengths_of_a_width() -> None:
    """A wider row is padded; in a narrower one the last patch takes the bytes of those that have no room."""
    layout = PatchLayout.from_lengths(torch.tensor([[1, 1, 3, 1], [1, 1, 4, 0], [2, 1, 1, 1]]), seq_len=5)
    expected = {
        (False, 0): {1: [[5], [5], [5]], 2: [[1, 4], [1, 4], [2, 3]], 4: [[1, 1, 3, 0], [1, 1, 3, 0], [2, 1, 1, 1]]},
        (True, 0): {2: [[1, 5], [1, 5], [2, 4]], 5: [[1, 1, 3, 1, 0], [1, 1, 4, 0, 0], [2, 1, 1, 2, 0]]},
        (False, -1): {3: [[1, 1, 3], [1, 1, 3], [2, 1, 2]], 5: [[1, 1, 3, 1, -1], [1, 1, 4, 0, -1], [2, 1, 1, 2, -1]]},
    }
    for (include_next_byte, padding), by_width in expected.items():
        for width, lengths in by_width.items():
            assert layout.to_lengths(include_next_byte, padding, width).tolist() == lengths, (padding, width)


def test_lengths_of_slots() -> None:
    """Empty patches within a row are lengths of 0; those behind its last byte are left out, as is a start there."""
    ids = torch.tensor([[0, 0, 2], [1, 1, 1]])
    layout = PatchLayout.from_ids(ids, torch.tensor([[-1, -1, 2], [-1, -1, -1]]), 5)
    assert layout.to_lengths().tolist() == [[2, 0, 1], [0, 3, 0]]
    assert layout.to_lengths(True).tolist() == [[2, 0, 1, 1], [0, 4, 0, 0]]
    assert layout.to_lengths(padding=-1).tolist() == [[2, 0, 1, 0], [0, 4, 0, -1]]
    assert layout.to_lengths(width=5).tolist() == [[2, 0, 1, 0, 0], [0, 3, 0, 0, 0]]


def there_and_back(lengths: torch.Tensor, size: int, capacity: int, width: int) -> tuple[PatchLayout, torch.Tensor]:
    layout = PatchLayout.from_lengths(lengths, size, max_patches=capacity)
    return layout, layout.to_lengths(True, width=width)


def test_known_sizes_read_no_value_and_compile_once() -> None:
    """On "meta" there are no values to read."""
    layout, lengths = there_and_back(torch.empty(3, 4, dtype=torch.int64, device="meta"), 9, 12, 5)
    assert (layout.capacity, lengths.shape) == (12, (3, 5))
    lengths = torch.ones(3, 4, dtype=torch.int64)
    assert not forbidden(lambda: there_and_back(lengths, 9, 12, 5)), "a CUDA graph cannot capture it"
    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, size, width in ((2, 7, 4), (3, 9, 5)):
            lengths = torch.arange(rows * width).view(rows, width) % 3
            expected = there_and_back(lengths, size, rows * width, width)
            assert_equal(compiled(lengths, size, rows * width, width), expected)


def test_wrong_sizes_are_named() -> None:
    lengths = torch.ones(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"max_patches: expected at least one patch a row \(3\), got 2"):
        PatchLayout.from_lengths(lengths, 2, max_patches=2)
    with pytest.raises(ValueError, match="seq_len: expected at most 2147483647 bytes in all, got 1073741824 in 3 rows"):
        PatchLayout.from_lengths(lengths, 2**30, max_patches=9)
    for name in ("seq_len", "max_patches"):
        with pytest.raises(TypeError, match=f"{name}: expected an int, got True"):
            PatchLayout.from_lengths(torch.ones(3, 1).long(), **{name: True})
    with pytest.raises(TypeError, match=r"width: expected an int, got 2\.5"):
        PatchLayout.from_lengths(torch.ones(3, 1).long()).to_lengths(width=2.5)
    with pytest.raises(ValueError, match="width: expected a value >= 1, got 0"):
        ragged_layout(5).to_lengths(width=0)
