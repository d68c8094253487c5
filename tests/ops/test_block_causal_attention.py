"""block_causal_attention: who sees whom by hand, against plain attention, caches, poison, autocast, argument errors."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import inputs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_calls import LargestTensor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from blt_kernels import AttentionRanges, _extension, attention_ranges, block_causal_attention, static_patch
from blt_kernels.models.blt import BLT, LocalEncoder
from blt_kernels.models.byte_lm import ByteLM
from blt_kernels.models.config import BLTConfig, ByteLMConfig, MegaByteConfig
from blt_kernels.models.megabyte import MegaByte
from blt_kernels.nn import TransformerConfig, TransformerLayer, load_ops, rotary_table, row_positions
from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import assert_close, document_lengths, offsets_of

pytestmark = pytest.mark.triton

NAN = float("nan")


def randn(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: list[int],
    cu_k: list[int],
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    used: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One document at a time, with a full matrix of scores."""
    repeat = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=q.dtype, device=q.device)
    for b in range(len(cu_q) - 1):
        rows = slice(cu_q[b], cu_q[b + 1])
        keys = slice(cu_k[b], cu_k[b + 1] if used is None else cu_k[b] + used[b])
        n, m = rows.stop - rows.start, keys.stop - keys.start
        if not n or not m:
            continue
        ahead = torch.arange(m, device=q.device) - torch.arange(n, device=q.device)[:, None] - (m - n)
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if causal:
            seen &= ahead <= 0
        if window is not None:
            seen &= ahead.abs() < window
        scores = torch.einsum("qhe,khe->hqk", q[rows], k[keys].repeat_interleave(repeat, 1))
        scores = (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -math.inf)
        p = scores.softmax(-1).masked_fill(~seen, 0)
        out[rows] = torch.einsum("hqk,khe->qhe", p, v[keys].repeat_interleave(repeat, 1))
        lse[rows] = scores.logsumexp(-1).mT
    return out, lse


