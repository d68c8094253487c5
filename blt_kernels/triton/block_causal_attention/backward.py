"""Computes the backward of block_causal_attention on CUDA, without atomics.

    p_ij = exp(s_ij - lse_i),  ds_ij = p_ij (g_i . v_j - delta_i),  delta_i = g_i . out_i
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i

Tiling: there are three kernels. The first one finds `delta` and lse (times log2(e), but for fp32). In the second a
program owns dk and dv of BLOCK_N keys of one key head, and streams the queries that attend to them, of all heads that
read this key head. In the third a program owns dq of BLOCK_M queries of one head, and streams keys as forward does.
Both make the scores anew, so a (query, key) pair costs 14 E flops, 4 E more than if dq were added up by atomics, and
everything is the same bit for bit from run to run. Bytes: q, k, v, g and the gradients once; what is streamed once for
every block, from L2.

A pair costs six instructions beside the products: p = exp2(min(scale log2(e) q . k - lse, 0)) is a multiply-add, a
minimum and an exponential, ds a subtraction and a product, and both are rounded, two at a time. p is as precise as lse,
which is rounded: its relative error is up to about 2^-22 |lse|. The minimum makes it at most 1 where lse is huge.
Only a tile with masked pairs is masked, behind a branch that all threads take alike. That costs about 15 instructions a
tile; a loop of its own for such tiles would save them and wait for its first tile once more.

Scores of keys are computed transposed, [keys, queries], so that on Hopper p and ds are operands in registers of the
products that follow, and q and the gradient, which both kinds of products read, operands in shared memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.reference.block_causal_attention import AttentionMask
from blt_kernels.triton.block_causal_attention.launch import Launch, architecture, launch_options, padded_head_dim
from blt_kernels.triton.block_causal_attention.ranges import load_ranges, next_range, ranges
from blt_kernels.triton.block_causal_attention.tiles import (
    MIN_SCALE,
    check,
    head_mask,
    load_heads,
    loadable,
    precision_of,
    runs_here,
    scale_of,
    strides,
    tile_at,
    unmasked,
)

_SUMS_BLOCK = 64  # a program of the first kernel has so many queries
_LOG2_E = tl.constexpr(math.log2(math.e))
_MAX = tl.constexpr(3.4e38)  # is about the largest fp32
_SMALL_SCALE = 2.0**-64  # products of larger ones overflow only where scores are beyond 1e19


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_heads"])
def block_causal_attention_bwd_sums_kernel(
    grad_out, out, lse, sums, first, last, stride_gt, stride_gh, stride_ot, stride_oh, num_queries, num_keys, num_heads,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write ``sums [2, num_heads, num_queries]``: lse as `weights` takes it, and delta.

    Queries that attend to nothing are not read.
    """
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    query = start + offs_m
    first_key, last_key, _ = load_ranges(first, last, query, num_queries, num_keys)
    loaded = head_mask(first_key < last_key, HEAD_DIM, BLOCK_D)
    grad = tl.load(tile_at(grad_out + head * stride_gh, start, stride_gt, offs_m, BLOCK_D), mask=loaded, other=0.0)
    result = tl.load(tile_at(out + head * stride_oh, start, stride_ot, offs_m, BLOCK_D), mask=loaded, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    lse_tile = tl.load(lse + query.to(tl.int64) * num_heads + head, mask=query < num_queries, other=0.0)
    if grad_out.dtype.element_ty != tl.float32:
        lse_tile *= _LOG2_E
    # Finite, so that no exponent is inf - inf; NaN stays.
    lse_tile = tl.clamp(lse_tile, -_MAX, _MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(sums + head * num_queries + query, lse_tile, mask=query < num_queries)
    tl.store(sums + (num_heads + head) * num_queries + query, delta, mask=query < num_queries)


@triton.jit
def weights(score, factor, lse, EXACT: tl.constexpr):
    """Return ``exp2(score * factor - lse)``, or ``exp`` of it if EXACT: at most 1 however lse is rounded, NaN for NaN.

    In fp32 the factor and lse times log2(e) would be rounded once more, in proportion to the scores and not to the
    exponent, and products take much longer than one more instruction.
    """
    exponent = score * factor - lse
    if EXACT:
        exponent *= _LOG2_E
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def attended_by_all(first, last):
    """Return the interval that all attend to, but for those that attend to nothing, whose results are 0."""
    attends = first < last
    return tl.max(tl.where(attends, first, 0)), tl.min(tl.where(attends, last, 2147483647))


@triton.jit
def load_copies(at, COPIES: tl.constexpr):
    """Load a vector as a ``[COPIES, N]`` tile with equal rows, and return its first row.

    Triton 3.6 rematerializes a load of fewer elements than the program has threads in the layout of its use,
    that of the scores: 16 loads a thread at N = 64. A larger tile is loaded once, and its first row alone is used.
    """
    N: tl.constexpr = at.shape[0]
    tile = tl.load(tl.broadcast_to(at[None, :], (COPIES, N)))
    for _ in tl.static_range(COPIES.bit_length() - 1):
        tile, _ = tl.split(tile.reshape(2, tile.shape[0] // 2, N).permute(1, 2, 0))
    return tile.reshape(N)


@triton.jit
def dkdv_range(
    dk, dv, k, v, q, grad_out, lse, delta, stride_qt, stride_qh, stride_gt, stride_gh, factor, first, last,
    all_first, all_last, begin, end, num_queries, heads_per_kv_head,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the queries ``[begin, end)`` of each head that reads the keys `k` and `v` ``[BLOCK_N, BLOCK_D]``.

    The queries ``[first_j, last_j)`` attend to key j, and ``[all_first, all_last)`` to every key. The heads are in the
    same loop, so that loads of the next one start before this one is done.
    """
    # Copies give each of 256 threads an element. In fp32 most launches have one stage, which uses no shared memory.
    COPIES: tl.constexpr = 1 if k.dtype == tl.float32 else max(256 // BLOCK_M, 1)
    offs_m = tl.arange(0, BLOCK_M)
    head = (begin * 0).to(tl.int64)
    start = begin
    for _ in tl.range(0, tl.cdiv(end - begin, BLOCK_M) * heads_per_kv_head):
        local = tl.minimum(offs_m, end - 1 - start)  # the last query again, not what is behind it
        q_tile = load_heads(tile_at(q + head * stride_qh, start, stride_qt, local, BLOCK_D), HEAD_DIM, BLOCK_D)
        grad = load_heads(tile_at(grad_out + head * stride_gh, start, stride_gt, local, BLOCK_D), HEAD_DIM, BLOCK_D)
        score = tl.dot(k, q_tile.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        lse_tile = load_copies(lse + head * num_queries + start + local, COPIES)
        p = weights(score, factor, lse_tile[None, :], k.dtype == tl.float32)
        if (start < all_first) | (start + BLOCK_M > all_last):
            p = tl.where(unmasked(first, last, start, end, BLOCK_M), p, 0.0)
        dp = tl.dot(v, grad.T, input_precision=PRECISION)
        ds = p * (dp - load_copies(delta + head * num_queries + start + local, COPIES)[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
        start += BLOCK_M
        done = start >= end
        head += done.to(tl.int64)
        start = tl.where(done, begin, start)
    return dk, dv


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_kv_heads", "heads_per_kv_head"])
def block_causal_attention_bwd_dkdv_kernel(
    q, k, v, grad_out, sums, first, last, grad_k, grad_v,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    scale, factor, num_queries, num_keys, num_kv_heads, heads_per_kv_head,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `grad_k` and `grad_v` of BLOCK_N keys of one key head; the queries [first, last) attend to a key."""
    key_head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N  # the most queries attend to early keys
    offs_n = tl.arange(0, BLOCK_N)
    key = start + offs_n
    loaded = head_mask(key < num_keys, HEAD_DIM, BLOCK_D)
    k_tile = tl.load(tile_at(k + key_head * stride_kh, start, stride_kt, offs_n, BLOCK_D), mask=loaded, other=0.0)
    v_tile = tl.load(tile_at(v + key_head * stride_vh, start, stride_vt, offs_n, BLOCK_D), mask=loaded, other=0.0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    head = key_head * heads_per_kv_head
    q += head * stride_qh
    grad_out += head * stride_gh
    lse = sums + head * num_queries
    delta = lse + num_kv_heads.to(tl.int64) * heads_per_kv_head * num_queries
    first_query, last_query, gap = load_ranges(first, last, key, num_keys, num_queries)
    all_first, all_last = attended_by_all(first_query, last_query)
    begin, end = next_range(first_query, last_query, gap, 0)
    while begin < end:
        dk, dv = dkdv_range(
            dk, dv, k_tile, v_tile, q, grad_out, lse, delta, stride_qt, stride_qh, stride_gt, stride_gh, factor,
            first_query, last_query, all_first, all_last, begin, end, num_queries, heads_per_kv_head,
            BLOCK_M, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        begin, end = next_range(first_query, last_query, gap, end)
    # `end` is 0 here, which the compiler does not know: it keeps no addresses and masks in registers over the loop.
    start += end
    inside = offs_n < num_keys - start
    first_query = tl.load(first + start + offs_n, mask=inside, other=0)
    last_query = tl.load(last + start + offs_n, mask=inside, other=0)
    attended, stored = (first_query < last_query)[:, None], head_mask(inside, HEAD_DIM, BLOCK_D)
    stride = num_kv_heads * HEAD_DIM
    grads = tl.where(attended, dv, 0.0).to(grad_v.dtype.element_ty)
    tl.store(tile_at(grad_v + key_head * HEAD_DIM, start, stride, offs_n, BLOCK_D), grads, mask=stored)
    grads = tl.where(attended, dk * scale, 0.0).to(grad_k.dtype.element_ty)
    tl.store(tile_at(grad_k + key_head * HEAD_DIM, start, stride, offs_n, BLOCK_D), grads, mask=stored)


@triton.jit
def dq_range(
    dq, q, grad, lse, delta, k, v, stride_kt, stride_vt, factor, first, last, all_first, all_last, begin, end,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys ``[begin, end)``; `q` and `grad` are ``[BLOCK_M, BLOCK_D]``.

    Query i attends to the keys ``[first_i, last_i)``, and every query to ``[all_first, all_last)``.
    """
    offs_n = tl.arange(0, BLOCK_N)
    for offset in tl.range(0, end - begin, BLOCK_N):
        start = begin + offset
        local = tl.minimum(offs_n, end - 1 - start)  # the last key again, not what is behind it
        k_tile = load_heads(tile_at(k, start, stride_kt, local, BLOCK_D), HEAD_DIM, BLOCK_D)
        v_tile = load_heads(tile_at(v, start, stride_vt, local, BLOCK_D), HEAD_DIM, BLOCK_D)
        score = tl.dot(q, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(grad, v_tile.T, input_precision=PRECISION)
        ds = weights(score, factor, lse[:, None], q.dtype == tl.float32) * (dp - delta[:, None])
        if (start < all_first) | (start + BLOCK_N > all_last):
            ds = tl.where(unmasked(first, last, start, end, BLOCK_N), ds, 0.0)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_heads", "heads_per_kv_head"])
def block_causal_attention_bwd_dq_kernel(
    q, k, v, grad_out, sums, first, last, grad_q,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    scale, factor, num_queries, num_keys, num_heads, heads_per_kv_head,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `grad_q` of BLOCK_M queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # late queries have the most keys
    offs_m = tl.arange(0, BLOCK_M)
    query = start + offs_m
    inside = query < num_queries
    first_key, last_key, gap = load_ranges(first, last, query, num_queries, num_keys)
    stored = head_mask(inside, HEAD_DIM, BLOCK_D)
    q_tile = tl.load(tile_at(q + head * stride_qh, start, stride_qt, offs_m, BLOCK_D), mask=stored, other=0.0)
    grad = tl.load(tile_at(grad_out + head * stride_gh, start, stride_gt, offs_m, BLOCK_D), mask=stored, other=0.0)
    lse = tl.load(sums + head * num_queries + query, mask=inside, other=0.0)
    delta = tl.load(sums + (num_heads + head) * num_queries + query, mask=inside, other=0.0)
    k += head // heads_per_kv_head * stride_kh
    v += head // heads_per_kv_head * stride_vh
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    all_first, all_last = attended_by_all(first_key, last_key)
    begin, end = next_range(first_key, last_key, gap, 0)
    while begin < end:
        dq = dq_range(
            dq, q_tile, grad, lse, delta, k, v, stride_kt, stride_vt, factor, first_key, last_key,
            all_first, all_last, begin, end, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        begin, end = next_range(first_key, last_key, gap, end)
    if BLOCK_D == 256:  # As in dkdv: `end` is 0, which the compiler does not know, so it keeps no addresses.
        start += end
        stored = head_mask(offs_m < num_queries - start, HEAD_DIM, BLOCK_D)
    dq = tl.where((first_key < last_key)[:, None], dq * scale, 0.0).to(grad_q.dtype.element_ty)
    stride = num_heads * HEAD_DIM
    tl.store(tile_at(grad_q + head * HEAD_DIM, start, stride, offs_m, BLOCK_D), dq, mask=stored)


def block_causal_attention_bwd_cuda(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the operator, whose schema names the `arguments`. `launch` replaces those of `launch_options`."""
    if not runs_here(q):
        return reference.block_causal_attention_bwd_reference(grad_out, q, k, v, out, lse, *arguments)
    mask = AttentionMask(*arguments)
    check(q, k, v, mask)
    for name, x, shape in (("grad_out", grad_out, q.shape), ("out", out, q.shape), ("lse", lse, q.shape[:2])):
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, as q has, got {list(x.shape)}")
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    q, k, v, grad_out, out = loadable(q), loadable(k), loadable(v), loadable(grad_out), loadable(out)
    lse = lse.contiguous()
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if not num_queries or not num_keys:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    sums = q.new_empty((2, num_heads, num_queries), dtype=torch.float32)
    scale = scale_of(mask.scale, q)
    q_scores, k_scores, factor = q, k, scale
    if abs(scale) < _SMALL_SCALE and q.dtype != torch.float16:  # whose products are small
        factor, exponent = math.frexp(scale)
        power = 0.0 if abs(scale) < MIN_SCALE else 2.0**exponent
        q_scores, k_scores = loadable(q * power), loadable(k * power)
    if q.dtype != torch.float32:
        factor *= _LOG2_E.value
    heads = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
    with torch.cuda.device_of(q):
        of_queries, of_keys = ranges(mask, q, k, with_keys=True)
        block_causal_attention_bwd_sums_kernel[(triton.cdiv(num_queries, _SUMS_BLOCK), num_heads)](
            grad_out, out, lse, sums, *of_queries, *strides(grad_out, out), num_queries, num_keys, num_heads,
            BLOCK_M=_SUMS_BLOCK, **heads, num_warps=4,
        )  # fmt: skip
        own = launch or launch_options("bwd_dkdv", head_dim, q.dtype, architecture(q))
        block_causal_attention_bwd_dkdv_kernel[(triton.cdiv(num_keys, own.block_n), num_kv_heads)](
            q, k_scores, v, grad_out, sums, *of_keys, grad_k, grad_v, *strides(q, k_scores, v, grad_out), scale, factor,
            num_queries, num_keys, num_kv_heads, num_heads // num_kv_heads,
            BLOCK_M=own.block_m, BLOCK_N=own.block_n, **heads, PRECISION=precision_of(q),
            num_warps=own.num_warps, num_stages=own.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        own = launch or launch_options("bwd_dq", head_dim, q.dtype, architecture(q))
        block_causal_attention_bwd_dq_kernel[(triton.cdiv(num_queries, own.block_m), num_heads)](
            q_scores, k, v, grad_out, sums, *of_queries, grad_q, *strides(q_scores, k, v, grad_out), scale, factor,
            num_queries, num_keys, num_heads, num_heads // num_kv_heads,
            BLOCK_M=own.block_m, BLOCK_N=own.block_n, **heads, PRECISION=precision_of(q),
            num_warps=own.num_warps, num_stages=own.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_q, grad_k, grad_v
