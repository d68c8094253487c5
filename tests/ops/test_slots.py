"""A padded patch axis with empty patches anywhere: the layout of `from_ids`, and every op on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from capture_rules import forbidden
from hypothesis import given
from hypothesis import strategies as st
from test_layout import as_lists
from torch import Tensor

import blt_kernels as bk
from blt_kernels import PatchLayout
from blt_kernels.models import BLT, BLTConfig
from blt_kernels.reference.patch_cross_attention import patch_cross_attention_reference
from blt_kernels.testing import assert_close, assert_equal

ROWS = 3
DENSITIES = ((0.5, 0.15, 0.3), (0.002, 0.02, 0.01))  # with the second, the kernels divide patches into parts


@st.composite
def hostile_ids(draw: st.DrawFn) -> tuple[list[list[list[int]]], int]:
    """Return patch ids and decode ids that may be out of range or fall, and the number of slots."""
    rows, size, slots = draw(st.integers(0, 4)), draw(st.integers(0, 8)), draw(st.integers(1, 6))
    id = st.integers(-2, slots + 1) | st.sampled_from([-(2**63), 2**63 - 1])
    row = st.lists(id, min_size=size, max_size=size)
    ordered = st.lists(st.integers(-1, slots - 1), min_size=size, max_size=size).map(sorted)
    return draw(st.lists(st.lists(row | ordered, min_size=rows, max_size=rows), min_size=2, max_size=2)), slots


def clamped(row: list[int], lowest: int, slots: int) -> list[int]:
    return list(itertools.accumulate((max(lowest, min(id, slots - 1)) for id in row), max))


def first_bytes(rows: list[list[int]], slots: int) -> list[int]:
    """Return the first byte of each row whose id is at least that of a slot, or the end of the row; then the end."""
    size = len(rows[0]) if rows else 0
    found = [[sum(id < p for id in row) + b * size for p in range(slots)] for b, row in enumerate(rows)]
    return [*itertools.chain(*found), len(rows) * size]


@given(hostile_ids())
def test_from_ids_against_brute_force(device: str, arguments: tuple[list[list[list[int]]], int]) -> None:
    """Ids out of range and ids that fall are clamped, as the docstring says."""
    (patch_ids, decode_ids), slots = arguments
    shape = (len(patch_ids), len(patch_ids[0]) if patch_ids else 0)
    tensors = [torch.tensor(ids, dtype=torch.int64, device=device).view(shape) for ids in (patch_ids, decode_ids)]
    layout = PatchLayout.from_ids(*tensors, slots)
    patches, readers = ([clamped(row, low, slots) for row in ids] for ids, low in ((patch_ids, 0), (decode_ids, -1)))
    assert as_lists(layout) == {
        "patch_offsets": first_bytes(patches, slots),
        "cu_patches": [b * slots for b in range(shape[0] + 1)],
        "patch_ids": [id + b * slots for b, row in enumerate(patches) for id in row],
        "decode_ids": [id + b * slots if id >= 0 else -1 for b, row in enumerate(readers) for id in row],
        "decode_offsets": first_bytes(readers, slots),
        "cu_seqlens": [b * shape[1] for b in range(shape[0] + 1)],
        "overflowed": [any(id >= slots for row in patch_ids for id in row)],
    }
    assert all(getattr(layout, f.name).dtype == torch.int32 for f in fields(layout) if f.name != "overflowed")
    assert_equal(layout.compact(), layout)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_ids_of_any_integer_dtype_and_strides(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 0], [200, 1], [1, 3]]).t()
    assert_equal(PatchLayout.from_ids(ids.to(dtype), ids.to(dtype), 201), PatchLayout.from_ids(ids, ids, 201))


def test_from_ids_reads_no_value_and_compiles_once() -> None:
    """On "meta" there are no values to read."""
    meta = torch.empty(2, 7, dtype=torch.int64, device="meta")
    assert PatchLayout.from_ids(meta, meta, 5).capacity == 10
    zeros = torch.zeros(2, 7, dtype=torch.int64)
    assert not forbidden(lambda: PatchLayout.from_ids(zeros, zeros, 5)), "a CUDA graph cannot capture it"
    compiled = torch.compile(PatchLayout.from_ids, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, size, slots in ((2, 9, 6), (3, 7, 5)):
            ids = torch.arange(size).expand(rows, size) // 2
            assert_equal(compiled(ids, ids - 1, slots), PatchLayout.from_ids(ids, ids - 1, slots))


@pytest.mark.parametrize(
    ("patch_ids", "decode_ids", "slots", "error", "message"),
    [
        ([[0]], torch.zeros(1, 1).long(), 1, TypeError, "patch_ids: expected an integer tensor, got list"),
        (torch.zeros(1, 1).long(), torch.zeros(1, 1), 1, TypeError, "decode_ids: expected an integer .*float32"),
        (torch.zeros(3).long(), torch.zeros(3).long(), 1, ValueError, r"patch_ids: expected shape \[B, S\], got \[3\]"),
        (torch.zeros(1, 3).long(), torch.zeros(1, 4).long(), 1, ValueError, r"decode_ids.*\[1, 3\].*got \[1, 4\]"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), 0, ValueError, "slots: expected 1 to .*, got 0"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), 2**30, ValueError, "slots.*2 rows, got 1073741824"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), True, TypeError, "slots: expected an int, got True"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), 2.0, TypeError, "slots: expected an int, got 2.0"),
    ],
)
def test_wrong_ids_are_named(patch_ids: Any, decode_ids: Any, slots: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PatchLayout.from_ids(patch_ids, decode_ids, slots)


# --- ops --------------------------------------------------------------------------------------------------------------


def both_layouts(gaps: bool, device: str, size: int = 40) -> tuple[PatchLayout, PatchLayout, Tensor]:
    """Return dense patches, the same ones in slots, and the slot of each. With `gaps`, there are empty slots between.

    Rows have different numbers of patches, so that all but one have empty slots behind them.
    """
    density = torch.tensor(DENSITIES[size > 40])[:, None]
    cuts = torch.rand(ROWS, size, generator=torch.Generator().manual_seed(3)) < density
    offsets = torch.arange(ROWS + 1, dtype=torch.int32) * size
    dense = PatchLayout.from_cuts(cuts.flatten(), offsets).compact()
    local = [ids.view(ROWS, size) - dense.cu_patches[:-1, None] for ids in (dense.patch_ids, dense.decode_ids)]
    step = 2 if gaps else 1
    slots = int(dense.cu_patches.diff().max()) * step + 2
    read = torch.where(dense.decode_ids.view(ROWS, size) >= 0, local[1] * step + gaps, -1)
    padded = PatchLayout.from_ids(local[0] * step + gaps, read, slots)
    slot = torch.cat([torch.arange(int(n)) * step + gaps + b * slots for b, n in enumerate(dense.cu_patches.diff())])
    return dense.to(device), padded.to(device), slot.to(device)


def scattered(x: Tensor, slot: Tensor, slots: int, fill: float) -> Tensor:
    return x.new_full((slots, *x.shape[1:]), fill).index_copy(0, slot, x)


def with_gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def randn(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


DIRECTIONS = pytest.mark.parametrize("direction", ["encode", "decode"])
SIZES = pytest.mark.parametrize("size", [40, 700])
GAPS = pytest.mark.parametrize("gaps", [False, True])


@SIZES
@GAPS
def test_patch_pool_of_slots(gaps: bool, size: int, device: str) -> None:
    """Every reduction of a patch and its gradient are those of dense patches, bit for bit; empty slots hold zeros."""
    dense, padded, slot = both_layouts(gaps, device, size)
    reduce = ("max", "min", "mean", "sum", "first", "last")
    x = randn(ROWS * size, 5, device=device).requires_grad_()
    grad = randn(dense.capacity, 5 * len(reduce), device=device, seed=1)
    own, grad_x = with_gradients(bk.patch_pool(x, dense, reduce), [x], grad)
    garbage = scattered(grad, slot, padded.capacity, torch.nan)  # an empty patch sends no gradient
    expected = [scattered(own, slot, padded.capacity, 0), grad_x]
    assert_equal(with_gradients(bk.patch_pool(x, padded, reduce), [x], garbage), expected)


@SIZES
@GAPS
@pytest.mark.parametrize("ids", ["patch", "decode"])
def test_patch_unpool_of_slots(ids: str, gaps: bool, size: int, device: str) -> None:
    dense, padded, slot = both_layouts(gaps, device, size)
    y, grad = randn(dense.capacity, 5, device=device).requires_grad_(), randn(ROWS * size, 5, device=device, seed=1)
    out, grad_y = with_gradients(bk.patch_unpool(y, dense, ids), [y], grad)
    wide = scattered(y.detach(), slot, padded.capacity, torch.nan).requires_grad_()
    expected = [out, scattered(grad_y, slot, padded.capacity, 0)]
    assert_equal(with_gradients(bk.patch_unpool(wide, padded, ids), [wide], grad), expected)


@SIZES
@pytest.mark.parametrize(("gaps", "window"), [(False, None), (True, None), (False, 3)])
@DIRECTIONS
def test_patch_cross_attention_of_slots(direction: str, gaps: bool, window: int | None, size: int, device: str) -> None:
    """Windows count patches, so behind the others empty slots change nothing; empty slots may hold anything."""
    dense, padded, slot = both_layouts(gaps, device, size)
    rows, encode, options = 2, direction == "encode", {"direction": direction, "window": window}
    vectors = (slot[:, None] * rows + torch.arange(rows, device=device)).flatten()

    def call(layout: PatchLayout, *tensors: Tensor) -> Tensor:
        return bk.patch_cross_attention(*tensors, layout, queries_per_patch=rows, **options)

    sizes = (dense.capacity * rows, ROWS * size, ROWS * size)
    sizes = sizes if encode else (sizes[1], sizes[0], sizes[0])
    leaves = [randn(n, 2, 8, device=device, seed=i).requires_grad_() for i, n in enumerate(sizes)]
    grad = randn(sizes[0], 2, 8, device=device, seed=4)
    on_patches = [encode, not encode, not encode]

    def spread(x: Tensor, chosen: bool, fill: float) -> Tensor:
        return scattered(x.detach(), vectors, padded.capacity * rows, fill) if chosen else x

    expected = with_gradients(call(dense, *leaves), leaves, grad)
    # An empty slot's own query reads the bytes of its window; without one it attends to nothing.
    fill = torch.nan if not encode or window is None else 0.0
    wide = [spread(x, chosen, fill).detach().requires_grad_() for x, chosen in zip(leaves, on_patches, strict=True)]
    results = with_gradients(call(padded, *wide), wide, spread(grad, encode, 0.0))
    if encode and window is not None:
        results[0], results[1] = (spread(x[vectors], True, 0) for x in results[:2])
    kinds = [encode, *on_patches]
    assert_equal(results, [spread(x, chosen, 0.0) for x, chosen in zip(expected, kinds, strict=True)])


@DIRECTIONS
def test_windows_over_long_patches_and_gaps_against_the_reference(direction: str, device: str) -> None:
    _dense, padded, _slot = both_layouts(True, device, 700)
    sizes = (padded.capacity, padded.num_bytes)[:: 1 if direction == "encode" else -1]
    leaves = [randn(n, 1, 4, device=device, seed=i) for i, n in enumerate((*sizes, sizes[1]))]
    grad = randn(sizes[0], 1, 4, device=device, seed=4)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
        out = function(*own, padded, direction=direction, queries_per_patch=1, window=4)
        return with_gradients(out, own, grad.to(dtype))

    eager, truth = (run(patch_cross_attention_reference, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(run(bk.patch_cross_attention, torch.float32), eager, truth)


def test_a_window_counts_empty_slots(device: str) -> None:
    """Slot 2 is two patches behind slot 0, which only a window of 3 holds, also where slot 1 is empty."""
    ids = torch.tensor([[0, 0, 2]], device=device)
    layout = PatchLayout.from_ids(ids, ids, 4)
    byte = torch.tensor([3.0, 5.0, 13.0], device=device)[:, None, None].expand(3, 1, 4)
    patch = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device)[:, None, None].expand(4, 1, 4)
    encoded = {1: [4, 0, 13, 0], 2: [4, 4, 13, 13], 3: [4, 4, 7, 13], None: [4, 0, 13, 0]}
    decoded = {1: [1, 1, 4], 2: [1, 1, 3], 3: [1, 1, 7 / 3], None: [1, 1, 4]}
    for direction, zeros, values, expected in (
        ("encode", torch.zeros_like(patch), byte, encoded),
        ("decode", torch.zeros_like(byte), patch, decoded),
    ):
        for window, means in expected.items():  # scores are equal, so that the output is a mean
            keys = torch.zeros_like(values)
            out = bk.patch_cross_attention(
                zeros, keys, values, layout, direction=direction, queries_per_patch=1, window=window
            )
            torch.testing.assert_close(out[:, 0, 0], torch.tensor(means, dtype=torch.float32, device=device))


def test_a_model_takes_slots() -> None:
    dense, padded, _slot = both_layouts(False, "cpu")
    torch.manual_seed(0)
    model, tokens = BLT(BLTConfig.small()).double(), torch.arange(ROWS * 40).view(ROWS, 40) % 200 + 4
    with torch.no_grad():
        logits = [model(tokens, layout=layout) for layout in (dense, padded)]
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