# fp64 is exact but takes the reference on a GPU; kernels there take the others.
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def check_close(actual: Tensor, expected: Callable[[torch.dtype], Tensor]) -> None:
    """`actual` is ``expected(fp64)``: to rounding in fp64, else about as closely as `expected` of its own dtype."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected(torch.float64), rtol=1e-11, atol=1e-11)
    else:
        assert_close(actual, expected(actual.dtype), expected(torch.float64))


def check_attention(
    batch: Sequence[dict[str, Any]],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    offsets: Sequence[list[int]],
    *,
    used: list[int] | None = None,
    grad: Tensor | None = None,
) -> None:
    """Of q, k and v rounded to `dtype`, out, lse and, for a `grad` of out, their gradients are those of `oracle`.

    In fp64 to rounding, else about as closely as those of the reference in `dtype`. `offsets` are of queries, and of
    keys if these have their own. Errors for the options in `batch` are judged together: those of few numbers are luck.
    """
    device = tensors[0].device
    cu_seqlens = [torch.tensor(x, device=device) for x in offsets]
    seqused_k = None if used is None else torch.tensor(used, device=device)

    def results(who: str, cast: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
        q, k, v = (x.to(dtype).to(cast).requires_grad_() for x in tensors)
        if who == "oracle":
            out, lse = oracle(q, k, v, offsets[0], offsets[-1], used=used, **options)
        else:
            function = block_causal_attention if who == "op" else reference.block_causal_attention_reference
            out, lse = function(q, k, v, *cu_seqlens, seqused_k=seqused_k, return_lse=True, **options)
        found = {"out": out.detach(), "lse": lse.detach()}
        if grad is None:
            return found
        grads = torch.autograd.grad(out, (q, k, v), grad.to(dtype).to(cast))
        return found | dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))

    actual, eager, truth = (
        [results(who, cast, options) for options in batch]
        for who, cast in (("op", dtype), ("reference", dtype), ("oracle", torch.float64))
    )
    for name in actual[0]:
        values = [[x[name] for x in column] for column in (actual, eager, truth)]
        if dtype == torch.float64:
            torch.testing.assert_close(values[0], values[2], rtol=1e-10, atol=1e-10)
        elif name == "lse":
            torch.testing.assert_close([x.double() for x in values[0]], values[2], rtol=3e-6, atol=3e-5)
        else:
            assert_close(*values, name=name)


def seen_by(device: str, queries: int, keys: int, cu_seqlens_q: Tensor, **options: Any) -> list[list[int]]:
    """The keys that each query sees: with equal scores and one-hot values a row of the output shows them."""
    q, k = torch.zeros(queries, 1, keys, device=device), torch.zeros(keys, 1, keys, device=device)
    v = torch.eye(keys, device=device)[:, None]
    out, lse = block_causal_attention(q, k, v, cu_seqlens_q, return_lse=True, **options)
    seen = [row.nonzero().flatten().tolist() for row in out[:, 0]]
    for row, total, found in zip(out[:, 0], lse[:, 0], seen, strict=True):
        assert row[found].tolist() == pytest.approx([1 / len(found)] * len(found) if found else [])
        assert total.item() == pytest.approx(math.log(len(found)) if found else -math.inf)
    return seen


# --- who sees whom ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], []]),
        ({"window": 1}, [[0], [1], [2], [3], [4], []]),
        ({"window": 2}, [[0], [0, 1], [1, 2], [2, 3], [4], []]),
        ({"window": 9}, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], []]),
        ({"causal": False}, [[0, 1, 2, 3]] * 4 + [[4], []]),
        ({"causal": False, "window": 1}, [[0], [1], [2], [3], [4], []]),
        ({"causal": False, "window": 2}, [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3], [4], []]),
    ],
)
def test_documents_and_windows(options: dict, expected: list[list[int]], device: str) -> None:
    """Documents of 4, 0 and 1 bytes and one byte beyond them. A window counts the query itself."""
    assert seen_by(device, 6, 6, torch.tensor([0, 4, 4, 5], device=device), **options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Documents of 2, 3 and 1 queries and 4, 2 and 0 keys: the last query is aligned with the last key.
        ({}, [[0, 1, 2], [0, 1, 2, 3], [], [4], [4, 5], []]),
        ({"window": 2}, [[1, 2], [2, 3], [], [4], [4, 5], []]),
        ({"causal": False}, [[0, 1, 2, 3]] * 2 + [[4, 5]] * 3 + [[]]),
        ({"causal": False, "window": 2}, [[1, 2, 3], [2, 3], [4], [4, 5], [4, 5], []]),
        ({"used": [3, 1, 0]}, [[0, 1], [0, 1, 2], [], [], [4], []]),
        ({"used": [3, 1, 0], "window": 1}, [[1], [2], [], [], [4], []]),
        ({"used": [0, 2, 0]}, [[], [], [], [4], [4, 5], []]),
    ],
)
def test_alignment_and_used_keys(options: dict, expected: list[list[int]], device: str) -> None:
    used = options.pop("used", None) if "used" in (options := dict(options)) else None
    if used is not None:
        options["seqused_k"] = torch.tensor(used, device=device)
    cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 2, 5, 6], device=device), torch.tensor([0, 4, 6, 6], device=device)
    assert seen_by(device, 6, 7, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options) == expected


def test_values_by_hand(device: str) -> None:
    """Weights 1/4 and 3/4 from scores 0 and log 3; two query heads share a key head."""
    q = torch.tensor([[[0.0], [5.0]], [[1.0], [2.0]]], device=device)  # [2, 2, 1]
    k = torch.tensor([[[0.0]], [[math.log(3)]]], device=device)
    v = torch.tensor([[[8.0]], [[16.0]]], device=device)
    out, lse = block_causal_attention(q, k, v, scale=1.0, return_lse=True)
    torch.testing.assert_close(out[..., 0].cpu(), torch.tensor([[8.0, 8.0], [14.0, 15.2]]))
    torch.testing.assert_close(lse.cpu(), torch.tensor([[0.0, 0.0], [math.log(4), math.log(10)]]))
    half, _ = block_causal_attention(q * 2, k, v, scale=0.5, return_lse=True)
    torch.testing.assert_close(half, out)


@EVERY_DTYPE
@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_short_documents(length: int, dtype: torch.dtype, device: str) -> None:
    *tensors, grad = (randn(length, 8, 40, seed=i, device=device) for i in range(4))
    # One key has a weight of 1, whatever q and k are: their gradients are 0 but for rounding.
    exact = dtype == torch.float64 or length > 1
    for offsets in ([0, length], [0, 0, length, length], [0]):
        if length and len(offsets) > 1:
            check_attention([{}], tensors, dtype, [offsets], grad=grad if exact else None)
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = block_causal_attention(*leaves, torch.tensor(offsets, device=device))
        assert len(offsets) > 1 or not out.any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_no_keys_at_all(device: str) -> None:
    q, k = torch.ones(3, 2, 4, device=device), torch.ones(0, 2, 4, device=device)
    q.requires_grad_()
    cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 3], device=device), torch.tensor([0, 0], device=device)
    out, lse = block_causal_attention(q, k, k, cu_seqlens_q, cu_seqlens_k, return_lse=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


# --- against plain attention ------------------------------------------------------------------------------------------


@given(st.data())
def test_any_documents_against_one_at_a_time(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=5))
    tail = data.draw(st.integers(0, 3))
    options = {
        "window": data.draw(st.none() | st.integers(1, 50)),
        "causal": data.draw(st.booleans()),
        "scale": data.draw(st.none() | st.floats(0.1, 2)),
    }
    groups, repeat = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    key_lengths, used = lengths, None
    if data.draw(st.booleans()):
        key_lengths = [data.draw(st.integers(0, 40)) for _ in lengths]
        used = [data.draw(st.integers(0, n)) for n in key_lengths] if data.draw(st.booleans()) else None
    cu_q, cu_k = offsets_of(lengths), offsets_of(key_lengths)
    rows, keys = int(cu_q[-1]) + tail, int(cu_k[-1]) + tail
    q = randn(rows, groups * repeat, 3, seed=1).requires_grad_()
    k, v = (randn(keys, groups, 3, seed=i).requires_grad_() for i in (2, 3))
    out, lse = block_causal_attention(
        q,
        k,
        v,
        cu_q,
        None if key_lengths is lengths else cu_k,
        **options,
        seqused_k=None if used is None else torch.tensor(used),
        return_lse=True,
    )
    expected, expected_lse = oracle(q, k, v, cu_q.tolist(), cu_k.tolist(), **options, used=used)
    torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=1e-10, atol=1e-10)
    grad = randn(*q.shape, seed=4)
    if expected.requires_grad:
        ours = torch.autograd.grad(out, (q, k, v), grad)
        theirs = torch.autograd.grad(expected, (q, k, v), grad, materialize_grads=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("window", "causal"), [(None, True), (200, True), (None, False), (90, False)])
def test_blocks_of_the_reference(window: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block boundaries are not document boundaries, and change nothing but rounding."""
    lengths = document_lengths(500, 3)
    offsets = offsets_of(lengths).tolist()
    leaves = [randn(500, heads, 6, seed=i).requires_grad_() for i, heads in enumerate((4, 2, 2))]
    expected, expected_lse = oracle(*leaves, offsets, offsets, window, causal)
    grad = randn(500, 4, 6, seed=5)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    for block in (reference._BLOCK, 7, 500, 5000):
        monkeypatch.setattr(reference, "_BLOCK", block)
        arguments = (offsets_of(lengths), None, window, causal, None, None)
        out, lse = reference.block_causal_attention_fwd_reference(*leaves, *arguments)
        torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=1e-10, atol=1e-10)
        by_autograd = torch.autograd.grad(out, leaves, grad)
        plain = [x.detach() for x in (grad, *leaves, out, lse)]
        explicit = reference.block_causal_attention_bwd_reference(*plain, *arguments)
        torch.testing.assert_close(by_autograd, expected_grads, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(explicit, expected_grads, rtol=1e-9, atol=1e-9)


def test_reference_makes_no_square_matrix() -> None:
    length, heads, window = 4096, 2, 64
    q = torch.zeros(length, heads, 8)
    with torch.no_grad(), LargestTensor() as largest:
        out, lse = reference.block_causal_attention_reference(q, q, q, window=window, return_lse=True)
        reference.block_causal_attention_bwd_reference(
            q, q, q, q, out, lse, torch.tensor([0, length]), None, window, True, None, None
        )
    assert largest.numel <= max(length * heads * 8, heads * reference._BLOCK * (reference._BLOCK + window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_error_against_eager_attention(dtype: torch.dtype, window: int | None, device: str) -> None:
    """Outputs and gradients are as close to fp64 as those of matmul, softmax and matmul in the same dtype."""
    offsets = [0, 150, 150, 151, 300]
    q, k, v, grad = (randn(300, heads, 16, seed=i, device=device, dtype=dtype) for i, heads in enumerate((4, 2, 2, 4)))

    def ours(*x: Tensor) -> Tensor:
        return block_causal_attention(*x, torch.tensor(offsets, device=device), window=window)

    def plain(*x: Tensor) -> Tensor:
        return oracle(*x, offsets, offsets, window)[0]

    results = []
    for function, cast in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
        leaves = [x.to(cast).requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(cast))])
    for name, *values in zip(("out", "grad_q", "grad_k", "grad_v"), *results, strict=True):
        assert_close(*values, name=name)


@EVERY_DTYPE
@pytest.mark.parametrize("window", [None, 20])
def test_agrees_with_torch_attention(window: int | None, dtype: torch.dtype, device: str) -> None:
    ahead = torch.arange(50, device=device) - torch.arange(50, device=device)[:, None]
    options = {"attn_mask": (ahead <= 0) & (ahead > -(window or 50)), "enable_gqa": True}
    tensors = [randn(2, 50, heads, 8, seed=i, device=device, dtype=dtype) for i, heads in enumerate((4, 2, 2))]

    def expected(cast: torch.dtype) -> Tensor:
        return F.scaled_dot_product_attention(*(x.to(cast).transpose(1, 2) for x in tensors), **options).transpose(1, 2)

    check_close(block_causal_attention(*tensors, window=window), expected)


@EVERY_DTYPE
def test_padded_is_packed(dtype: torch.dtype, device: str) -> None:
    q, k = (randn(3, 5, heads, 4, seed=i, device=device, dtype=dtype) for i, heads in enumerate((2, 1)))
    cu_seqlens = torch.arange(4, device=device) * 5
    packed = [x.flatten(0, 1) for x in (q, k, k)]

    def expected(cast: torch.dtype) -> Tensor:
        return reference.block_causal_attention_reference(*(x.to(cast) for x in (q, k, k)))

    for function in (block_causal_attention, reference.block_causal_attention_reference):
        out, lse = function(q, k, k, window=3, return_lse=True)
        flat, flat_lse = function(*packed, cu_seqlens, window=3, return_lse=True)
        assert torch.equal(out, flat.view_as(q))
        assert torch.equal(lse, flat_lse.view(3, 5, 2))
        check_close(function(q[:, 3:], k, k), lambda cast: expected(cast)[:, 3:])
        one = function(*packed)
        check_close(one[:5], lambda cast: expected(cast)[0])
        assert not torch.allclose(one[5:10], function(q, k, k)[1])


@EVERY_DTYPE
def test_decoding_with_a_cache(dtype: torch.dtype, device: str) -> None:
    """Byte by byte, with a cache full of NaN where nothing is written yet."""
    length, room = 9, 12
    q, k, v = (randn(2, length, 2, 4, seed=i, device=device, dtype=dtype) for i in range(3))
    keys, values = (torch.full((2, room, 2, 4), NAN, dtype=dtype, device=device) for _ in range(2))
    for window in (None, 4):
        whole = {
            cast: reference.block_causal_attention_reference(*(x.to(cast) for x in (q, k, v)), window=window)
            for cast in (dtype, torch.float64)
        }
        steps = []
        for i in range(length):
            keys[:, i], values[:, i] = k[:, i], v[:, i]
            used = torch.full((2,), i + 1, device=device)
            steps.append(block_causal_attention(q[:, i : i + 1], keys, values, window=window, seqused_k=used))
        check_close(torch.cat(steps, 1), whole.__getitem__)


@EVERY_DTYPE
def test_rows_beyond_the_documents_are_not_read(dtype: torch.dtype, device: str) -> None:
    *leaves, grad = (randn(8, 2, 4, seed=i, device=device, dtype=dtype) for i in range(4))
    cu_seqlens = torch.tensor([0, 2, 5], device=device)
    results = []
    for poison in (0.0, NAN):
        for x in (*leaves, grad):
            x[5:] = poison
        own = [x.clone().requires_grad_() for x in leaves]
        out = block_causal_attention(*own, cu_seqlens)
        results.append([out, *torch.autograd.grad(out, own, grad)])
        assert all(not x[5:].any() for x in results[-1])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("width", "dtype"), [(1, torch.float64), *itertools.product((20, 64, 130), DTYPES)])
