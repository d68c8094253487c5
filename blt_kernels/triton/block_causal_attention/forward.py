"""Forward of block_causal_attention on CUDA: flash attention within documents packed end to end.

    s_ij = scale q_i . k_j for the keys [first_i, last_i) that query i attends to,  lse_i = log sum_j exp s_ij
    out_i = sum_j exp(s_ij - lse_i) v_j

Tiling: a program owns BLOCK_M packed queries of one head, whatever documents they are of, and streams the keys that
they attend to in tiles of BLOCK_N (ranges.py). So the grid is bounded by Tq, and many tiny documents cost no more than
one long document. Only tiles in which some pair is masked are masked. exp2 is used throughout, with scale * log2(e)
folded into the difference of score and maximum: one fused multiply-add in 16 bits up to a width of 128. That rounds
the maximum, and products may overflow where their scores do not. So a program whose maxima reach _LARGE, or whose sums
are not finite, starts anew: with queries times the power of two of `scales`, and it subtracts before it multiplies. In
fp32, where products take much longer than that, all programs do so at once.

In 16 bits the queries go from memory to shared memory as they are. Had registers changed them, ptxas would wait for
every wgmma before the next one (its message C7513), in the whole kernel. So starting anew stores the multiplied
queries to `out`, which the program owns for its queries, and loads them from there.

Flops: 4 E a (query, key) pair. Bytes: q and out once; k and v once for every block of queries, from L2: the blocks of
a head run side by side, those with the most keys first.

Programs are independent and nothing is added up by atomics: results are the same bit for bit from run to run. Nothing
is read on the host. decode.py has the kernel for few queries with a long cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.reference.block_causal_attention import AttentionMask
from blt_kernels.triton.block_causal_attention.decode import decode
from blt_kernels.triton.block_causal_attention.launch import (
    Launch,
    architecture,
    decode_splits,
    launch_options,
    max_decode_queries,
    padded_head_dim,
)
from blt_kernels.triton.block_causal_attention.ranges import load_ranges, next_range, ranges
from blt_kernels.triton.block_causal_attention.tiles import (
    attend_range,
    check,
    head_mask,
    loadable,
    multiply,
    packed_at,
    positive_scale,
    precision_of,
    processors,
    runs_here,
    scales,
    strides,
    tile_at,
)

_LARGE = tl.constexpr(1024.0)  # of scale * log2(e) * product: its rounding changes weights by up to 2^-15 below it
_INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_heads", "heads_per_kv_head"])
def block_causal_attention_fwd_kernel(
    q, k, v, out, lse, first, last,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    power, scale, natural_scale, num_queries, num_keys, num_heads, heads_per_kv_head,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of BLOCK_M queries of one head."""
    EVEN: tl.constexpr = HEAD_DIM == BLOCK_D
    head = tl.program_id(1).to(tl.int64)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_M  # late queries have the most keys
    offs_m = tl.arange(0, BLOCK_M)
    query = start + offs_m
    inside = query < num_queries
    first_key, last_key, gap = load_ranges(first, last, query, num_queries, num_keys)
    loaded = head_mask(inside, HEAD_DIM, BLOCK_D)
    q_tile = tl.load(tile_at(q + head * stride_qh, start, stride_qt, offs_m, BLOCK_D), mask=loaded, other=0.0)
    is_fp32: tl.constexpr = q_tile.dtype == tl.float32
    if is_fp32:
        q_tile = multiply(q_tile, power)
        power = 1.0
    k += head // heads_per_kv_head * stride_kh
    v += head // heads_per_kv_head * stride_vh

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    begin, end = next_range(first_key, last_key, gap, 0)
    while begin < end:
        acc, m_i, l_i = attend_range(
            acc, m_i, l_i, q_tile, k, v, stride_kt, stride_vt, scale * power, first_key, last_key, begin, end,
            BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION, EXACT=is_fp32 or BLOCK_D > 128,
        )  # fmt: skip
        begin, end = next_range(first_key, last_key, gap, end)

    attends = first_key < last_key
    m_i *= power
    if not is_fp32:
        # Infinities and NaN are from products that overflowed, or from exponents of a huge maximum.
        fine = (tl.abs(m_i * scale) < (_LARGE if BLOCK_D <= 128 else _INFINITY)) & (l_i < _INFINITY)
        if tl.max((attends & (fine == 0)).to(tl.int32)) > 0:
            offs_m += end  # 0 here, which no compiler knows, so that no address is kept in registers up to here
            loaded = head_mask(start + offs_m < num_queries, HEAD_DIM, BLOCK_D)
            q_tile = tl.load(tile_at(q + head * stride_qh, start, stride_qt, offs_m, BLOCK_D), mask=loaded, other=0.0)
            own = tile_at(out + head * HEAD_DIM, start, num_heads * HEAD_DIM, offs_m, BLOCK_D)
            tl.store(own, multiply(q_tile, power), mask=loaded)
            tl.debug_barrier()
            q_tile = tl.load(own, mask=loaded, other=0.0)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
            l_i = tl.zeros((BLOCK_M,), tl.float32)
            begin, end = next_range(first_key, last_key, gap, 0)
            while begin < end:  # with one stage and small tiles, since that is rare and should take few registers
                acc, m_i, l_i = attend_range(
                    acc, m_i, l_i, q_tile, k, v, stride_kt, stride_vt, scale, first_key, last_key, begin, end,
                    BLOCK_N // 2, HEAD_DIM, BLOCK_D, PRECISION, EXACT=True, STAGES=1,
                )  # fmt: skip
                begin, end = next_range(first_key, last_key, gap, end)
    acc = tl.where(attends[:, None], acc / tl.where(l_i == 0, 1.0, l_i)[:, None], 0.0)
    at = packed_at(out, query * num_heads + head, HEAD_DIM, BLOCK_D, EVEN and BLOCK_D <= 64)
    tl.store(at, acc.to(out.dtype.element_ty), mask=head_mask(inside, HEAD_DIM, BLOCK_D))
    lse_tile = tl.where(attends, m_i * natural_scale + tl.log(l_i), -float("inf"))
    tl.store(lse + query * num_heads + head, lse_tile, mask=inside)


