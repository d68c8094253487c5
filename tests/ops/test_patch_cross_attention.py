"""patch_cross_attention: who reads whom by hand, against a mask, empty patches, poison, tiles, argument errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import backends
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_calls import LargestTensor
from torch import Tensor

from blt_kernels import PatchLayout, patch_cross_attention
from blt_kernels.reference import patch_cross_attention as reference
from blt_kernels.testing import assert_close, ragged_layout

NAN = float("nan")
K = 2


def worked_layout(device: str = "cpu") -> PatchLayout:
    """Return documents of 5, 0, 2 and 1 bytes, and one byte beyond; patches 0 | 1 2 | 3 4, 5 6, and 7; room for 6."""
    boundaries = torch.tensor([True, False, True, False, False, False, False, False, True], device=device)
    return PatchLayout.from_cuts(boundaries, torch.tensor([0, 5, 5, 7, 8], dtype=torch.int32, device=device), 6)


def randn(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def inputs(layout: PatchLayout, direction: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return q, k, v and a gradient of the output."""
    sides = [layout.capacity * K, layout.num_bytes]
    queries, keys = sides if direction == "encode" else sides[::-1]
    rows = (queries, keys, keys, queries)
    return [randn(n, 3, 4, seed=i, device=str(layout.device), dtype=dtype) for i, n in enumerate(rows)]


def mask(layout: PatchLayout, direction: str, window: int | None) -> Tensor:
    """Return the dense mask of facebookresearch/blt, within documents: kv_patch <= q_patch < kv_patch + window."""
    byte = torch.arange(layout.num_bytes, device=layout.device)
    patch = torch.arange(layout.capacity, device=layout.device).repeat_interleave(K)
    of_byte = torch.searchsorted(layout.cu_seqlens[1:], byte.int(), right=True)
    of_patch = torch.searchsorted(layout.cu_patches[1:], patch.int(), right=True)
    if direction == "encode":
        q_patch, kv_patch = patch[:, None], layout.patch_ids[None]
        same = (of_patch[:, None] == of_byte) & (layout.patch_ids >= 0)
    else:
        q_patch, kv_patch = layout.decode_ids[:, None], patch[None]
        same = (of_byte[:, None] == of_patch) & (layout.decode_ids >= 0)[:, None]
    return (kv_patch <= q_patch) & (q_patch < kv_patch + (window or 1)) & same


def masked_attention(q: Tensor, k: Tensor, v: Tensor, unmasked: Tensor, scale: float | None = None) -> Tensor:
    scores = torch.einsum("qhe,khe->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = scores.masked_fill(~unmasked, -math.inf).softmax(-1).masked_fill(~unmasked, 0)
    return torch.einsum("hqk,khe->qhe", p, v)


def read_by(layout: PatchLayout, direction: str, **options: Any) -> list[list[int]]:
    """Return the rows of k that each row of q reads: equal scores and one-hot values show them in the output."""
    sides = [layout.capacity * K, layout.num_bytes]
    queries, keys = sides if direction == "encode" else sides[::-1]
    q, k = (torch.zeros(n, 1, keys, device=layout.device) for n in (queries, keys))
    v = torch.eye(keys, device=layout.device)[:, None]
    out = patch_cross_attention(q, k, v, layout, direction=direction, queries_per_patch=K, **options)
    read = [row.nonzero().flatten().tolist() for row in out[:, 0]]
    for row, rows in zip(out[:, 0], read, strict=True):
        assert row[rows].tolist() == pytest.approx([1 / len(rows)] * len(rows) if rows else [])
    return read


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (None, [[0], [1, 2], [3, 4], [5, 6], [7], []]),
        (1, [[0], [1, 2], [3, 4], [5, 6], [7], []]),
        (2, [[0], [0, 1, 2], [1, 2, 3, 4], [5, 6], [7], []]),
        (9, [[0], [0, 1, 2], [0, 1, 2, 3, 4], [5, 6], [7], []]),
    ],
)
def test_encode_reads_the_bytes_of_the_patch(window: int | None, expected: list[list[int]], device: str) -> None:
    read = read_by(worked_layout(device), "encode", window=window)
    assert read == [bytes_ for bytes_ in expected for _ in range(K)]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        # Decode ids are 0 0 1 1 1, then -1 for two documents of one patch. Patch p has vectors 2p and 2p + 1.
        (None, [[0, 1], [0, 1], [2, 3], [2, 3], [2, 3], [], [], [], []]),
        (2, [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [], [], [], []]),
        (9, [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [], [], [], []]),
    ],
)
def test_decode_reads_the_vectors_of_the_patch(window: int | None, expected: list[list[int]], device: str) -> None:
    layout = worked_layout(device)
    assert layout.decode_ids.tolist() == [0, 0, 1, 1, 1, -1, -1, -1, -1]
    assert read_by(layout, "decode", window=window) == expected