@pytest.mark.parametrize("queries", [1, 3, 16, 17, 63, 65])
def test_few_queries_with_a_cache(queries: int, width: int, dtype: torch.dtype, device: str) -> None:
    """Few queries and many take different paths, which agree; unused rows of the cache hold NaN."""
    room, used = 180, [150, queries, 0]
    cu_q, cu_k = [0, queries, 2 * queries, 2 * queries + 1], [0, room, 2 * room, 3 * room]
    q = randn(cu_q[-1], 6, width, device=device)
    k, v = (randn(cu_k[-1], 2, width, seed=i, device=device) for i in (1, 2))
    for document, n in enumerate(used):
        for x in (k, v):
            x[cu_k[document] + n : cu_k[document + 1]] = NAN
    batch = [{}, {"window": 70}, {"causal": False}, {"scale": -0.3}, {"scale": 0.0}]
    check_attention(batch, (q, k, v), dtype, [cu_q, cu_k], used=used)


@EVERY_DTYPE
@pytest.mark.parametrize("lengths", [[64, 63, 65], [511, 1, 513], [129, 0, 700]])
@pytest.mark.parametrize("window", [None, 1, 64, 100])
def test_lengths_around_the_tiles(lengths: list[int], window: int | None, dtype: torch.dtype, device: str) -> None:
    offsets = offsets_of(lengths).tolist()
    *tensors, grad = (randn(offsets[-1], heads, 5, seed=i, device=device) for i, heads in enumerate((2, 1, 1, 2)))
    check_attention([{"window": window}], tensors, dtype, [offsets], grad=grad)


