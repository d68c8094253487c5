"""One to a few queries a document with long caches: the keys of a query are split over programs.

A program owns one query with the heads that read one key head, as the rows of a tile, and a part of the keys that this
query sees; the parts are equal, whatever the used length of the cache. It writes the attention over its part, the
greatest product and the total weight relative to it, which a second kernel combines in a fixed order; in the logarithm
of the weight large scores would hide it. Products are subtracted before they are scaled, so scores may be of any size.

Bytes: the used keys and values once a query, which is the bound. Queries of one document read them from L2 again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.triton.attention_launch import MAX_SPLITS, architecture, decode_splits, launch_options, padded_width
from blt_kernels.triton.attention_ranges import keys_of_query, reach, search_arguments
from blt_kernels.triton.attention_tiles import (
    attend_run,
    multiply,
    packed_at,
    precision_of,
    processors,
    row_mask,
    scales,
    strides,
)

FEW = 8  # queries a document, on average, up to which the keys are split
_SPLITS_PER_STEP = 16
_COUNTS = ["documents", "top_bit", "queries", "keys", "window", "heads", "group", "blocks", "width"]


@triton.jit(do_not_specialize=_COUNTS)
def block_causal_attention_decode_kernel(
    q, k, v, out, lse, cu_q, cu_k, used, documents, top_bit, queries, keys, window,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, power, scale, natural_scale,
    heads, group, blocks, width,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, USED: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of one query over one part of its keys.

    If there are several parts, top and total take the place of lse: ``[2, parts, queries, heads]``.
    """
    query = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1).to(tl.int64) // blocks
    local = tl.program_id(1) % blocks * ROWS + tl.arange(0, ROWS)  # of the heads of a group
    part = tl.program_id(2)
    first, last = keys_of_query(query, cu_q, cu_k, used, documents, top_bit, keys, window, CAUSAL, WINDOWED, USED)
    share = tl.cdiv(tl.cdiv(last - first, tl.num_programs(2)), STEP) * STEP
    begin = tl.minimum(first + part * share, last)
    end = tl.minimum(begin + share, last)

    head = key_head * group + local
    column = tl.arange(0, E)
    stored = local < group
    loaded = row_mask(local < tl.where(begin < end, group, 0), width, E, EVEN)
    q_rows = tl.load(q + query * stride_qt + head[:, None] * stride_qh + column[None, :], mask=loaded, other=0.0)
    q_rows = multiply(q_rows, power)
    acc = tl.zeros((ROWS, E), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    none = tl.zeros((ROWS,), tl.int64)
    acc, top, total = attend_run(
        acc, top, total, q_rows, k + key_head * stride_kh, v + key_head * stride_vh, stride_kt, stride_vt,
        scale, none + begin, none + end, begin, end, width, STEP, E, EVEN, PRECISION, EXACT=True,
    )  # fmt: skip

    acc = tl.where(begin < end, acc / tl.where(total == 0, 1.0, total)[:, None], 0.0)
    row = (part.to(tl.int64) * queries + query) * heads + head
    at = packed_at(out, row, width, E, EVEN)
    tl.store(at, acc.to(out.dtype.element_ty), mask=row_mask(stored, width, E, EVEN))
    if tl.num_programs(2) == 1:
        tl.store(lse + row, tl.where(begin < end, top * natural_scale + tl.log(total), -float("inf")), mask=stored)
    else:
        tl.store(lse + row, top, mask=stored)
        tl.store(lse + tl.num_programs(2).to(tl.int64) * queries * heads + row, total, mask=stored)


@triton.jit(do_not_specialize=["rows", "width", "splits"])
def block_causal_attention_combine_kernel(
    parts, sums, out, lse, scale, natural_scale, rows, width, splits,
    MOST: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of one query and head from what the `splits` parts of its keys wrote."""
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, MOST).to(tl.int64)
    totals = sums + splits.to(tl.int64) * rows
    tops = tl.load(sums + every * rows + row, mask=every < splits, other=-float("inf"))
    top = tl.max(tops, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.load(totals + every * rows + row, mask=every < splits, other=0.0)
    total = tl.sum(total * tl.exp2((tops - base) * scale), 0)
    column = tl.arange(0, E)
    acc = tl.zeros((E,), tl.float32)
    for begin in tl.range(0, splits, STEP):
        part = (begin + tl.arange(0, STEP)).to(tl.int64)
        own_top = tl.load(sums + part * rows + row, mask=part < splits, other=-float("inf"))
        own_total = tl.load(totals + part * rows + row, mask=part < splits, other=0.0)
        share = own_total * tl.exp2((own_top - base) * scale)
        at = (part * rows + row)[:, None] * width + column[None, :]
        values = tl.load(parts + at, mask=(part < splits)[:, None] & (column < width)[None, :], other=0.0)
        acc += tl.sum(values * share[:, None], 0)
    acc = acc / tl.where(total == 0, 1.0, total)
    tl.store(out + row * width + column, acc.to(out.dtype.element_ty), mask=column < width)
    tl.store(lse + row, top * natural_scale + tl.log(total))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    causal: bool,
    scale: float | None,
    seqused_k: Tensor | None,
    splits: int | None = None,
) -> None:
    """Write `out` and `lse` of contiguous rows; `splits` takes the place of what `decode_splits` says."""
    (queries, heads, width), (keys, groups, _) = q.shape, k.shape
    documents = cu_seqlens_q.shape[0] - 1
    launch = launch_options("decode", width, q.dtype, window, architecture(q))
    splits = splits or decode_splits(queries, groups, keys, documents, processors(q))
    padded, blocks = padded_width(width), triton.cdiv(heads // groups, launch.rows)
    parts, sums = out, lse
    power, factor, natural_factor = scales(scale, q)
    if splits > 1:
        parts = q.new_empty((splits, *q.shape), dtype=torch.float32)
        sums = q.new_empty((2, splits, queries, heads), dtype=torch.float32)
    block_causal_attention_decode_kernel[(queries, groups * blocks, splits)](
        q, k, v, parts, sums, *search_arguments(cu_seqlens_q, cu_seqlens_k, seqused_k), queries, keys, reach(window),
        *strides(q, k, v), power, factor, natural_factor, heads, heads // groups, blocks, width,
        CAUSAL=causal, WINDOWED=window is not None, USED=seqused_k is not None,
        ROWS=launch.rows, STEP=launch.step, E=padded, EVEN=padded == width, PRECISION=precision_of(q),
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        block_causal_attention_combine_kernel[(queries * heads,)](
            parts, sums, out, lse, factor, natural_factor, queries * heads, width, splits,
            MOST=MAX_SPLITS, STEP=_SPLITS_PER_STEP, E=padded, num_warps=4,
        )  # fmt: skip
