"""Decodes few queries a document with long caches. Queries and heads share the keys, which are split over programs.

    s_ij = scale q_i . k_j,  out_i = sum_j exp(s_ij - lse_i) v_j,  lse_i = log sum_j exp s_ij

Tiling: the queries of a document times the heads that read one key head are packed into tiles of BLOCK_M pairs (query,
head): 32 are 32 queries of one head, or 4 queries of 8 heads. A program owns a tile of one document and one key head,
and a part of the keys that its queries attend to; the parts are equal, whatever the used length of the cache. Documents
with more than `max_queries` queries are left to the forward kernel, which has run before: their programs exit at once,
so which kernel computes a document is decided where its length is known, on the device. The queries beyond the last
document make one more, which has no keys: they get 0.

A program writes the attention over its part, the maximum of the products and the sum of the weights relative to it,
which a second kernel combines in a fixed order; in the logarithm of the weight large scores would hide it. Products are
subtracted before they are scaled, so scores may be of any size.

Bytes: the used keys and values once a tile, which is the bound: once a document up to BLOCK_M queries times heads. More
tiles of one document read them from L2 again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.reference.block_causal_attention import AttentionMask
from blt_kernels.triton.block_causal_attention.launch import (
    MAX_SPLITS,
    architecture,
    decode_tiles,
    launch_options,
    padded_head_dim,
)
from blt_kernels.triton.block_causal_attention.ranges import (
    attended_keys,
    document_bounds,
    mask_constants,
    offset_arguments,
    offset_of,
    window_argument,
)
from blt_kernels.triton.block_causal_attention.tiles import (
    attend_range,
    head_mask,
    multiply,
    packed_at,
    precision_of,
    scales,
    strides,
)

_BLOCK_SPLITS = 16
_COUNTS = [
    "documents", "length_q", "length_k", "num_queries", "num_keys", "window", "max_queries", "num_heads",
    "heads_per_kv_head", "splits",
]  # fmt: skip


@triton.jit
def decoded_bounds(
    document, cu_q, cu_k, used, documents, length_q, length_k, num_queries, max_queries, USED: tl.constexpr
):
    """Return where queries and keys of a document begin and end; no queries if there are more than `max_queries`.

    Document number `documents` is the queries beyond the last one, without keys.
    """
    begin_q, end_q, begin_k, end_k = document_bounds(document, cu_q, cu_k, used, documents, length_q, length_k, USED)
    beyond = document == documents
    begin_q = tl.where(beyond, offset_of(cu_q, documents, length_q, True), begin_q)
    begin_q = tl.minimum(tl.maximum(begin_q, 0), num_queries)
    end_q = tl.minimum(tl.maximum(tl.where(beyond, num_queries, end_q), begin_q), num_queries)
    return begin_q, tl.where(end_q - begin_q <= max_queries, end_q, begin_q), begin_k, end_k


@triton.jit(do_not_specialize=_COUNTS)
def block_causal_attention_decode_kernel(
    q, k, v, out, lse, cu_q, cu_k, used, documents, length_q, length_k, num_queries, num_keys, window, max_queries,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, power, scale, natural_scale,
    num_heads, heads_per_kv_head, splits,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, USED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of tiles of one document and key head over one part of their keys.

    If there are several parts, they are ``out [splits, documents + 1, max_queries, num_heads, HEAD_DIM]``, and m_i and
    l_i take the place of lse: ``[2, splits, documents + 1, max_queries, num_heads]``.
    """
    EVEN: tl.constexpr = HEAD_DIM == BLOCK_D
    document = tl.program_id(0)
    key_head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2) % splits
    begin_q, end_q, begin_k, end_k = decoded_bounds(
        document, cu_q, cu_k, used, documents, length_q, length_k, num_queries, max_queries, USED
    )
    pairs = ((end_q - begin_q) * heads_per_kv_head).to(tl.int32)
    offs_d = tl.arange(0, BLOCK_D)
    start = tl.program_id(2) // splits * BLOCK_M
    while start < pairs:
        pair = start + tl.arange(0, BLOCK_M)
        inside = pair < pairs
        query = begin_q + pair // heads_per_kv_head
        head = key_head * heads_per_kv_head + pair % heads_per_kv_head
        first, last = attended_keys(query, end_q, begin_k, end_k, num_keys, window, CAUSAL, WINDOWED)
        first, last = first.to(tl.int32), last.to(tl.int32)
        attends = inside & (first < last)
        high = tl.max(tl.where(attends, last, 0))
        low = tl.minimum(tl.min(tl.where(attends, first, 2147483647)), high)
        first, last = tl.where(inside, first, low), tl.where(inside, last, high)  # so that the others mask nothing
        share = tl.cdiv(tl.cdiv(high - low, splits), BLOCK_N) * BLOCK_N
        begin = tl.minimum(low.to(tl.int64) + part.to(tl.int64) * share, high).to(tl.int32)
        end = begin + tl.minimum(share, high - begin)

        loaded = head_mask(pair < tl.where(begin < end, pairs, 0), HEAD_DIM, BLOCK_D)
        q_at = q + query[:, None] * stride_qt + head[:, None] * stride_qh + offs_d[None, :]
        q_tile = multiply(tl.load(q_at, mask=loaded, other=0.0), power)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        acc, m_i, l_i = attend_range(
            acc, m_i, l_i, q_tile, k + key_head * stride_kh, v + key_head * stride_vh, stride_kt, stride_vt,
            scale, first, last, begin, end, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION, EXACT=True,
        )  # fmt: skip

        acc = acc / tl.where(l_i == 0, 1.0, l_i)[:, None]
        if splits == 1:
            stored = query * num_heads + head
            lse_tile = tl.where(first < last, m_i * natural_scale + tl.log(l_i), -float("inf"))
            tl.store(lse + stored, lse_tile, mask=inside)
        else:
            slots = (documents.to(tl.int64) + 1) * max_queries * num_heads
            local = pair // heads_per_kv_head
            stored = part * slots + (document.to(tl.int64) * max_queries + local) * num_heads + head
            tl.store(lse + stored, m_i, mask=inside)
            tl.store(lse + splits * slots + stored, l_i, mask=inside)
        at = packed_at(out, stored, HEAD_DIM, BLOCK_D, EVEN)
        tl.store(at, acc.to(out.dtype.element_ty), mask=head_mask(inside, HEAD_DIM, BLOCK_D))
        start += tl.num_programs(2) // splits * BLOCK_M