def block_causal_attention_fwd_cuda(
    q: Tensor, k: Tensor, v: Tensor, *arguments: Any, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Run the operator, whose schema names the `arguments`. `launch` replaces that of `launch_options`."""
    if not runs_here(q):
        return reference.block_causal_attention_fwd_reference(q, k, v, *arguments)
    mask = AttentionMask(*arguments)
    check(q, k, v, mask)
    q, scale = positive_scale(mask.scale, q)
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    q, k, v = loadable(q), loadable(k), loadable(v)
    out, lse = q.new_empty(q.shape), q.new_empty((num_queries, num_heads), dtype=torch.float32)
    if not num_queries:
        return out, lse
    decoded = splits = 0
    if launch is None and not mask.same_bytes(num_queries, num_keys):
        splits = decode_splits(num_kv_heads, num_keys, mask.num_documents, processors(q))
        decoded = max_decode_queries(num_queries, mask.num_documents, splits)
    launch = launch or launch_options("fwd", head_dim, q.dtype, architecture(q))
    with torch.cuda.device_of(q):
        if decoded < num_queries:
            (first, last), _ = ranges(mask, q, k, skip=decoded)
            block_causal_attention_fwd_kernel[(triton.cdiv(num_queries, launch.block_m), num_heads)](
                q, k, v, out, lse, first, last, *strides(q, k, v), *scales(scale, q),
                num_queries, num_keys, num_heads, num_heads // num_kv_heads,
                BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
                PRECISION=precision_of(q), num_warps=launch.num_warps, num_stages=launch.num_stages,
                enable_fp_fusion=True,
            )  # fmt: skip
        if decoded:
            decode(q, k, v, out, lse, mask, scale, decoded, splits)
    return out, lse
