"""PatchLayout: from boundary decisions, with any capacity, as a pytree, compiled, and in short."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError, fields
from typing import Any

import oracle
import pytest
import torch
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