@EVERY_DTYPE
@pytest.mark.parametrize("width", [8, 48, 256])
def test_many_tiny_documents(width: int, dtype: torch.dtype, device: str) -> None:
    offsets = offsets_of([n % 7 for n in range(150)]).tolist()
    *tensors, grad = (randn(offsets[-1], heads, width, seed=i, device=device) for i, heads in enumerate((4, 2, 2, 4)))
    check_attention([{}], tensors, dtype, [offsets], grad=grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    """Shares of the work end at tiles, so every bit is the same: for long documents, and for a step of decoding."""
    lengths = [700, 1, 150, 0, 300]
    offsets = offsets_of(lengths)
    q, k, v, grad = (randn(1151, heads, 64, seed=i, dtype=dtype) for i, heads in enumerate((4, 2, 2, 4)))
    last = torch.tensor((2, 1, 1, 0, 3)).cumsum(0)
    few = torch.cat((torch.zeros(1, dtype=torch.int64), last))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = block_causal_attention(*leaves, offsets, window=400, return_lse=True)
        step = block_causal_attention(q[: few[-1]], k, v, few, offsets, seqused_k=torch.tensor(lengths))
        results.append([out, lse, step, *torch.autograd.grad(out, leaves, grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@EVERY_DTYPE
def test_queries_without_keys_are_not_read(dtype: torch.dtype, device: str) -> None:
    """The first two of four queries are aligned with keys before the first of two."""
    q, k, v, grad = (randn(n, 2, 4, seed=n, device=device, dtype=dtype) for n in (4, 2, 2, 4))
    cu_q, cu_k = torch.tensor([0, 4], device=device), torch.tensor([0, 2], device=device)
    results = []
    for poison in (0.0, NAN):
        q[:2], grad[:2] = poison, poison
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        out = block_causal_attention(*own, cu_q, cu_k)
        results.append([out, *torch.autograd.grad(out, own, grad)])
        assert not any(x[:2].any() for x in results[-1][:2])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@EVERY_DTYPE
def test_what_nobody_sees_may_hold_anything(dtype: torch.dtype, device: str) -> None:
    """Keys before the windows of all queries, and those of a document without queries: in the same tiles as others."""
    queries, keys, window = [3, 0, 5, 2], [9, 4, 7, 30], 2
    cu_q, cu_k = (offsets_of(n).to(device) for n in (queries, keys))
    q, grad = (randn(10, 4, 32, seed=i, dtype=dtype, device=device) for i in (1, 2))
    k, v = (randn(50, 2, 32, seed=i, dtype=dtype, device=device) for i in (3, 4))
    seen = torch.cat([torch.arange(m) >= (m - n - window + 1 if n else m) for n, m in zip(queries, keys, strict=True)])
    results = []
    for poison in (0.0, NAN):
        k[~seen], v[~seen] = poison, poison
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        out = block_causal_attention(*own, cu_q, cu_k, window=window)
        results.append([out, *torch.autograd.grad(out, own, grad)])
        assert not any(x[~seen].any() for x in results[-1][2:])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def attend_on_cpu(scale: float | None, window: int | None) -> Callable[..., tuple[Tensor, ...]]:
    """out and the gradients of q, k and v, for `inputs.check_large_scores`."""

    def attend(tensors: list[Tensor], offsets: list[int]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        out = block_causal_attention(*leaves, torch.tensor(offsets), window=window, scale=scale)
        return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "scale", "window"), inputs.LARGE_SCORES)
def test_scores_of_any_size(
    width: int, scale: float | None, window: int | None, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Up to near the largest of fp32, of both signs: outputs and gradients are as precise as for ordinary ones."""
    if device != "cpu":
        pytest.skip("test_triton_attention.py has the same for Triton")
    for size in inputs.sizes_of_scores(dtype):
        inputs.check_large_scores(attend_on_cpu(scale, window), size, (4, 2), width, scale, window, dtype)


@pytest.mark.parametrize("size", [1e12, 1e290])
def test_scores_of_any_size_in_fp64(size: float, device: str) -> None:
    for scale in (None, -0.3):
        tensors, offsets = inputs.large_scores(size, (4, 2), 40, scale, torch.float64)
        leaves = [x.to(device).requires_grad_() for x in tensors[:3]]
        expected = inputs.eager_attention(*leaves, offsets, None, scale)
        out = block_causal_attention(*leaves, torch.tensor(offsets, device=device), scale=scale)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        grad = tensors[3].to(device)
        ours, theirs = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
        torch.testing.assert_close(ours[0][..., 20:], theirs[0][..., 20:], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "scale", "window"), inputs.LARGE_SCORES)
def test_decoding_with_scores_of_any_size(
    width: int, scale: float | None, window: int | None, dtype: torch.dtype, device: str
) -> None:
    """The last query of each document, on its own tile, and lse, which is as precise as fp32 is."""
    for size in inputs.sizes_of_scores(dtype):
        (q, k, v, _), offsets = inputs.large_scores(size, (4, 2), width, scale, dtype)
        last = torch.tensor(offsets[1:]) - 1
        cu_q, cu_k = (torch.tensor(x, device=device) for x in (range(len(offsets)), offsets))
        options = {"window": window, "scale": scale, "return_lse": True}
        out, lse = block_causal_attention(*(x.to(device) for x in (q[last], k, v)), cu_q, cu_k, **options)
        eager, truth = (
            inputs.eager_attention(*(x.to(cast) for x in (q, k, v)), offsets, window, scale)[last]
            for cast in (dtype, torch.float64)
        )
        assert_close(out.cpu(), eager, truth)
        _, expected = oracle(*(x.double() for x in (q, k, v)), offsets, offsets, window, scale=scale)
        torch.testing.assert_close(lse.cpu().double(), expected[last], rtol=3e-6, atol=3e-5)
        _, whole = block_causal_attention(*(x.to(device) for x in (q, k, v)), cu_k, **options)
        torch.testing.assert_close(whole.cpu().double(), expected, rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("isa", ["v2", "v3"])
def test_scores_of_any_size_on_other_instruction_sets(isa: str) -> None:
    """v2 has no fused multiply-adds, v3 has."""
    if isa not in _extension.load_cpu().available:
        pytest.skip(f"{isa} was not built, or this machine does not run it")
    code = (
        "import inputs, torch, test_block_causal_attention as tests\n"
        "torch.set_num_threads(1)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for width, scale, window in inputs.LARGE_SCORES[1:4]:\n"
        "        for size in inputs.sizes_of_scores(dtype):\n"
        "            attend = tests.attend_on_cpu(scale, window)\n"
        "            inputs.check_large_scores(attend, size, (4, 2), width, scale, window, dtype)\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    environment = os.environ | {"BLT_KERNELS_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("slope", [-0.5, 0.5])
def test_scores_far_apart(slope: float, device: str) -> None:
    """Weights of next to nothing, and a largest score that rises at every key, up to 150.

    Backward starts from the rounded lse, as torch's own flash attention does, which with such scores is what errs most.
    """
    q = torch.ones(300, 1, 64, device=device)
    k = (torch.arange(300, device=device) * slope / 64)[:, None, None].expand(300, 1, 64).contiguous()
    v, grad = (randn(300, 1, 64, seed=i, device=device, dtype=torch.float32) for i in (1, 2))

    def torchs_own(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, scale=1.0)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    truth = run(reference.block_causal_attention_reference, torch.float64)
    ours, *eager = (
        [(x - y).abs().max() for x, y in zip(run(function, torch.float32), truth, strict=True)]
        for function in (block_causal_attention, reference.block_causal_attention_reference, torchs_own)
    )
    for error, *others in zip(ours, *eager, strict=True):
        assert error <= 2 * max(others)


@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_in_half_precision(dtype: torch.dtype, width: int, device: str) -> None:
    """Long and short documents, whole and windowed, scales of either sign: at most twice the error of the reference."""
    cu_seqlens = offsets_of([1, 130, 0, 64, 333, 17], device=device)
    q, k, v = (randn(548, heads, width, seed=heads, device=device, dtype=dtype) for heads in (4, 2, 2))
    q[545:], k[545:], v[545:] = NAN, NAN, NAN  # beyond the last document
    grad = randn(548, 4, width, seed=3, device=device, dtype=dtype)

    def results(function: Callable[..., Tensor], cast: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
        leaves = [x.to(cast).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, cu_seqlens, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(cast))

    for options in ({}, {"window": 70}, {"scale": -0.2}, {"causal": False}):
        ours = results(block_causal_attention, dtype, **options)
        eager, truth = (
            results(reference.block_causal_attention_reference, cast, **options) for cast in (dtype, torch.float64)
        )
        for name, *triple in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
            assert_close(*triple, name=f"{name} {options}")
            assert not triple[0][545:].any()


@pytest.mark.parametrize("row", [0, 100, 400])
def test_nan_in_bf16_reaches_those_that_see_it(row: int, device: str) -> None:
    cu_seqlens = offsets_of([300, 200], device=device)
    q, k, v = (randn(500, 2, 64, seed=i, device=device, dtype=torch.bfloat16) for i in range(3))
    clean = block_causal_attention(q, k, v, cu_seqlens)
    k[row, 1, 5] = NAN
    out = block_causal_attention(q, k, v, cu_seqlens)
    end = 300 if row < 300 else 500
    assert out[row:end, 1].isnan().all()
    out[row:end, 1] = clean[row:end, 1]
    assert torch.equal(out, clean)


# --- autograd and autocast --------------------------------------------------------------------------------------------


def test_backward_against_autograd_of_the_reference(device: str) -> None:
    cu_q, cu_k = torch.tensor([0, 7, 7, 12], device=device), torch.tensor([0, 5, 6, 15], device=device)
    leaves = [randn(n, h, 3, seed=n, device=device).requires_grad_() for n, h in ((13, 4), (16, 2), (16, 2))]
    options = {"window": 4, "seqused_k": torch.tensor([5, 0, 8], device=device)}
    out = block_causal_attention(*leaves, cu_q, cu_k, **options)
    expected = reference.block_causal_attention_reference(*leaves, cu_q, cu_k, **options)
    grad = randn(13, 4, 3, seed=9, device=device)
    ours, theirs = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *x: block_causal_attention(*x, cu_q, cu_k, **options), leaves)


def test_lse_is_not_differentiable(device: str) -> None:
    q = torch.ones(3, 1, 4, device=device, requires_grad=True)
    for function in (block_causal_attention, reference.block_causal_attention_reference):
        out, lse = function(q, q, q, return_lse=True)
        assert out.requires_grad
        assert not lse.requires_grad


def test_autocast_is_that_of_torch_attention(device: str) -> None:
    q, k, v = (randn(2, 6, 2, 8, seed=i, device=device, dtype=torch.float32).requires_grad_() for i in range(3))
    grad = randn(2, 6, 2, 8, seed=3, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        out = block_causal_attention(q, k, v.bfloat16())
        assert out.dtype == F.scaled_dot_product_attention(q, k, v.bfloat16()).dtype == torch.bfloat16
        grads = torch.autograd.grad(out, (q, k, v), grad)
        double = block_causal_attention(q.double(), k.double(), v.double())
    assert all(g.dtype == torch.float32 for g in grads)
    assert torch.equal(out, block_causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert torch.equal(double, block_causal_attention(q.double(), k.double(), v.double()))


# --- compiled and traced ----------------------------------------------------------------------------------------------

CONFIG = TransformerConfig(32, 2, 2, num_kv_heads=1, ffn_dim=32, window=9)


class Layer(nn.Module):
    """A layer of a local model, with what it takes from the lengths of the documents."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = TransformerLayer(CONFIG, load_ops("fused"))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.layer(x, rotary_table(row_positions(cu_seqlens, x.shape[0]), CONFIG, x.dtype), cu_seqlens)


class Encoder(nn.Module):
    """The local encoder of BLT: two layers, pooling, and cross attention from patches to bytes."""

    def __init__(self) -> None:
        super().__init__()
        config = BLTConfig(CONFIG, CONFIG, CONFIG, patching="space", patcher=None, queries_per_patch=2)
        self.encoder = LocalEncoder(config, load_ops("fused"))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        layout = static_patch(cu_seqlens, 4, num_bytes=x.shape[0])
        table = rotary_table(row_positions(cu_seqlens, x.shape[0]), CONFIG, x.dtype)
        return torch.cat([y.flatten() for y in self.encoder(x, table, cu_seqlens, layout)])


@pytest.mark.parametrize(("module", "backend"), [(Layer, "inductor"), (Encoder, "aot_eager")])
def test_layers_compile_once_for_all_lengths(module: type[nn.Module], backend: str) -> None:
    """Forward and backward, without a break in the graph; a second compilation is an error."""
    torch.manual_seed(0)
    model = module()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for again, lengths in enumerate(([20, 0, 17], [30, 1, 2, 8, 40])):
        x, cu_seqlens = randn(sum(lengths), 32, dtype=torch.float32).requires_grad_(), offsets_of(lengths)
        results = []
        with torch._dynamo.config.patch(error_on_recompile=bool(again)):
            for function in (compiled, model):
                out = function(x, cu_seqlens)
                results.append(
                    [out, *torch.autograd.grad(out.sin().sum(), (x, *model.parameters()), allow_unused=True)]
                )
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_tracing_for_cuda() -> None:
    """With fake tensors of a GPU, which need not be there: shapes and dtypes of forward and backward."""
    with FakeTensorMode():
        q, k = (torch.empty(2, 9, heads, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        used = torch.empty(2, device="cuda", dtype=torch.int64)
        out, lse = block_causal_attention(q, k, k, window=5, seqused_k=used, return_lse=True)
        cu_seqlens = torch.empty(3, device="cuda", dtype=torch.int32)
        packed = [x.flatten(0, 1) for x in (out, q, k, k, out, lse)]
        backward = torch.ops.blt_kernels.block_causal_attention_bwd
        grads = backward(*packed, cu_seqlens, None, 5, True, None, used.int(), None, 2)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
    assert (lse.shape, lse.dtype) == (q.shape[:-1], torch.float32)
    assert all(g.shape == x.shape and g.dtype == x.dtype for g, x in zip(grads, packed[1:4], strict=True))


# --- ranges -----------------------------------------------------------------------------------------------------------


def sees(intervals: Tensor, rows: int, others: int) -> Tensor:
    """Which of the others each row sees, bool ``[rows, others]``; neither end of the intervals falls."""
    first, last = intervals.view(2, -1)
    assert bool((first.diff() >= 0).all() and (last.diff() >= 0).all())
    other = torch.arange(others)
    return ((other >= first[:rows, None]) & (other < last[:rows, None])).cpu()


@given(st.data())
def test_ranges_of_queries_and_keys_are_what_attention_sees(data: st.DataObject) -> None:
    lengths = st.lists(st.integers(0, 6), min_size=1, max_size=4)
    queries = data.draw(lengths)
    keys = data.draw(st.none() | st.lists(st.integers(0, 6), min_size=len(queries), max_size=len(queries)))
    used = data.draw(st.none() | st.tuples(*(st.integers(0, n) for n in keys or queries)))
    beyond = data.draw(st.integers(0, 5))
    totals = [sum(n) + beyond for n in (queries, keys or queries)]
    offsets = (offsets_of(queries), None if keys is None else offsets_of(keys))
    options = {
        "window": data.draw(st.sampled_from([None, 1, 2, 5, 2**40])),
        "causal": data.draw(st.booleans()),
        "seqused_k": None if used is None else torch.tensor(used, dtype=torch.int32),
    }
    q, k = (torch.empty(n, 1, 1) for n in totals)
    first, last, _ = reference.visible(q, k, *offsets, *options.values())
    key = torch.arange(totals[1])
    expected = (key >= first[:, None]) & (key < last[:, None])
    results = []
    for function in (attention_ranges, reference.attention_ranges_reference):
        ranges = function(*offsets, num_queries=totals[0], num_keys=totals[1], **options)
        of_queries, of_keys = ranges.intervals.split([-(-n // 4) * 8 for n in totals])
        assert torch.equal(sees(of_queries, *totals), expected)
        assert torch.equal(sees(of_keys, *totals[::-1]), expected.mT)
        results.append(ranges.intervals)
    assert torch.equal(*results)


def test_ranges_change_nothing(device: str) -> None:
    offsets = offsets_of([5, 0, 9], device=device)
    ranges = attention_ranges(offsets, num_queries=15, window=4)
    results = []
    for shared in (None, ranges):
        q, k, v = (randn(15, 2, 8, seed=seed, device=device).requires_grad_() for seed in range(3))
        out = block_causal_attention(q, k, v, offsets, window=4, ranges=shared)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)))
        results[-1] += torch.autograd.grad(results[-1][1].square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def calls_in_models(model: nn.Module, *arguments: Any) -> list[tuple[str, Any]]:
    """Calls of attention's operators in a pass forward and backward on "meta": name, and the argument `ranges`."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            name = func.name().removeprefix("blt_kernels::block_causal_attention_")
            result = func(*args, **(kwargs or {}))
            if name in ("fwd", "bwd", "ranges_fwd"):
                calls.append((name, result if name == "ranges_fwd" else args[-2]))
            return result

    with Recorder():
        model(*arguments).sum().backward()
    return calls


STACK = TransformerConfig(16, 3, 2, window=8)
MODELS = {  # with the stacks that have ranges of their own
    "ByteLM": (lambda: ByteLM(ByteLMConfig(dim=16, num_layers=3, num_heads=2, window=8)), 1),
    "BLT": (lambda: BLT(blt_config(STACK)), 2),
    "BLT, windows": (lambda: BLT(blt_config(TransformerConfig(16, 3, 2, window=5))), 3),
    "MegaByte": (lambda: MegaByte(MegaByteConfig(4, STACK, STACK)), 2),
    "MegaByte, cross-patch": (lambda: MegaByte(MegaByteConfig(4, STACK, STACK, cross_patch=2)), 2),
}


def blt_config(decoder: TransformerConfig) -> BLTConfig:
    return BLTConfig(
        encoder=STACK, decoder=decoder, global_transformer=TransformerConfig(16, 3, 2), ngram_vocab=64,
        patcher=None, patching="static", patch_size=4,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_finds_ranges_once_a_stack(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformerLayer, "recompute", recompute)
    make, stacks = MODELS[name]
    tokens = torch.randint(4, 260, (40,))
    calls = calls_in_models(make().to("meta"), tokens.to("meta"), offsets_of([13, 27]).to("meta"))
    made = [ranges for operator, ranges in calls if operator == "ranges_fwd"]
    given = [ranges for operator, ranges in calls if operator != "ranges_fwd"]
    assert len(made) == stacks
    assert len(given) >= 2 * 3 * stacks
    assert all(any(x is ranges for ranges in made) for x in given)
    assert not [ranges for _, ranges in calls_in_models(make(), tokens, offsets_of([13, 27])) if ranges is not None]


def test_ranges_of_a_compiled_model() -> None:
    """One graph for two lengths, in which they are found once."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Sequence[Any]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(MODELS["ByteLM"][0]().to("meta"), backend=backend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([13, 27], [9, 33]):
            tokens = torch.zeros(sum(lengths), dtype=torch.int64, device="meta")
            compiled(tokens, offsets_of(lengths).to("meta")).sum().backward()
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1
    assert sum("block_causal_attention_ranges_fwd" in name for name in called) == 1


# --- argument errors --------------------------------------------------------------------------------------------------

PACKED = {name: torch.zeros(6, 4 if name == "q" else 2, 8) for name in "qkv"}
PADDED = {name: torch.zeros(2, 3, 4, 8) for name in "qkv"}
CU = torch.tensor([0, 2, 6])
RANGES = AttentionRanges(torch.zeros(32, dtype=torch.int32), 6, 6, None, True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": 1}, TypeError, "q: expected a tensor, got int"),
        ({"q": torch.zeros(6, 4, 8).int()}, TypeError, "q: expected dtype in float32.*got torch.int32"),
        ({"q": torch.zeros(6, 32)}, ValueError, r"q: expected 3 or 4 dimensions, got shape \[6, 32\]"),
        (
            {"q": torch.zeros(6, 4, 0), "k": torch.zeros(6, 2, 0), "v": torch.zeros(6, 2, 0)},
            ValueError,
            "q: expected at",
        ),
        ({"k": torch.zeros(1, 6, 2, 8)}, ValueError, r"k: expected 3 dimensions, got shape \[1, 6, 2, 8\]"),
        ({"k": torch.zeros(6, 2, 8).double()}, TypeError, "k: expected dtype torch.float32 of q, got torch.float64"),
        ({"v": torch.zeros(6, 2, 8, device="meta")}, ValueError, "v: expected device cpu of q, got meta"),
        ({"k": torch.zeros(6, 2, 9)}, ValueError, r"k: expected the head width E = 8 of q, got shape \[6, 2, 9\]"),
        ({"v": torch.zeros(6, 4, 8)}, ValueError, r"v: expected shape \[6, 2, 8\] of k, got \[6, 4, 8\]"),
        (
            {"k": torch.zeros(6, 3, 8), "v": torch.zeros(6, 3, 8)},
            ValueError,
            "k: expected a number of heads G that divides H = 4, got 3",
        ),
        (
            {"k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)},
            ValueError,
            "cu_seqlens_k: expected offsets, since q has 6 rows and k 5; got None",
        ),
        ({"cu_seqlens_q": torch.tensor([0, 7])}, ValueError, "cu_seqlens_q: expected offsets .* at most at 6, got"),
        ({"cu_seqlens_q": CU.float()}, TypeError, "cu_seqlens_q: expected dtype in int32, int64, got torch.float32"),
        ({"cu_seqlens_k": torch.tensor([0, 7, 8])}, ValueError, "cu_seqlens_k: expected offsets .* at most at 6, got"),
        (
            {"cu_seqlens_k": torch.tensor([0, 6])},
            ValueError,
            "cu_seqlens_k: expected 3 entries, as cu_seqlens_q has, got 2",
        ),
        (
            {"cu_seqlens_q": None, "cu_seqlens_k": CU},
            ValueError,
            "cu_seqlens_k: expected None, since cu_seqlens_q is None",
        ),
        ({**PADDED, "cu_seqlens_q": CU}, ValueError, "cu_seqlens_q: expected None, since q is padded"),
        (
            {**PADDED, "cu_seqlens_q": None, "cu_seqlens_k": CU},
            ValueError,
            "cu_seqlens_k: expected None, since q is padded",
        ),
        (
            {**PADDED, "q": torch.zeros(1, 3, 4, 8), "cu_seqlens_q": None},
            ValueError,
            r"k: expected the B = 1 documents of q, got shape \[2, 3, 4, 8\]",
        ),
        ({"ranges": torch.zeros(32).int()}, TypeError, "ranges: expected an AttentionRanges, got Tensor"),
        ({"ranges": replace(RANGES, num_keys=5)}, ValueError, "of 6 queries and 6 keys, got 6 queries and 5 keys"),
        ({"ranges": replace(RANGES, num_queries=7)}, ValueError, "of 6 queries and 6 keys, got 7 queries and 6 keys"),
        ({"ranges": replace(RANGES, window=3)}, ValueError, "window = None and .* True, got window = 3 and causal = T"),
        ({"ranges": RANGES, "causal": False}, ValueError, "ranges: expected those of .* False, got .* = True"),
        (
            {"ranges": replace(RANGES, intervals=RANGES.intervals.to("meta"))},
            ValueError,
            "ranges: expected device cpu of q, got meta",
        ),
        ({"window": 0}, ValueError, "window: expected a value >= 1, got 0"),
        ({"window": 1.5}, TypeError, "window: expected an int, got 1.5"),
        ({"causal": 1}, TypeError, "causal: expected a bool, got 1"),
        ({"scale": "1"}, TypeError, "scale: expected a number, got '1'"),
        ({"seqused_k": [2, 4]}, TypeError, "seqused_k: expected a tensor, got list"),
        (
            {"seqused_k": torch.tensor([2.0, 4.0])},
            TypeError,
            "seqused_k: expected dtype in int32, int64, got torch.float32",
        ),
        ({"seqused_k": torch.tensor([2])}, ValueError, "seqused_k: expected one entry for each of 2 documents, got 1"),
        (
            {"seqused_k": torch.tensor([2, 5])},
            ValueError,
            "seqused_k: expected 0 to 4 keys, the length of document 1, got 5",
        ),
        ({"seqused_k": torch.tensor([-1, 4])}, ValueError, "seqused_k: expected 0 to 2 keys.*document 0, got -1"),
        ({"seqused_k": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "seqused_k: expected device cpu"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        block_causal_attention(**{**PACKED, "cu_seqlens_q": CU, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_queries": -1}, ValueError, "num_queries: expected a value >= 0, got -1"),
        ({"num_queries": 5}, ValueError, "cu_seqlens_q: expected offsets .* at most at 5, got"),
        ({"num_keys": 7}, ValueError, "num_keys: expected num_queries = 6, since cu_seqlens_k is None; got 7"),
        ({"cu_seqlens_k": CU}, ValueError, "num_keys: expected an int, since cu_seqlens_k is not None; got None"),
        ({"cu_seqlens_k": torch.tensor([0, 6]), "num_keys": 6}, ValueError, "cu_seqlens_k: expected 3 entries"),
        ({"cu_seqlens_q": [0, 6]}, TypeError, "cu_seqlens_q: expected a tensor, got list"),
        ({"window": 0}, ValueError, "window: expected a value >= 1, got 0"),
        ({"causal": 1}, TypeError, "causal: expected a bool, got 1"),
        ({"seqused_k": torch.tensor([3, 4])}, ValueError, "seqused_k: expected 0 to 2 keys"),
    ],
)
def test_errors_of_ranges(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_ranges(**{"cu_seqlens_q": CU, "num_queries": 6, **change})
