"""block_causal_attention on CUDA: flash attention within documents packed end to end.

    s_ij = scale q_i . k_j for the keys [first_i, last_i) that query i sees,  lse_i = log sum_j exp s_ij
    out_i = sum_j exp(s_ij - lse_i) v_j

A program owns `rows` queries of one head, packed rows whatever documents they are of, and streams the keys that they
see past them in steps (attention_ranges.py). So the grid is bounded by Tq, and many tiny documents cost no more than a
long one. Only steps that some query does not see whole are masked. exp2 is used throughout, with scale * log2(e)
folded into the difference of score and maximum: one fused multiply-add in 16 bits up to a width of 128. That rounds
the maximum, and products may overflow where their scores do not. So a program whose maxima reach _LARGE, or whose sums
are not finite, starts anew: with queries times the power of two of `scales`, and it subtracts before it multiplies. In
fp32, where products take much longer than that, all programs do so at once.

In 16 bits the queries go from memory to shared memory as they are. Had registers changed them, ptxas would wait for
every wgmma before the next one (its message C7513), in the whole kernel. So starting anew stores the multiplied
queries to `out`, whose rows the program owns, and loads them from there.

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
from blt_kernels.triton.attention_decode import decode
from blt_kernels.triton.attention_launch import (
    Launch,
    architecture,
    decode_few,
    decode_splits,
    launch_options,
    padded_width,
)
from blt_kernels.triton.attention_ranges import load_ranges, next_run, ranges
from blt_kernels.triton.attention_tiles import (
    attend_run,
    check,
    multiply,
    packed_at,
    positive_scale,
    precision_of,
    processors,
    row_mask,
    rows_of,
    runs_here,
    scales,
    strides,
    tile_at,
)

_LARGE = tl.constexpr(1024.0)  # of scale * log2(e) * product: its rounding changes weights by up to 2^-15 below it
_INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group"])
def block_causal_attention_fwd_kernel(
    q, k, v, out, lse, first, last,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    power, scale, natural_scale, queries, keys, heads, group,
    ROWS: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of ROWS queries of one head."""
    EVEN: tl.constexpr = WIDTH == E
    head = tl.program_id(1).to(tl.int64)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * ROWS  # late queries have the most keys
    local = tl.arange(0, ROWS)
    row = start + local
    inside = row < queries
    first_key, last_key, gap = load_ranges(first, last, row, queries, keys)
    loaded = row_mask(inside, WIDTH, E, EVEN)
    q_rows = tl.load(tile_at(q + head * stride_qh, start, stride_qt, local, E), mask=loaded, other=0.0)
    is_fp32: tl.constexpr = q_rows.dtype == tl.float32
    if is_fp32:
        q_rows = multiply(q_rows, power)
        power = 1.0
    k += head // group * stride_kh
    v += head // group * stride_vh

    acc = tl.zeros((ROWS, E), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    begin, end = next_run(first_key, last_key, gap, 0)
    while begin < end:
        acc, top, total = attend_run(
            acc, top, total, q_rows, k, v, stride_kt, stride_vt, scale * power, first_key, last_key, begin, end, WIDTH,
            STEP, E, EVEN, PRECISION, EXACT=is_fp32 or E > 128,
        )  # fmt: skip
        begin, end = next_run(first_key, last_key, gap, end)

    seen = first_key < last_key
    top *= power
    if not is_fp32:
        # Infinities and NaN are from products that overflowed, or from exponents of a huge maximum.
        fine = (tl.abs(top * scale) < (_LARGE if E <= 128 else _INFINITY)) & (total < _INFINITY)
        if tl.max((seen & (fine == 0)).to(tl.int32)) > 0:
            local += end  # 0 here, which no compiler knows, so that no address is kept in registers up to here
            loaded = row_mask(start + local < queries, WIDTH, E, EVEN)
            q_rows = tl.load(tile_at(q + head * stride_qh, start, stride_qt, local, E), mask=loaded, other=0.0)
            own_rows = tile_at(out + head * WIDTH, start, heads * WIDTH, local, E)
            tl.store(own_rows, multiply(q_rows, power), mask=loaded)
            tl.debug_barrier()
            q_rows = tl.load(own_rows, mask=loaded, other=0.0)
            acc = tl.zeros((ROWS, E), tl.float32)
            top = tl.full((ROWS,), -float("inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            begin, end = next_run(first_key, last_key, gap, 0)
            while begin < end:  # with one stage and small steps, since that is rare and should take few registers
                acc, top, total = attend_run(
                    acc, top, total, q_rows, k, v, stride_kt, stride_vt, scale, first_key, last_key, begin, end, WIDTH,
                    STEP // 2, E, EVEN, PRECISION, EXACT=True, STAGES=1,
                )  # fmt: skip
                begin, end = next_run(first_key, last_key, gap, end)
    acc = tl.where(seen[:, None], acc / tl.where(total == 0, 1.0, total)[:, None], 0.0)
    at = packed_at(out, row * heads + head, WIDTH, E, EVEN and E <= 64)
    tl.store(at, acc.to(out.dtype.element_ty), mask=row_mask(inside, WIDTH, E, EVEN))
    lse_rows = tl.where(seen, top * natural_scale + tl.log(total), -float("inf"))
    tl.store(lse + row * heads + head, lse_rows, mask=inside)


def block_causal_attention_fwd_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    causal: bool,
    scale: float | None,
    seqused_k: Tensor | None,
    made: Tensor | None = None,
    num_documents: int = 1,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Run forward; see `ops.block_causal_attention`. `launch` takes the place of what `launch_options` says.

    `made` are the ranges that are at hand. Without `cu_seqlens_q` there are `num_documents` of one length.
    """
    if not runs_here(q):
        return reference.block_causal_attention_fwd_reference(
            q, k, v, cu_seqlens_q, cu_seqlens_k, window, causal, scale, seqused_k, None, num_documents
        )
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, num_documents, window, seqused_k)
    q, scale = positive_scale(scale, q)
    (queries, heads, width), groups = q.shape, k.shape[1]
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    out, lse = q.new_empty(q.shape), q.new_empty((queries, heads), dtype=torch.float32)
    if not queries:
        return out, lse
    documents = num_documents if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    few = splits = 0
    if (k.shape[0] != queries or cu_seqlens_k is not None or seqused_k is not None) and launch is None:
        splits = decode_splits(groups, k.shape[0], documents, processors(q))
        few = decode_few(queries, documents, splits)
    launch = launch or launch_options("fwd", width, q.dtype, architecture(q))
    rest = cu_seqlens_q, cu_seqlens_k, documents, window, causal
    with torch.cuda.device_of(q):
        if few < queries:
            (first, last), _ = ranges(q, queries, k.shape[0], *rest, seqused_k, skip=few, made=made)
            block_causal_attention_fwd_kernel[(triton.cdiv(queries, launch.rows), heads)](
                q, k, v, out, lse, first, last, *strides(q, k, v), *scales(scale, q),
                queries, k.shape[0], heads, heads // groups,
                ROWS=launch.rows, STEP=launch.step, E=padded_width(width), WIDTH=width, PRECISION=precision_of(q),
                num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
            )  # fmt: skip
        if few:
            decode(q, k, v, out, lse, *rest, scale, seqused_k, few, splits)
    return out, lse
