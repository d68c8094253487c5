"""Backward of block_causal_attention, without atomics.

    p_ij = exp(s_ij - lse_i),  ds_ij = p_ij (g_i . v_j - delta_i),  delta_i = g_i . out_i
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij g_i

Three kernels: the row sums, `delta` and lse (times log2(e), but for fp32); dk and dv of `rows` keys of one key head,
which stream the queries that attend to them, of all heads that read this key head; dq of `rows` queries of one head,
which streams keys as forward does. Both make the scores anew, so a (query, key) pair costs 14 E flops, 4 E more than if
dq were added up by atomics, and everything is the same bit for bit from run to run.

A pair costs six instructions beside the products: p = exp2(min(scale log2(e) q . k - lse, 0)) is a multiply-add, a
minimum and an exponential, ds a subtraction and a product, and both are rounded, two at a time. p is as precise as lse,
which is rounded: its relative error is up to about 2^-22 |lse|. The minimum makes it at most 1 where lse is huge.
Only a tile that some row does not attend to whole is masked, behind a branch that all threads take alike. That costs
about 15 instructions a tile; a loop for such tiles of its own would save them and wait for its first tile once more.

Scores of keys are computed transposed, [keys, queries], so that on Hopper p and ds are operands in registers of the
products that follow, and q and the gradient, which both kinds of products read, operands in shared memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.triton.attention_launch import Launch, architecture, launch_options, padded_width
from blt_kernels.triton.attention_ranges import load_ranges, next_run, ranges
from blt_kernels.triton.attention_tiles import (
    MIN_SCALE,
    check,
    load_rows,
    precision_of,
    row_mask,
    rows_of,
    runs_here,
    scale_of,
    sees,
    strides,
    tile_at,
)

_SUM_ROWS = 64
_LOG2_E = tl.constexpr(math.log2(math.e))
_MAX = tl.constexpr(3.4e38)  # of fp32
_SMALL_SCALE = 2.0**-64  # products of larger ones overflow only where scores are beyond 1e19


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def block_causal_attention_bwd_sums_kernel(
    grad_out, out, lse, sums, first, last, stride_gt, stride_gh, stride_ot, stride_oh, queries, keys, heads,
    ROWS: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write ``sums [2, heads, queries]``: lse as `weights` takes it, and delta. Rows without keys are not read."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS
    local = tl.arange(0, ROWS)
    row = start + local
    first_key, last_key, _ = load_ranges(first, last, row, queries, keys)
    loaded = row_mask(first_key < last_key, WIDTH, E, WIDTH == E)
    grad = tl.load(tile_at(grad_out + head * stride_gh, start, stride_gt, local, E), mask=loaded, other=0.0)
    result = tl.load(tile_at(out + head * stride_oh, start, stride_ot, local, E), mask=loaded, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    total = tl.load(lse + row.to(tl.int64) * heads + head, mask=row < queries, other=0.0)
    if grad_out.dtype.element_ty != tl.float32:
        total *= _LOG2_E
    # Finite, so that no exponent is inf - inf; NaN stays.
    total = tl.clamp(total, -_MAX, _MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(sums + head * queries + row, total, mask=row < queries)
    tl.store(sums + (heads + head) * queries + row, delta, mask=row < queries)


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
    """Return the interval that every row attends to. Rows that attend to nothing, whose results are 0, do not count."""
    live = first < last
    return tl.max(tl.where(live, first, 0)), tl.min(tl.where(live, last, 2147483647))


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
def dkdv_run(
    dk, dv, k, v, q, grad_out, lse, delta, stride_qt, stride_qh, stride_gt, stride_gh, factor, first, last,
    all_first, all_last, begin, end, queries, group,
    STEP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the queries ``[begin, end)`` of each head of a group, to which the keys `k` and `v` ``[ROWS, E]`` belong.

    Key j is attended to by the queries ``[first_j, last_j)``, and every key by ``[all_first, all_last)``. The heads are
    in the same loop, so that loads of the next one start before this one is done.
    """
    # One element for each of 256 threads. In fp32 most launches have one stage, which does not use shared memory.
    COPIES: tl.constexpr = 1 if k.dtype == tl.float32 else max(256 // STEP, 1)
    step = tl.arange(0, STEP)
    head = (begin * 0).to(tl.int64)
    start = begin
    for _ in tl.range(0, tl.cdiv(end - begin, STEP) * group):
        local = tl.minimum(step, end - 1 - start)  # the last query again, not what is behind it
        q_rows = load_rows(tile_at(q + head * stride_qh, start, stride_qt, local, E), WIDTH, E, WIDTH == E)
        grad = load_rows(tile_at(grad_out + head * stride_gh, start, stride_gt, local, E), WIDTH, E, WIDTH == E)
        score = tl.dot(k, q_rows.T, input_precision=PRECISION)  # [ROWS, STEP]
        lse_rows = load_copies(lse + head * queries + start + local, COPIES)
        p = weights(score, factor, lse_rows[None, :], k.dtype == tl.float32)
        if (start < all_first) | (start + STEP > all_last):
            p = tl.where(sees(first, last, start, end, STEP), p, 0.0)
        dp = tl.dot(v, grad.T, input_precision=PRECISION)
        ds = p * (dp - load_copies(delta + head * queries + start + local, COPIES)[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q_rows.dtype), q_rows, dk, input_precision=PRECISION)
        start += STEP
        done = start >= end
        head += done.to(tl.int64)
        start = tl.where(done, begin, start)
    return dk, dv


@triton.jit(do_not_specialize=["queries", "keys", "groups", "group"])
def block_causal_attention_bwd_dkdv_kernel(
    q, k, v, grad_out, sums, first, last, grad_k, grad_v,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    scale, factor, queries, keys, groups, group,
    ROWS: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `grad_k` and `grad_v` of ROWS keys of one key head; queries [first, last) attend to a key."""
    key_head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS  # the most queries attend to early keys
    local = tl.arange(0, ROWS)
    row = start + local
    loaded = row_mask(row < keys, WIDTH, E, WIDTH == E)
    k_rows = tl.load(tile_at(k + key_head * stride_kh, start, stride_kt, local, E), mask=loaded, other=0.0)
    v_rows = tl.load(tile_at(v + key_head * stride_vh, start, stride_vt, local, E), mask=loaded, other=0.0)
    dk = tl.zeros((ROWS, E), tl.float32)
    dv = tl.zeros((ROWS, E), tl.float32)
    head = key_head * group
    q += head * stride_qh
    grad_out += head * stride_gh
    lse = sums + head * queries
    delta = lse + groups.to(tl.int64) * group * queries
    first_row, last_row, gap = load_ranges(first, last, row, keys, queries)
    all_first, all_last = attended_by_all(first_row, last_row)
    begin, end = next_run(first_row, last_row, gap, 0)
    while begin < end:
        dk, dv = dkdv_run(
            dk, dv, k_rows, v_rows, q, grad_out, lse, delta, stride_qt, stride_qh, stride_gt, stride_gh, factor,
            first_row, last_row, all_first, all_last, begin, end, queries, group, STEP, E, WIDTH, PRECISION,
        )  # fmt: skip
        begin, end = next_run(first_row, last_row, gap, end)
    # `end` is 0 here, which the compiler does not know: it keeps no addresses and masks in registers over the loop.
    start += end
    inside = local < keys - start
    first_row = tl.load(first + start + local, mask=inside, other=0)
    last_row = tl.load(last + start + local, mask=inside, other=0)
    live, stored = (first_row < last_row)[:, None], row_mask(inside, WIDTH, E, WIDTH == E)
    stride = groups * WIDTH
    grads = tl.where(live, dv, 0.0).to(grad_v.dtype.element_ty)
    tl.store(tile_at(grad_v + key_head * WIDTH, start, stride, local, E), grads, mask=stored)
    grads = tl.where(live, dk * scale, 0.0).to(grad_k.dtype.element_ty)
    tl.store(tile_at(grad_k + key_head * WIDTH, start, stride, local, E), grads, mask=stored)


@triton.jit
def dq_run(
    dq, q, grad, lse, delta, k, v, stride_kt, stride_vt, factor, first, last, all_first, all_last, begin, end,
    STEP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys ``[begin, end)``; q and grad are ``[ROWS, E]``.

    Query i attends to the keys ``[first_i, last_i)``, and every query to ``[all_first, all_last)``.
    """
    step = tl.arange(0, STEP)
    for offset in tl.range(0, end - begin, STEP):
        start = begin + offset
        local = tl.minimum(step, end - 1 - start)  # the last key again, not what is behind it
        k_rows = load_rows(tile_at(k, start, stride_kt, local, E), WIDTH, E, WIDTH == E)
        v_rows = load_rows(tile_at(v, start, stride_vt, local, E), WIDTH, E, WIDTH == E)
        score = tl.dot(q, k_rows.T, input_precision=PRECISION)  # [ROWS, STEP]
        dp = tl.dot(grad, v_rows.T, input_precision=PRECISION)
        ds = weights(score, factor, lse[:, None], q.dtype == tl.float32) * (dp - delta[:, None])
        if (start < all_first) | (start + STEP > all_last):
            ds = tl.where(sees(first, last, start, end, STEP), ds, 0.0)
        dq = tl.dot(ds.to(k_rows.dtype), k_rows, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group"])
def block_causal_attention_bwd_dq_kernel(
    q, k, v, grad_out, sums, first, last, grad_q,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    scale, factor, queries, keys, heads, group,
    ROWS: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `grad_q` of ROWS queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # late queries have the most keys
    local = tl.arange(0, ROWS)
    row = start + local
    inside = row < queries
    first_row, last_row, gap = load_ranges(first, last, row, queries, keys)
    stored = row_mask(inside, WIDTH, E, WIDTH == E)
    q_rows = tl.load(tile_at(q + head * stride_qh, start, stride_qt, local, E), mask=stored, other=0.0)
    grad = tl.load(tile_at(grad_out + head * stride_gh, start, stride_gt, local, E), mask=stored, other=0.0)
    lse = tl.load(sums + head * queries + row, mask=inside, other=0.0)
    delta = tl.load(sums + (heads + head) * queries + row, mask=inside, other=0.0)
    k += head // group * stride_kh
    v += head // group * stride_vh
    dq = tl.zeros((ROWS, E), tl.float32)
    all_first, all_last = attended_by_all(first_row, last_row)
    begin, end = next_run(first_row, last_row, gap, 0)
    while begin < end:
        dq = dq_run(
            dq, q_rows, grad, lse, delta, k, v, stride_kt, stride_vt, factor, first_row, last_row,
            all_first, all_last, begin, end, STEP, E, WIDTH, PRECISION,
        )  # fmt: skip
        begin, end = next_run(first_row, last_row, gap, end)
    if E == 256:  # As in dkdv: `end` is 0, which the compiler does not know, so it keeps no addresses in registers.
        start += end
        stored = row_mask(local < queries - start, WIDTH, E, WIDTH == E)
    dq = tl.where((first_row < last_row)[:, None], dq * scale, 0.0).to(grad_q.dtype.element_ty)
    stride = heads * WIDTH
    tl.store(tile_at(grad_q + head * WIDTH, start, stride, local, E), dq, mask=stored)


def block_causal_attention_bwd_cuda(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    causal: bool,
    scale: float | None,
    seqused_k: Tensor | None,
    made: Tensor | None = None,
    num_documents: int = 1,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run backward; see `ops.block_causal_attention`. `launch` takes the place of what `launch_options` says.

    `made` are the ranges that are at hand. Without `cu_seqlens_q` there are `num_documents` of one length.
    """
    if not runs_here(q):
        return reference.block_causal_attention_bwd_reference(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            window,
            causal,
            scale,
            seqused_k,
            None,
            num_documents,
        )
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, num_documents, window, seqused_k)
    (queries, heads, width), (keys, groups, _) = q.shape, k.shape
    q, k, v, grad_out, out, lse = rows_of(q), rows_of(k), rows_of(v), rows_of(grad_out), rows_of(out), lse.contiguous()
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
    if not queries or not keys:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    sums = q.new_empty((2, heads, queries), dtype=torch.float32)
    scale = scale_of(scale, q)
    q_scores, k_scores, factor = q, k, scale
    if abs(scale) < _SMALL_SCALE and q.dtype != torch.float16:  # whose products are small
        factor, exponent = math.frexp(scale)
        power = 0.0 if abs(scale) < MIN_SCALE else 2.0**exponent
        q_scores, k_scores = rows_of(q * power), rows_of(k * power)
    if q.dtype != torch.float32:
        factor *= _LOG2_E.value
    options = {
        "E": padded_width(width),
        "WIDTH": width,
        "PRECISION": precision_of(q),
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(q):
        documents = num_documents if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        offsets = (queries, keys, cu_seqlens_q, cu_seqlens_k, documents, window, causal, seqused_k)
        of_queries, of_keys = ranges(q, *offsets, with_keys=True, made=made)
        block_causal_attention_bwd_sums_kernel[(triton.cdiv(queries, _SUM_ROWS), heads)](
            grad_out, out, lse, sums, *of_queries, *strides(grad_out, out), queries, keys, heads,
            ROWS=_SUM_ROWS, E=padded_width(width), WIDTH=width, num_warps=4,
        )  # fmt: skip
        own = launch or launch_options("bwd_dkdv", width, q.dtype, architecture(q))
        block_causal_attention_bwd_dkdv_kernel[(triton.cdiv(keys, own.rows), groups)](
            q, k_scores, v, grad_out, sums, *of_keys, grad_k, grad_v, *strides(q, k_scores, v, grad_out), scale, factor,
            queries, keys, groups, heads // groups,
            ROWS=own.rows, STEP=own.step, num_warps=own.warps, num_stages=own.stages, **options,
        )  # fmt: skip
        own = launch or launch_options("bwd_dq", width, q.dtype, architecture(q))
        block_causal_attention_bwd_dq_kernel[(triton.cdiv(queries, own.rows), heads)](
            q_scores, k, v, grad_out, sums, *of_queries, grad_q, *strides(q_scores, k, v, grad_out), scale, factor,
            queries, keys, heads, heads // groups,
            ROWS=own.rows, STEP=own.step, num_warps=own.warps, num_stages=own.stages, **options,
        )  # fmt: skip
    return grad_q, grad_k, grad_v