def test_values_by_hand(device: str) -> None:
    """Patches 0 | 1 2 with weights 1/4 and 3/4 from scores 0 and log 3."""
    layout = PatchLayout.from_lengths(torch.tensor([[1, 2]], device=device))
    on_bytes = torch.tensor([7.0, 0.0, math.log(3)], device=device).view(3, 1, 1)
    values = torch.tensor([4.0, 8.0, 16.0], device=device).view(3, 1, 1)
    ones = torch.ones(2, 1, 1, device=device)
    options = {"direction": "encode", "queries_per_patch": 1}
    out = patch_cross_attention(ones, on_bytes, values, layout, **options)
    assert out.flatten().tolist() == pytest.approx([4, 14])
    assert patch_cross_attention(ones / 2, on_bytes, values, layout, scale=2.0, **options).flatten().tolist() == (
        pytest.approx([4, 14])
    )
    # Bytes 0 and 1 read the K = 2 vectors of patch 0. Byte 2 continues patch 1, so it still reads patch 0.
    vectors = torch.tensor([0.0, math.log(3), 5.0, 5.0], device=device).view(4, 1, 1)
    values = torch.tensor([8.0, 16.0, 1.0, 1.0], device=device).view(4, 1, 1)
    queries = torch.tensor([1.0, 0.0, 2.0], device=device).view(3, 1, 1)
    out = patch_cross_attention(queries, vectors, values, layout, direction="decode", queries_per_patch=2)
    assert out.flatten().tolist() == pytest.approx([14, 12, 15.2])


def padded_layout(device: str) -> PatchLayout:
    """Return 3 rows of 4 patches, as other code bases pad them: empty patches between others and in the place of a row.

    The rows have 5, 0 and 4 bytes, in patches of 1, 0, 4, 0 | 0, 0, 0, 0 | 0, 3, 0, 1.
    """
    lengths = torch.tensor([1, 0, 4, 0, 0, 0, 0, 0, 0, 3, 0, 1])
    decode_ids = torch.tensor([0, 0, 0, 2, 2, -1, 8, 9, 9])
    columns = {
        "patch_offsets": F.pad(lengths.cumsum(0), (1, 0)),
        "cu_patches": torch.tensor([0, 4, 8, 12]),
        "patch_ids": torch.arange(12).repeat_interleave(lengths),
        "decode_ids": decode_ids,
        "decode_offsets": torch.tensor([0, 3, 3, 5, 5, 5, 5, 5, 6, 7, 9, 9, 9]),
        "cu_seqlens": torch.tensor([0, 5, 5, 9]),
    }
    return PatchLayout(**{name: x.int() for name, x in columns.items()}, overflowed=torch.tensor([False])).to(device)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(("window", "heads", "kv_heads"), [(None, 6, 2), (None, 4, 1), (3, 6, 3), (2, 4, 4)])
def test_grouped_heads_and_empty_patches_anywhere(
    direction: str, window: int | None, heads: int, kv_heads: int, device: str
) -> None:
    """Query head h reads head h // (H / G), forward and backward; rows of empty patches give 0, whatever they hold."""
    layout = padded_layout(device)
    *leaves, grad = arguments(layout, direction, K, heads, 4, kv_heads=kv_heads)[0]
    unmasked = mask(layout, direction, window)
    reads, read = unmasked.any(1), unmasked.any(0)
    for x, rows in zip((*leaves, grad), (reads, read, read, reads), strict=True):
        x[~rows] = NAN
    for x in leaves:
        x.requires_grad_()
    out = patch_cross_attention(*leaves, layout, direction=direction, queries_per_patch=K, window=window)
    q, k, v = (x.where(rows[:, None, None], 0) for x, rows in zip(leaves, (reads, read, read), strict=True))
    repeated = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    expected = masked_attention(q, *repeated, unmasked)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(expected, leaves, grad.where(reads[:, None, None], 0))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@given(data=st.data())