@triton.jit(
    do_not_specialize=[
        "documents", "length_q", "length_k", "num_queries", "max_queries", "num_heads", "head_dim", "splits"
    ]
)  # fmt: skip
def block_causal_attention_combine_kernel(
    parts, sums, out, lse, cu_q, cu_k, used, documents, length_q, length_k, num_queries, max_queries,
    scale, natural_scale, num_heads, head_dim, splits,
    MAX_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of one query and head from what the `splits` parts of its keys wrote."""
    slot = tl.program_id(0).to(tl.int64)
    document = slot // num_heads // max_queries
    local = slot // num_heads % max_queries
    begin_q, end_q, _, _ = decoded_bounds(
        document, cu_q, cu_k, used, documents, length_q, length_k, num_queries, max_queries, False
    )
    if local < end_q - begin_q:
        stored = (begin_q + local) * num_heads + slot % num_heads
        slots = tl.num_programs(0).to(tl.int64)
        every = tl.arange(0, MAX_SPLITS).to(tl.int64)
        l_sums = sums + splits.to(tl.int64) * slots
        m_parts = tl.load(sums + every * slots + slot, mask=every < splits, other=-float("inf"))
        m_i = tl.max(m_parts, 0)
        base = tl.where(m_i == -float("inf"), 0.0, m_i)
        l_parts = tl.load(l_sums + every * slots + slot, mask=every < splits, other=0.0)
        l_i = tl.sum(l_parts * tl.exp2((m_parts - base) * scale), 0)
        offs_d = tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_D,), tl.float32)
        for begin in tl.range(0, splits, BLOCK_SPLITS):
            part = (begin + tl.arange(0, BLOCK_SPLITS)).to(tl.int64)
            m_part = tl.load(sums + part * slots + slot, mask=part < splits, other=-float("inf"))
            l_part = tl.load(l_sums + part * slots + slot, mask=part < splits, other=0.0)
            share = l_part * tl.exp2((m_part - base) * scale)
            at = (part * slots + slot)[:, None] * head_dim + offs_d[None, :]
            values = tl.load(parts + at, mask=(part < splits)[:, None] & (offs_d < head_dim)[None, :], other=0.0)
            acc += tl.sum(values * share[:, None], 0)
        acc = acc / tl.where(l_i == 0, 1.0, l_i)
        tl.store(out + stored * head_dim + offs_d, acc.to(out.dtype.element_ty), mask=offs_d < head_dim)
        tl.store(lse + stored, m_i * natural_scale + tl.log(l_i))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    scale: float,
    max_queries: int,
    splits: int,
) -> None:
    """Write contiguous `out` and `lse` of documents with up to `max_queries` queries, and of queries beyond the last.

    `max_queries` and `splits` are those of `max_decode_queries` and `decode_splits`.
    """
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    heads_per_kv_head = num_heads // num_kv_heads
    launch = launch_options("decode", head_dim, q.dtype, architecture(q))
    tiles = decode_tiles(num_queries, mask.num_documents, max_queries, heads_per_kv_head, launch.block_m)
    parts, sums = out, lse
    power, factor, natural_factor = scales(scale, q)
    if splits > 1:
        slots = splits, mask.num_documents + 1, max_queries, num_heads
        parts, sums = (q.new_empty(shape, dtype=torch.float32) for shape in ((*slots, head_dim), (2, *slots)))
    offsets = offset_arguments(mask, num_queries, num_keys)
    block_causal_attention_decode_kernel[(mask.num_documents + 1, num_kv_heads, tiles * splits)](
        q, k, v, parts, sums, *offsets, num_queries, num_keys, window_argument(mask), max_queries,
        *strides(q, k, v), power, factor, natural_factor, num_heads, heads_per_kv_head, splits,
        **mask_constants(mask), BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim), PRECISION=precision_of(q),
        num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        block_causal_attention_combine_kernel[((mask.num_documents + 1) * max_queries * num_heads,)](
            parts, sums, out, lse, *offsets, num_queries, max_queries, factor, natural_factor,
            num_heads, head_dim, splits,
            MAX_SPLITS=MAX_SPLITS, BLOCK_SPLITS=_BLOCK_SPLITS, BLOCK_D=padded_head_dim(head_dim), num_warps=1,
        )  # fmt: skip
