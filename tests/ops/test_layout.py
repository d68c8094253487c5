"""PatchLayout: from boundary decisions and from lengths, back to lengths, as a pytree, and in short."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError, fields
from typing import Any

import oracle
import pytest
import torch
from capture_rules import forbidden
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import blt_kernels as bk
from blt_kernels import PatchLayout
from blt_kernels.testing import assert_equal, offsets_of, ragged_layout

DOCUMENTS = st.lists(st.lists(st.booleans(), max_size=12), max_size=6)


def as_lists(layout: PatchLayout) -> dict[str, Any]:
    return {f.name: getattr(layout, f.name).tolist() for f in fields(layout)}


def from_documents(documents: list[list[bool]], max_patches: int | None = None, tail: int = 0) -> PatchLayout:
    boundaries = [own for document in documents for own in document] + [True] * tail
    return PatchLayout.from_cuts(
        torch.tensor(boundaries, dtype=torch.bool), offsets_of([len(d) for d in documents]), max_patches
    )


def check_decode_offsets(layout: PatchLayout) -> None:
    """Check the definition of `decode_offsets`, and what readers of patches rely on."""
    ids, offsets = layout.decode_ids.tolist(), layout.decode_offsets.tolist()
    patches, documents = layout.cu_patches.tolist(), layout.cu_seqlens.tolist()
    for b, (start, end) in enumerate(itertools.pairwise(documents)):
        for p in range(patches[b], patches[b + 1]):
            assert offsets[p] == next((i for i in range(start, end) if ids[i] >= p), end)
    assert offsets[patches[-1] :] == [documents[-1]] * (layout.capacity + 1 - patches[-1])
    assert offsets == sorted(offsets)
    assert set(ids[: offsets[0]]) <= {-1}
    for p, (start, end) in enumerate(itertools.pairwise(offsets)):
        readers = ids.count(p)
        assert ids[start:end] == [p] * readers + [-1] * (end - start - readers)


def starts_of(document: list[bool]) -> list[int]:
    return [0, *(i + 1 for i, cut in enumerate(document) if cut)] if document else []


# --- from boundary decisions ------------------------------------------------------------------------------------------


@given(DOCUMENTS, st.none() | st.integers(0, 16))
def test_from_cuts_against_brute_force(documents: list[list[bool]], room: int | None) -> None:
    max_patches = None if room is None else len(documents) + room
    layout = from_documents(documents, max_patches)
    sizes = [len(d) for d in documents]
    assert as_lists(layout) == oracle.layout_of([starts_of(d) for d in documents], sizes, max_patches)
    assert all(getattr(layout, f.name).dtype == torch.int32 for f in fields(layout) if f.name != "overflowed")
    assert layout.overflowed.dtype == torch.bool


@given(DOCUMENTS, st.integers(1, 5))
def test_bytes_beyond_the_last_document_belong_to_no_patch(documents: list[list[bool]], tail: int) -> None:
    layout, without = from_documents(documents, tail=tail), from_documents(documents)
    size = without.num_bytes
    assert layout.num_bytes == layout.capacity == size + tail
    assert layout.patch_ids[size:].tolist() == layout.decode_ids[size:].tolist() == [-1] * tail
    for name in ("patch_offsets", "decode_offsets"):
        assert getattr(layout, name).tolist() == getattr(without, name).tolist() + [size] * tail
    for name in ("patch_ids", "decode_ids"):
        assert getattr(layout, name)[:size].tolist() == getattr(without, name).tolist()
    assert layout.to_lengths(include_next_byte=True).tolist() == without.to_lengths(include_next_byte=True).tolist()


def test_every_later_document_keeps_a_patch() -> None:
    documents = [[True] * 5, [], [True] * 3, [True]]
    counts = {room: from_documents(documents, room).cu_patches.diff().tolist() for room in range(4, 10)}
    assert counts == {
        4: [2, 0, 1, 1],
        5: [3, 0, 1, 1],
        6: [4, 0, 1, 1],
        7: [5, 0, 1, 1],
        8: [5, 0, 2, 1],
        9: [5, 0, 3, 1],
    }
    assert [bool(from_documents(documents, room).overflowed) for room in (8, 9)] == [True, False]


def test_no_document_and_no_byte() -> None:
    for layout in (from_documents([]), from_documents([[], []])):
        assert layout.num_bytes == layout.capacity == int(layout.num_patches) == 0
        assert layout.to_lengths().shape == (layout.num_documents, 0)
        assert "no bytes on average" in repr(layout)
    assert from_documents([]).num_documents == 0
    assert from_documents([[], []]).to_lengths(include_next_byte=True).tolist() == [[1], [1]]


def test_decode_offsets_by_hand() -> None:
    # Documents have two patches and a start after the last byte; no byte; one patch of three bytes that none of them
    # reads; one patch that its last byte reads; a single byte with a start after it; a single byte without.
    documents = [[True, False, True], [], [False, False, False], [False, True], [True], [False]]
    layout = from_documents(documents)
    assert layout.patch_offsets.tolist() == [0, 1, 3, 6, 8, 9, 10, 10, 10, 10, 10]
    assert layout.decode_ids.tolist() == [0, 0, 1, -1, -1, -1, -1, 3, 4, -1]
    assert layout.decode_offsets.tolist() == [0, 2, 6, 7, 8, 10, 10, 10, 10, 10, 10]
    # The capacity drops the start after byte 0 and with it that after the document's last byte.
    short = from_documents(documents, 5)
    assert short.decode_ids.tolist() == [-1, -1, -1, -1, -1, -1, -1, 2, 3, -1]
    assert short.decode_offsets.tolist() == [3, 6, 7, 8, 10, 10]


@given(DOCUMENTS, st.none() | st.integers(0, 16), st.integers(0, 3))
def test_decode_offsets_are_what_they_say(documents: list[list[bool]], room: int | None, tail: int) -> None:
    max_patches = None if room is None else len(documents) + room
    check_decode_offsets(from_documents(documents, max_patches, tail))


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
    """COMPAT.md, item 22: a length of 0 at S is a start there, and -1 pads."""
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
    with pytest.raises(ValueError, match="width: expected a value >= 1, got 0"):
        ragged_layout(5).to_lengths(width=0)


# --- capacity ---------------------------------------------------------------------------------------------------------


def test_compact_trims_the_capacity() -> None:
    layout = ragged_layout(500, 3)
    compact = layout.compact()
    assert compact.capacity == int(layout.num_patches) < layout.capacity
    assert compact.decode_offsets.shape == compact.patch_offsets.shape
    assert compact.patch_lengths.min() > 0
    assert_equal(compact.to_lengths(True), layout.to_lengths(True))
    assert_equal(compact.compact(), compact)


def test_properties() -> None:
    layout = bk.static_patch(torch.tensor([0, 5, 5, 7]), 3, max_patches=6)
    assert (layout.num_bytes, layout.num_documents, layout.capacity) == (7, 3, 6)
    assert layout.num_patches.tolist() == [5]
    assert layout.num_patches.shape == (1,)
    assert layout.patch_lengths.tolist() == [1, 3, 1, 1, 1, 0]
    assert layout.device == torch.device("cpu")


def test_repr() -> None:
    layout = bk.static_patch(torch.tensor([0, 5, 5, 7]), 3, max_patches=6)
    assert repr(layout) == (
        "PatchLayout(3 documents, 7 bytes, 5 patches of 1.40 bytes on average, capacity 6, device='cpu')"
    )
    assert "overflowed" in repr(bk.byte_patch(torch.tensor([0, 5]), max_patches=2))


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ragged_layout(5).patch_ids = torch.zeros(5)  # type: ignore[misc]


# --- pytree, devices, compilation -------------------------------------------------------------------------------------


def test_to_moves_every_tensor(device: str) -> None:
    layout = ragged_layout(50).to(device)
    assert {getattr(layout, f.name).device.type for f in fields(layout)} == {device}
    meta = layout.to("meta")
    assert meta.device.type == "meta"
    assert (meta.num_bytes, meta.capacity) == (50, 50)
    assert "device='meta'" in repr(meta)


def test_it_is_a_pytree() -> None:
    layout = ragged_layout(50)
    leaves, spec = pytree.tree_flatten({"layout": layout})
    assert len(leaves) == len(fields(layout))
    assert_equal(pytree.tree_unflatten(leaves, spec)["layout"], layout)
    moved = pytree.tree_map(lambda x: x.to("meta"), layout)
    assert isinstance(moved, PatchLayout)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def lengths_and_layout(layout: PatchLayout) -> tuple[torch.Tensor, PatchLayout]:
    return layout.patch_lengths * 2, pytree.tree_map(torch.clone, layout)


def test_it_goes_through_torch_compile() -> None:
    compiled = torch.compile(lengths_and_layout, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (40, 70):
            layout = ragged_layout(size, size)
            assert_equal(compiled(layout), lengths_and_layout(layout))


def test_from_cuts_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(PatchLayout.from_cuts, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (40, 70):
            boundaries, cu_seqlens = torch.arange(size) % 3 == 0, offsets_of([7, 0, size - 7])
            assert_equal(compiled(boundaries, cu_seqlens), PatchLayout.from_cuts(boundaries, cu_seqlens))


class Patches(torch.nn.Module):
    def forward(self, entropy: torch.Tensor) -> PatchLayout:
        return bk.patch_starts(entropy, threshold=0.5)


def test_it_goes_through_torch_export(tmp_path: Any) -> None:
    entropy = torch.rand(30)
    size = torch.export.Dim("size", min=2)
    program = torch.export.export(Patches(), (entropy,), dynamic_shapes=({0: size},))
    torch.export.save(program, tmp_path / "patches.pt2")
    loaded = torch.export.load(tmp_path / "patches.pt2").module()
    for length in (30, 45):
        entropy = torch.rand(length)
        assert_equal(loaded(entropy), bk.patch_starts(entropy, threshold=0.5))