def test_any_layout_against_a_mask(device: str, data: st.DataObject) -> None:
    num_bytes, seed = data.draw(st.integers(0, 80)), data.draw(st.integers(0, 1000))
    direction = data.draw(st.sampled_from(["encode", "decode"]))
    window, scale = data.draw(st.none() | st.integers(1, 6)), data.draw(st.none() | st.floats(0.1, 2))
    room = data.draw(st.sampled_from([None, 8 + num_bytes // 20]))
    layout = ragged_layout(num_bytes, seed, max_patches=room, device=device)
    *leaves, grad = inputs(layout, direction)
    for x in leaves:
        x.requires_grad_()
    options = {"direction": direction, "queries_per_patch": K, "window": window, "scale": scale}
    out = patch_cross_attention(*leaves, layout, **options)
    expected = masked_attention(*leaves, mask(layout, direction, window), scale)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("num_bytes", [0, 1, 2, 3])
def test_short_documents(direction: str, num_bytes: int, device: str) -> None:
    boundaries = torch.ones(num_bytes, dtype=torch.bool, device=device)
    for offsets in ([0, num_bytes], [0, 0, num_bytes], [0]):
        for room in (len(offsets) - 1, num_bytes + 2):
            cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
            layout = PatchLayout.from_cuts(boundaries, cu_seqlens, room)
            for window in (None, 2):
                *leaves, grad = inputs(layout, direction)
                for x in leaves:
                    x.requires_grad_()
                out = patch_cross_attention(*leaves, layout, direction=direction, queries_per_patch=K, window=window)
                unmasked = mask(layout, direction, window)
                expected = masked_attention(*leaves, unmasked) if unmasked.numel() else torch.zeros_like(out)
                torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
                assert all(g.isfinite().all() for g in torch.autograd.grad(out, leaves, grad))


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("window", [None, 2])
def test_nobody_reads_rows_without_a_partner(direction: str, window: int | None, device: str) -> None:
    """Bytes beyond the documents, patches beyond P, and the other side's gradients for them."""
    layout = worked_layout(device)
    results = []
    for poison in (0.0, NAN):
        q, k, v, grad = inputs(layout, direction)
        on_bytes, on_patches = ((k, v), (q, grad)) if direction == "encode" else ((q, grad), (k, v))
        for x in on_bytes:
            x[8:] = poison
        for x in on_patches:
            x[5 * K :] = poison
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = patch_cross_attention(*leaves, layout, direction=direction, queries_per_patch=K, window=window)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
        for x, first in zip(results[-1], (q, q, k, v), strict=True):
            assert not x[(5 * K if first.shape[0] == layout.capacity * K else 8) :].any()
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_torch_attention(direction: str, dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients are as close to fp64 as those of `scaled_dot_product_attention` with a mask."""
    # A row that attends to nothing would become NaN, so each gets a key.
    layout = PatchLayout.from_lengths(torch.tensor([[1, 3, 5, 2, 9], [1, 1, 8, 4, 6]], device=device))
    *leaves, grad = inputs(layout, direction, dtype)
    unmasked = mask(layout, direction, 2)
    assert unmasked.any(1).all()

    def plain(*x: Tensor) -> Tensor:
        q, k, v = (y.transpose(0, 1) for y in x)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=unmasked).transpose(0, 1)

    def ours(*x: Tensor) -> Tensor:
        return patch_cross_attention(*x, layout, direction=direction, queries_per_patch=K, window=2)

    results = []
    for function, cast in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
        own = [x.to(cast).requires_grad_() for x in leaves]
        out = function(*own)
        results.append([out.detach(), *torch.autograd.grad(out, own, grad.to(cast))])
    for name, *values in zip(("out", "grad_q", "grad_k", "grad_v"), *results, strict=True):
        assert_close(*values, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_alike_keys_of_huge_scores_weigh_the_same(
    direction: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """The average of values of 1 is 1, however the product with 1 / sqrt(128) is rounded; gradients are finite."""
    layout = worked_layout(device)
    q, k, v, grad = (x[:, :1, :1].expand(-1, 1, 128).to(dtype) for x in inputs(layout, direction))
    q, k, v = (torch.full_like(x, number).requires_grad_() for x, number in ((q, 133120), (k, 133120), (v, 1)))
    out = patch_cross_attention(q, k, v, layout, direction=direction, queries_per_patch=K, window=3)
    assert set(out.flatten().tolist()) == {0.0, 1.0}
    grads = torch.autograd.grad(out, (q, k, v), grad.contiguous())
    assert all(x.isfinite().all() for x in grads)
    if backend != "cpu":  # its weights come from lse, whose rounding they do not survive
        reads = (out[:, :1, :1] != 0).to(dtype)
        torch.testing.assert_close(grads[2].sum(0), (grad * reads).sum(0), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_padded_is_packed(direction: str, device: str) -> None:
    layout = PatchLayout.from_lengths(torch.tensor([[1, 4], [2, 3]], device=device))
    q, k, v, _ = inputs(layout, direction)
    options = {"direction": direction, "queries_per_patch": K}
    padded = [x.view(2, 5, 3, 4) if x.shape[0] == 10 else x for x in (q, k, v)]
    for function in (patch_cross_attention, reference.patch_cross_attention_reference):
        out = function(*padded, layout, **options)
        assert out.shape == padded[0].shape
        assert torch.equal(out.view_as(q), function(q, k, v, layout, **options))


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("window", [None, 3])
def test_backward_against_autograd_of_the_reference(direction: str, window: int | None, device: str) -> None:
    layout = ragged_layout(30, 5, max_patches=16, device=device)
    *leaves, grad = inputs(layout, direction)
    for x in leaves:
        x.requires_grad_()
    options = {"direction": direction, "queries_per_patch": K, "window": window}
    out = patch_cross_attention(*leaves, layout, **options)
    expected = reference.patch_cross_attention_reference(*leaves, layout, **options)
    ours, theirs = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *x: patch_cross_attention(*x, layout, **options), leaves, fast_mode=True)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_reference_makes_no_matrix_of_bytes_and_patches(direction: str) -> None:
    layout = ragged_layout(3000)
    *leaves, _ = inputs(layout, direction)
    with LargestTensor() as largest:
        reference.patch_cross_attention_reference(*leaves, layout, direction=direction, queries_per_patch=K, window=2)
    assert largest.numel <= 3001 * K * 3 * 4


def test_autocast_is_that_of_torch_attention(device: str) -> None:
    layout = ragged_layout(20, device=device)
    q, k, v, grad = inputs(layout, "encode", torch.float32)
    options = {"direction": "encode", "queries_per_patch": K}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.autocast(device, torch.bfloat16):
        out = patch_cross_attention(q, k.bfloat16(), v, layout, **options)
        grads = torch.autograd.grad(out, leaves, grad.bfloat16())
        double = patch_cross_attention(q.double(), k.double(), v.double(), layout, **options)
    assert out.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    assert all(g.dtype == torch.float32 for g in grads)
    assert torch.equal(out, patch_cross_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout, **options))


# --- tiles, threads, raw operators ------------------------------------------------------------------------------------


def long_layout(device: str = "cpu") -> PatchLayout:
    """Return patches of 1, 270, 16, 17, 130, 3 and 33 bytes in documents of 271, 33 and 166; 4 beyond, room for 9."""
    starts = [0, 1, 271, 287, 304, 434, 437]
    boundaries = torch.zeros(474, dtype=torch.bool)
    boundaries[[s - 1 for s in starts[1:]]] = True  # a boundary is the byte before a start
    offsets = torch.tensor([0, 271, 304, 470], dtype=torch.int32)
    layout = PatchLayout.from_cuts(boundaries.to(device), offsets.to(device), 9)
    assert layout.patch_offsets.tolist() == [*starts, 470, 470, 470]
    return layout


def arguments(
    layout: PatchLayout,
    direction: str,
    vectors: int,
    heads: int,
    width: int,
    window: int | None = None,
    kv_heads: int | None = None,
) -> tuple[list[Tensor], list[Any]]:
    """Return q, k, v and a gradient in fp64, and what the raw operators take after them."""
    sides = [layout.capacity * vectors, layout.num_bytes]
    queries, keys = sides if direction == "encode" else sides[::-1]
    rows = (queries, keys, keys, queries)
    of_tensors = (heads, kv_heads or heads, kv_heads or heads, heads)
    tensors = [
        randn(n, h, width, seed=i, device=str(layout.device))
        for i, (n, h) in enumerate(zip(rows, of_tensors, strict=True))
    ]
    encode = direction == "encode"
    offsets, ids = (layout.patch_offsets, layout.patch_ids) if encode else (layout.decode_offsets, layout.decode_ids)
    return tensors, [offsets, layout.cu_patches, ids, direction, vectors, window, None]


def run_raw(tensors: list[Tensor], rest: list[Any]) -> list[Tensor]:
    """Return out, lse and the three gradients, from the raw operators."""
    q, k, v, grad = tensors
    out, lse = torch.ops.blt_kernels.patch_cross_attention_fwd(q, k, v, *rest)
    return [out, lse, *torch.ops.blt_kernels.patch_cross_attention_bwd(grad, q, k, v, out, lse, *rest)]


def run_reference(tensors: list[Tensor], rest: list[Any]) -> list[Tensor]:
    q, k, v, grad = tensors
    out, lse = reference.patch_cross_attention_fwd_reference(q, k, v, *rest)
    return [out, lse, *reference.patch_cross_attention_bwd_reference(grad, q, k, v, out, lse, *rest)]


def check_raw(tensors: list[Tensor], rest: list[Any]) -> None:
    names, results = ("out", "lse", "grad_q", "grad_k", "grad_v"), run_raw(tensors, rest)
    expected, exact = run_reference(tensors, rest), run_reference([x.double() for x in tensors], rest)
    for name, *values in zip(names, results, expected, exact, strict=True):
        if tensors[0].dtype == torch.float64:
            torch.testing.assert_close(
                *values[:2], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert_close(*values, name=name)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("window", [None, 2, 1000])
@pytest.mark.parametrize("vectors", [1, 2, 9, 15, 16, 17, 33])
def test_patches_and_windows_longer_than_a_tile(
    direction: str, window: int | None, vectors: int, backend: str, device: str
) -> None:
    """A tile holds 16 rows by 16, or more of one side where there are fewer of the other."""
    if backend == "emulated" and vectors > 9:
        pytest.skip("tiles of the CPU kernels; those for CUDA take 4 vectors at a time, and 9 are slow enough here")
    tensors, rest = arguments(long_layout(device), direction, vectors, 2, 3, window)
    check_raw(tensors, rest)
    check_raw([x.half() for x in tensors], rest)  # sums that more than one tile adds to stay in fp32


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (1, 64), (5, 33), (16, 31), (17, 8), (33, 96)])
def test_heads_and_widths_that_fill_no_vector(
    direction: str, dtype: torch.dtype, heads: int, width: int, device: str
) -> None:
    tensors, rest = arguments(ragged_layout(60, 4, max_patches=40, device=device), direction, 3, heads, width)
    check_raw([x.to(dtype) for x in tensors], rest)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(("window", "divided"), [(None, False), (3, False), (None, True)])
def test_bitwise_the_same_with_more_threads(direction: str, window: int | None, divided: bool) -> None:
    """Enough work to be shared, in documents and patches of very different lengths."""
    layout = one_patch(2500) if divided else ragged_layout(2500, 3)
    tensors, rest = arguments(layout, direction, 2, 4, 64, window)
    tensors = [x.float() for x in tensors]
    alone = run_raw(tensors, rest)
    torch.set_num_threads(2)
    assert all(torch.equal(*pair) for pair in zip(alone, run_raw(tensors, rest), strict=True))


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "vectors", "kv_heads"), [(1, 2, 1), (2, 2, 2), (3, 17, 2), (8, 1, 1), (64, 2, 2)])
def test_long_patches_in_windows(direction: str, dtype: torch.dtype, window: int, vectors: int, kv_heads: int) -> None:
    """Parts of long patches, with empty patches and unread bytes between them, are the same on 1, 2 and 3 threads."""
    documents = [[1, 0, 300, 0, 0, 2], [], [700], [0, 5, 1500, 1, 0, 260], [3, 0]]
    lengths = torch.tensor([length for document in documents for length in document] + [0])
    offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
    cu_patches = torch.tensor([0, *map(len, documents)]).cumsum(0).int()
    ids = F.pad(torch.arange(len(lengths)).repeat_interleave(lengths), (0, 9), value=-1).int()
    if direction == "decode":
        ids[offsets[6] - 2 : offsets[6]] = ids[offsets[7] - 500 : offsets[7]] = -1
    sides = [len(lengths) * vectors, len(ids)]
    queries, keys = sides if direction == "encode" else sides[::-1]
    shapes = [(queries, 2, 8), (keys, kv_heads, 8), (keys, kv_heads, 8), (queries, 2, 8)]
    tensors = [randn(*shape, seed=i + 4, dtype=dtype) for i, shape in enumerate(shapes)]
    rest = [offsets, cu_patches, ids, direction, vectors, window, None]
    check_raw(tensors, rest)
    alone = run_raw(tensors, rest)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(*pair) for pair in zip(alone, run_raw(tensors, rest), strict=True))


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, lambda x: x + 1, "offsets|ids"),  # readers may begin at a later byte
        (0, lambda x: x.flip(0), "offsets"),
        (0, lambda x: x * 2, "offsets"),
        (0, lambda x: x[:-1], "rows|cu_patches"),
        (
            0,
            lambda x: x.clone().index_fill_(0, torch.tensor([x.numel() - 1]), 474),
            "ids",
        ),  # the last patch is not empty
        (1, lambda x: x + 1, "cu_patches"),
        (1, lambda x: x * 2, "cu_patches"),
        (1, lambda x: x[:-1], "ids"),
        (2, lambda x: x + 1, "ids"),
        (2, lambda x: x.flip(0), "ids"),
        (2, lambda x: x[:-1], "ids"),
        (2, lambda x: torch.full_like(x, 2**31 - 1), "ids"),
        (2, lambda x: x.long(), "ids"),
        (3, lambda _: "up", "direction"),
        (4, lambda _: 0, "queries_per_patch"),
        (4, lambda _: 2**62, "rows"),
        (5, lambda _: 0, "window"),
    ],
)
def test_a_raw_operator_refuses_what_does_not_fit_together(
    direction: str, position: int, bad: Callable[[Any], Any], message: str
) -> None:
    """Nothing is read or written by offsets and ids that have not been checked."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("blt_kernels::patch_cross_attention_fwd", "CPU"):
        pytest.skip("no compiled kernel")
    tensors, rest = arguments(long_layout(), direction, 2, 1, 4)
    good = run_raw(tensors, rest)
    rest[position] = bad(rest[position])
    q, k, v, grad = tensors
    with pytest.raises(RuntimeError, match=message):
        torch.ops.blt_kernels.patch_cross_attention_fwd(q, k, v, *rest)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.blt_kernels.patch_cross_attention_bwd(grad, q, k, v, *good[:2], *rest)


# --- the CUDA kernels -------------------------------------------------------------------------------------------------


def test_rows_in_vectors(device: str) -> None:
    """Widths that 4 to 32 lanes share, and numbers of vectors that registers hold and do not hold."""
    layout = ragged_layout(30, 6, max_patches=24, device=device)
    shapes = [(1, 32, 3), (2, 64, 5), (3, 64, 2), (4, 80, 3), (5, 128, 2), (2, 256, 1), (1, 200, 3)]
    for direction in ("encode", "decode"):
        for dtype in (torch.bfloat16, torch.float32):
            for vectors, width, heads in shapes:
                tensors, rest = arguments(layout, direction, vectors, heads, width, 2 if width == 80 else None)
                check_raw([x.to(dtype) for x in tensors], rest)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_rows_in_any_place(direction: str, device: str) -> None:
    """Heads before rows, rows and heads with gaps, no unit stride, rows at addresses of odd numbers; all the same."""
    places: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: F.pad(x, (8, 24, 1, 1, 2, 0))[2:, 1:-1, 8:-24],
        lambda x: F.pad(x, (1, 0))[..., 1:],
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        lambda x: F.pad(x.flatten(), (3, 0))[3:].view_as(x),
    ]
    tensors, rest = arguments(ragged_layout(30, 6, max_patches=24, device=device), direction, 2, 3, 64)
    tensors = [x.float() for x in tensors]
    for place in places:
        moved = [place(x) for x in tensors]
        assert all(torch.equal(*pair) for pair in zip(moved, tensors, strict=True))
        check_raw(moved, rest)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(
    ("dtype", "vectors", "window", "kv_heads", "bound"),
    [
        (torch.bfloat16, 2, None, 16, 1.1),
        (torch.float32, 2, None, 16, 1.1),
        (torch.bfloat16, 2, 2, 16, 1.1),
        (torch.bfloat16, 2, 4, 16, 1.2),  # a block of 16 patches also reads 3 on either side that its neighbours own
        (torch.bfloat16, 4, None, 16, 1.1),
        (torch.bfloat16, 2, None, 4, 1.1),
    ],
)
def test_traffic(
    direction: str, dtype: torch.dtype, vectors: int, window: int | None, kv_heads: int, bound: float
) -> None:
    """Every tensor is read or written once, but backward does not read `out`. There are 16 heads of 64."""
    layout = ragged_layout(600, 2).compact()
    tensors, rest = arguments(layout, direction, vectors, 16, 64, window, kv_heads)
    q, k, v, grad = (x.to(dtype) for x in tensors)
    raw = torch.ops.blt_kernels
    out, lse = raw.patch_cross_attention_fwd(q, k, v, *rest)
    size = {"q": q.nbytes, "k": k.nbytes, "v": v.nbytes, "lse": lse.nbytes}
    forward = 2 * size["q"] + size["k"] + size["v"] + size["lse"]
    backward = 3 * size["q"] + 2 * size["k"] + 2 * size["v"] + size["lse"]
    for minimum, run in (
        (forward, lambda: raw.patch_cross_attention_fwd(q, k, v, *rest)),
        (backward, lambda: raw.patch_cross_attention_bwd(grad, q, k, v, out, lse, *rest)),
    ):
        assert 0.9 * minimum <= backends.traffic(run) <= bound * minimum, backends.traffic(run) / minimum


@pytest.mark.parametrize(
    ("num_bytes", "direction", "vectors", "window", "kv_heads", "expected"),
    [
        (40, "encode", 1, None, 2, ["fwd_queries", "bwd_queries"]),
        (40, "encode", 2, None, 2, ["fwd_queries", "bwd_queries"]),
        (40, "encode", 2, None, 1, ["fwd_queries", "bwd_both"]),
        (40, "encode", 3, None, 2, ["fwd_queries", "bwd_both"]),
        (40, "decode", 1, None, 2, ["fwd_keys", "bwd_keys"]),
        (40, "decode", 2, None, 1, ["fwd_keys", "bwd_keys"]),
        (40, "decode", 3, None, 2, ["fwd_queries", "bwd_both"]),
        (80, "encode", 2, 3, 2, ["fwd_queries", "sum", "bwd_both", "sum"]),
        (80, "decode", 2, 16, 2, ["fwd_queries", "bwd_both", "sum", "sum"]),
        (80, "decode", 2, 17, 2, ["fwd_queries", "bwd_both"]),
        (80, "encode", 2, 18, 2, ["fwd_queries", "bwd_both", "bwd_both"]),
        (80, "encode", 2, None, 2, ["fwd_queries", "sum", "bwd_queries", "sum"]),
        (80, "decode", 2, None, 2, ["fwd_keys", "bwd_keys", "sum", "sum"]),
    ],
)
def test_launches(
    num_bytes: int, direction: str, vectors: int, window: int | None, kv_heads: int, expected: list[str]
) -> None:
    """A patch of 64 bytes or more may be divided, from a window of 17 on of 128; from 18 on each pass has a launch."""
    tensors, rest = arguments(ragged_layout(num_bytes, 2), direction, vectors, 2, 64, window, kv_heads)
    launches = backends.launches(lambda: run_raw([x.float() for x in tensors], rest))
    kernels = [launch.kernel.split("<")[0].removeprefix("blt::patch_cross_attention_") for launch in launches]
    assert kernels == [f"{name}_kernel" for name in expected]


def one_patch(num_bytes: int) -> PatchLayout:
    """Return patches of 1 and `num_bytes` - 1 bytes: all but a byte read the first one, or are read by the second."""
    return PatchLayout.from_lengths(torch.tensor([[1, num_bytes - 1]]))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("window", [None, 2])
def test_no_thread_walks_a_long_patch_alone(direction: str, window: int | None) -> None:
    """The longest chain of accesses of a thread is as long for four times the bytes: that of kRun parts of 64.

    Only that of the sums of parts grows, by less than one access a part: to 1M bytes it is no longer than a few units.
    """
    units, sums = [], []
    for num_bytes in (2048, 8192):
        tensors, rest = arguments(one_patch(num_bytes), direction, 2, 1, 64, window)
        tensors = [x.bfloat16() for x in tensors]
        launches = backends.launches(lambda: run_raw(tensors, rest))  # noqa: B023
        units.append([launch.longest for launch in launches if "sum" not in launch.kernel])
        sums.append(max(launch.longest for launch in launches if "sum" in launch.kernel))
    assert units[0] == units[1]
    assert sums[1] < max(units[1]) < 10000
    assert (sums[1] - sums[0]) / ((8192 - 2048) / 64) < 1


@pytest.mark.slow
def test_no_thread_walks_a_long_patch_alone_with_a_large_window() -> None:
    """Parts have 128 bytes with a window of 17. The longest chain is that of a part, however long the patch is."""
    longest = []
    for num_bytes in (1200, 2400):
        layout = PatchLayout.from_lengths(torch.tensor([[*[1] * 20, num_bytes]]))
        tensors, rest = arguments(layout, "encode", 2, 1, 8, 17)
        launches = backends.launches(lambda: run_raw([x.bfloat16() for x in tensors], rest))  # noqa: B023
        longest.append([launch.longest for launch in launches if "sum" not in launch.kernel])
    assert longest[0] == longest[1]


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(
    ("dtype", "vectors", "window", "heads", "kv_heads"),
    [
        (torch.bfloat16, 2, None, 2, 2),
        (torch.float32, 3, None, 4, 2),
        (torch.bfloat16, 2, 2, 2, 2),
        (torch.float32, 3, 3, 4, 2),
        (torch.float32, 1, 17, 2, 2),  # parts have 128 bytes on CUDA
    ],
)
def test_divided_patches(
    direction: str,
    dtype: torch.dtype,
    vectors: int,
    window: int | None,
    heads: int,
    kv_heads: int,
    device: str,
) -> None:
    """Long patches beside short ones, empty ones, documents whose first patch has no reader, and bytes beyond."""
    documents = [[1, 127, 1, 300], [], [400], [2, 63, 257, 65], [64, 64, 128, 3]]
    num_bytes = sum(map(sum, documents))
    ends = torch.tensor([length for lengths in documents for length in lengths]).cumsum(0)
    boundaries = torch.zeros(num_bytes + 70, dtype=torch.bool).index_fill(0, ends - 1, True)
    cu_seqlens = torch.tensor([0, *(sum(x) for x in documents)], dtype=torch.int32).cumsum(0).int()
    layout = PatchLayout.from_cuts(boundaries.to(device), cu_seqlens.to(device), 20)
    assert layout.patch_offsets[1 : len(ends) + 1].tolist() == ends.tolist()
    tensors, rest = arguments(layout, direction, vectors, heads, 64, window, kv_heads)
    check_raw([x.to(dtype) for x in tensors], rest)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(("vectors", "window", "kv_heads"), [(1, None, 4), (2, None, 4), (3, 2, 4), (2, None, 2)])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_values(
    direction: str, vectors: int, window: int | None, kv_heads: int, value: float, device: str
) -> None:
    """Infinities and NaN of the gradients are where those of the reference are, with their signs."""
    layout = PatchLayout.from_lengths(torch.tensor([[9, 3, 26, 2]])).to(device)
    sides = [layout.capacity * vectors, layout.num_bytes]
    queries, keys = sides if direction == "encode" else sides[::-1]
    rows = ((queries, 4), (keys, kv_heads), (keys, kv_heads), (queries, 4))
    q, k, v, grad = (randn(n, h, 8, seed=i, device=device, dtype=torch.float32) for i, (n, h) in enumerate(rows))
    v[1, :, 0] = value
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"direction": direction, "queries_per_patch": vectors, "window": window}
    ours, theirs = (
        torch.autograd.grad(attend(*leaves, layout, **options), leaves, grad)
        for attend in (patch_cross_attention, reference.patch_cross_attention_reference)
    )
    for name, own, other in zip("qkv", ours, theirs, strict=True):
        for what in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(what(own), what(other)), f"{what.__name__} of the gradient of {name}"


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(("vectors", "window"), [(2, None), (5, None), (2, 3)])
def test_the_order_of_threads_does_not_matter(direction: str, vectors: int, window: int | None) -> None:
    tensors, rest = arguments(ragged_layout(60, 5, max_patches=50), direction, vectors, 5, 64, window)
    tensors = [x.bfloat16() for x in tensors]
    results = []
    with backends.use("emulated"):
        for name in ("FORWARD", "BACKWARD", "RANDOM"):
            with backends.order(name, seed=7):
                results.append(run_raw(tensors, rest))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("window", [None, 3])
def test_offsets_and_ids_of_any_value_stay_inside(direction: str, window: int | None) -> None:
    """CUDA kernels cannot check them first; the emulator would refuse an access outside of the tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors, rest = arguments(ragged_layout(40, 2, max_patches=30), direction, 2, 2, 8, window)
    for bound in (60, 2**31 - 1):
        with backends.use("emulated"):
            for position in (0, 1, 2, (0, 1, 2)):
                broken = list(rest)
                for at in position if isinstance(position, tuple) else (position,):
                    broken[at] = torch.randint(-bound, bound, rest[at].shape, generator=generator, dtype=torch.int32)
                results = run_raw(tensors, broken)
                assert [x.shape[0] for x in results] == [tensors[i].shape[0] for i in (0, 0, 0, 1, 2)]


def test_cuda_takes_heads_of_at_most_256_numbers() -> None:
    tensors, rest = arguments(ragged_layout(10), "encode", 1, 1, 257)
    with backends.use("emulated"), pytest.raises(RuntimeError, match="q: expected heads of at most 256 numbers"):
        run_raw(tensors, rest)


# --- argument errors --------------------------------------------------------------------------------------------------

ENCODE = {"q": torch.zeros(40, 3, 4), "k": torch.zeros(20, 3, 4), "v": torch.zeros(20, 3, 4), "direction": "encode"}
DECODE = {"q": torch.zeros(20, 3, 4), "k": torch.zeros(40, 3, 4), "v": torch.zeros(40, 3, 4), "direction": "decode"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"direction": "up"}, ValueError, "direction: expected one of 'encode', 'decode', got 'up'"),
        ({"queries_per_patch": 0}, ValueError, "queries_per_patch: expected a value >= 1, got 0"),
        ({"queries_per_patch": 2.0}, TypeError, "queries_per_patch: expected an int, got 2.0"),
        ({"q": 1}, TypeError, "q: expected a tensor, got int"),
        ({"k": torch.zeros(20, 3, 4).int()}, TypeError, "k: expected dtype in float32.*got torch.int32"),
        ({"k": torch.zeros(20, 3, 4).half()}, TypeError, "k: expected dtype torch.float32 of q, got torch.float16"),
        ({"v": torch.zeros(20, 3, 4, device="meta")}, ValueError, "v: expected device cpu of q, got meta"),
        ({"q": torch.zeros(2, 21, 3, 4)}, ValueError, r"q: expected shape \[C \* K = 20 .* got \[2, 21, 3, 4\]"),
        ({**DECODE, "k": torch.zeros(2, 21, 3, 4)}, ValueError, r"k: expected shape \[C .* got \[2, 21, 3, 4\]"),
        ({"k": torch.zeros(20, 12)}, ValueError, r"k: expected 3 or 4 dimensions, got shape \[20, 12\]"),
        ({"q": torch.zeros(40, 3, 0)}, ValueError, "q: expected at least one head, of a width of at least 1, got"),
        (
            {"q": torch.zeros(20, 3, 4)},
            ValueError,
            r"q: expected shape \[C \* K = 20 \* 2, H = 3, E = 4\] to encode, got \[20, 3, 4\]",
        ),
        (
            {"k": torch.zeros(20, 1, 4)},
            ValueError,
            r"v: expected shape \[T = 20, G = 1, E = 4\] to encode, got \[20, 3, 4\]",
        ),
        ({"k": torch.zeros(20, 2, 4)}, ValueError, "k: expected a number of heads G that divides H = 3, got 2"),
        ({"k": torch.zeros(20, 0, 4)}, ValueError, "k: expected a number of heads G that divides H = 3, got 0"),
        ({"v": torch.zeros(3, 7, 3, 4)}, ValueError, r"v: expected shape \[T = 20, .* to encode, got \[3, 7, 3, 4\]"),
        ({**DECODE, "q": torch.zeros(40, 3, 4)}, ValueError, r"q: expected shape \[T = 20, .* to decode, got \[40"),
        (
            {**DECODE, "v": torch.zeros(40, 3, 5)},
            ValueError,
            r"v: expected shape \[C \* K = 20 \* 2, .* got \[40, 3, 5",
        ),
        ({"layout": (1, 2)}, TypeError, "layout: expected a PatchLayout, got tuple"),
        ({"layout": ragged_layout(20).to("meta")}, ValueError, "layout: expected device cpu of q, got meta"),
        ({"window": 0}, ValueError, "window: expected a value >= 1, got 0"),
        ({"window": "2"}, TypeError, "window: expected an int, got '2'"),
        ({"scale": True}, TypeError, "scale: expected a number, got True"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch_cross_attention(**{**ENCODE, "layout": ragged_layout(20), "queries_per_patch": K, **change})
