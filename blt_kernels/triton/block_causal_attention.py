"""block_causal_attention on CUDA: flash attention within documents packed end to end.

    s_ij = scale q_i . k_j for the keys [first_i, last_i) that query i sees,  lse_i = log sum_j exp s_ij
    out_i = sum_j exp(s_ij - lse_i) v_j

A program owns `rows` queries of one head, packed rows whatever documents they are of, and streams the keys that they
see past them in steps (attention_ranges.py). So the grid is bounded by Tq, and many tiny documents cost no more than a
long one. Only steps that some query does not see whole are masked. exp2 is used throughout, with scale * log2(e)
folded into the difference of score and maximum: one fused multiply-add in 16 bits up to a width of 128. That rounds
the maximum, so a program whose maxima reach _LARGE starts anew, and subtracts before it multiplies. In fp32 and for
wider heads, where products take much longer, all programs do so at once.

Flops: 4 E a (query, key) pair. Bytes: q and out once; k and v once for every block of queries, from L2: the blocks of
a head run side by side, the longest rows of a document first.

Programs are independent and nothing is added up by atomics: results are the same bit for bit from run to run. Nothing
is read on the host. The backward is in attention_backward.py, few queries with a long cache in attention_decode.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.triton.attention_decode import FEW, decode
from blt_kernels.triton.attention_launch import Launch, architecture, launch_options, padded_width
from blt_kernels.triton.attention_ranges import load_ranges, next_run, ranges
from blt_kernels.triton.attention_tiles import (
    attend_run,
    check,
    multiply,
    packed_at,
    precision_of,
    row_mask,
    rows_of,
    runs_here,
    scales,
    strides,
    tile_at,
)

_LARGE = tl.constexpr(1024.0)  # of scale * log2(e) * product: its rounding changes weights by up to 2^-15 below it


@triton.jit(do_not_specialize=["queries", "heads", "group", "width"])
def block_causal_attention_fwd_kernel(
    q, k, v, out, lse, first, last,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    power, scale, natural_scale, queries, heads, group, width,
    ROWS: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of ROWS queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * ROWS  # late queries have the most keys
    local = tl.arange(0, ROWS)
    row = start + local
    inside = row < queries
    first_key, last_key, gap = load_ranges(first, last, row, queries)
    loaded = row_mask(inside, width, E, EVEN)
    q_rows = tl.load(tile_at(q + head * stride_qh, start, stride_qt, local, E), mask=loaded, other=0.0)
    q_rows = multiply(q_rows, power)
    k += head // group * stride_kh
    v += head // group * stride_vh

    acc = tl.zeros((ROWS, E), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    exact: tl.constexpr = (q_rows.dtype == tl.float32) | (E > 128)  # where products take much longer than exponents
    begin, end = next_run(first_key, last_key, gap, 0)
    while begin < end:
        acc, top, total = attend_run(
            acc, top, total, q_rows, k, v, stride_kt, stride_vt, scale, first_key, last_key, begin, end, width,
            STEP, E, EVEN, PRECISION, EXACT=exact,
        )  # fmt: skip
        begin, end = next_run(first_key, last_key, gap, end)

    seen = first_key < last_key
    if not exact:
        overflowed = (total < float("inf")) == 0  # or NaN: an earlier maximum was huge
        if tl.max((seen & ((tl.abs(top * scale) >= _LARGE) | overflowed)).to(tl.int32)) > 0:
            acc = tl.zeros((ROWS, E), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            begin, end = next_run(first_key, last_key, gap, 0)
            while begin < end:  # with one stage, since that is rare and two pipelines take too many registers
                acc, top, total = attend_run(
                    acc, top, total, q_rows, k, v, stride_kt, stride_vt, scale, first_key, last_key, begin, end, width,
                    STEP, E, EVEN, PRECISION, EXACT=True, STAGES=1,
                )  # fmt: skip
                begin, end = next_run(first_key, last_key, gap, end)
    acc = tl.where(seen[:, None], acc / tl.where(total == 0, 1.0, total)[:, None], 0.0)
    at = packed_at(out, row * heads + head, width, E, EVEN and E <= 64)
    tl.store(at, acc.to(out.dtype.element_ty), mask=loaded)
    lse_rows = tl.where(seen, top * natural_scale + tl.log(total), -float("inf"))
    tl.store(lse + row * heads + head, lse_rows, mask=inside)


def block_causal_attention_fwd_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    causal: bool,
    scale: float | None,
    seqused_k: Tensor | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Run forward; see `ops.block_causal_attention`. `launch` takes the place of what `launch_options` says."""
    if not runs_here(q):
        return reference.block_causal_attention_fwd_reference(
            q, k, v, cu_seqlens_q, cu_seqlens_k, window, causal, scale, seqused_k
        )
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, window, seqused_k)
    (queries, heads, width), groups = q.shape, k.shape[1]
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    out, lse = q.new_empty(q.shape), q.new_empty((queries, heads), dtype=torch.float32)
    if not queries:
        return out, lse
    documents = cu_seqlens_q.shape[0] - 1
    cached = cu_seqlens_k is not None or seqused_k is not None
    with torch.cuda.device_of(q):
        if cached and launch is None and queries <= FEW * documents:
            decode(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, window, causal, scale, seqused_k)
            return out, lse
        launch = launch or launch_options("fwd", width, q.dtype, window, architecture(q))
        first, last = ranges(False, queries, k.shape[0], cu_seqlens_q, cu_seqlens_k, window, causal, seqused_k)
        padded = padded_width(width)
        block_causal_attention_fwd_kernel[(triton.cdiv(queries, launch.rows), heads)](
            q, k, v, out, lse, first, last, *strides(q, k, v), *scales(scale, q),
            queries, heads, heads // groups, width,
            ROWS=launch.rows, STEP=launch.step, E=padded, EVEN=padded == width,
            PRECISION=precision_of(q), num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
