"""Few queries a document with long caches: queries and heads share the keys, which are split over programs.

    s_ij = scale q_i . k_j,  out_i = sum_j exp(s_ij - lse_i) v_j,  lse_i = log sum_j exp s_ij

The rows of a document are its queries times the heads that read one key head, packed: 32 rows are 32 queries of one
head, or 4 queries of 8 heads. A program owns a tile of rows of one document and one key head, and a part of the keys
that these rows attend to; the parts are equal, whatever the used length of the cache. Documents with more than `few`
queries are left to the forward kernel, which has run before: their programs exit at once, so which kernel computes a
document is decided where its length is known, on the device. Behind the last document is one that has no keys: the
rest of the rows, which get 0.

A program writes the attention over its part, the greatest product and the total weight relative to it, which a second
kernel combines in a fixed order; in the logarithm of the weight large scores would hide it. Products are subtracted
before they are scaled, so scores may be of any size.

Bytes: the used keys and values once a tile, which is the bound: once a document up to `rows` queries times heads. More
tiles of one document read them from L2 again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.triton.attention_launch import (
    MAX_SPLITS,
    architecture,
    decode_tiles,
    launch_options,
    padded_width,
)
from blt_kernels.triton.attention_ranges import attended_keys, documents_rows, offset_of, reach, search_arguments
from blt_kernels.triton.attention_tiles import (
    attend_run,
    multiply,
    packed_at,
    precision_of,
    row_mask,
    scales,
    strides,
)

_SPLITS_PER_STEP = 16
_COUNTS = ["documents", "length_q", "length_k", "queries", "keys", "window", "few", "heads", "group", "splits"]


@triton.jit
def rows_of_document(document, cu_q, cu_k, used, documents, length_q, length_k, queries, few, USED: tl.constexpr):
    """Return where queries and keys of a document begin and end; it has no queries if there are more than `few`.

    Document number `documents` is the queries behind the last one, without keys.
    """
    begin_q, end_q, begin_k, end_k = documents_rows(document, cu_q, cu_k, used, documents, length_q, length_k, USED)
    rest = document == documents
    begin_q = tl.where(rest, offset_of(cu_q, documents, length_q, True), begin_q)
    begin_q = tl.minimum(tl.maximum(begin_q, 0), queries)
    end_q = tl.minimum(tl.maximum(tl.where(rest, queries, end_q), begin_q), queries)
    return begin_q, tl.where(end_q - begin_q <= few, end_q, begin_q), begin_k, end_k


@triton.jit(do_not_specialize=_COUNTS)
def block_causal_attention_decode_kernel(
    q, k, v, out, lse, cu_q, cu_k, used, documents, length_q, length_k, queries, keys, window, few,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, power, scale, natural_scale,
    heads, group, splits,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, USED: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of tiles of rows of one document and key head over one part of their keys.

    If there are several parts, they are ``out [splits, documents + 1, few, heads, WIDTH]``, and top and total take the
    place of lse: ``[2, splits, documents + 1, few, heads]``.
    """
    EVEN: tl.constexpr = WIDTH == E
    document = tl.program_id(0)
    key_head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2) % splits
    begin_q, end_q, begin_k, end_k = rows_of_document(
        document, cu_q, cu_k, used, documents, length_q, length_k, queries, few, USED
    )
    rows = ((end_q - begin_q) * group).to(tl.int32)
    column = tl.arange(0, E)
    start = tl.program_id(2) // splits * ROWS
    while start < rows:
        row = start + tl.arange(0, ROWS)
        live = row < rows
        query = begin_q + row // group
        head = key_head * group + row % group
        first, last = attended_keys(query, end_q, begin_k, end_k, keys, window, CAUSAL, WINDOWED)
        first, last = first.to(tl.int32), last.to(tl.int32)
        some = live & (first < last)
        high = tl.max(tl.where(some, last, 0))
        low = tl.minimum(tl.min(tl.where(some, first, 2147483647)), high)
        first, last = tl.where(live, first, low), tl.where(live, last, high)  # so that the others mask nothing
        share = tl.cdiv(tl.cdiv(high - low, splits), STEP) * STEP
        begin = tl.minimum(low.to(tl.int64) + part.to(tl.int64) * share, high).to(tl.int32)
        end = begin + tl.minimum(share, high - begin)

        loaded = row_mask(row < tl.where(begin < end, rows, 0), WIDTH, E, EVEN)
        q_at = q + query[:, None] * stride_qt + head[:, None] * stride_qh + column[None, :]
        q_rows = multiply(tl.load(q_at, mask=loaded, other=0.0), power)
        acc = tl.zeros((ROWS, E), tl.float32)
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc, top, total = attend_run(
            acc, top, total, q_rows, k + key_head * stride_kh, v + key_head * stride_vh, stride_kt, stride_vt,
            scale, first, last, begin, end, WIDTH, STEP, E, EVEN, PRECISION, EXACT=True,
        )  # fmt: skip

        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        if splits == 1:
            stored = query * heads + head
            lse_rows = tl.where(first < last, top * natural_scale + tl.log(total), -float("inf"))
            tl.store(lse + stored, lse_rows, mask=live)
        else:
            slots = (documents.to(tl.int64) + 1) * few * heads
            stored = part * slots + (document.to(tl.int64) * few + row // group) * heads + head
            tl.store(lse + stored, top, mask=live)
            tl.store(lse + splits * slots + stored, total, mask=live)
        at = packed_at(out, stored, WIDTH, E, EVEN)
        tl.store(at, acc.to(out.dtype.element_ty), mask=row_mask(live, WIDTH, E, EVEN))
        start += tl.num_programs(2) // splits * ROWS


@triton.jit(do_not_specialize=["documents", "length_q", "length_k", "queries", "few", "heads", "width", "splits"])
def block_causal_attention_combine_kernel(
    parts, sums, out, lse, cu_q, cu_k, used, documents, length_q, length_k, queries, few, scale, natural_scale,
    heads, width, splits,
    MOST: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of one query and head from what the `splits` parts of its keys wrote."""
    slot = tl.program_id(0).to(tl.int64)
    document = slot // heads // few
    local = slot // heads % few
    begin_q, end_q, _, _ = rows_of_document(
        document, cu_q, cu_k, used, documents, length_q, length_k, queries, few, False
    )
    if local < end_q - begin_q:
        row = (begin_q + local) * heads + slot % heads
        slots = tl.num_programs(0).to(tl.int64)
        every = tl.arange(0, MOST).to(tl.int64)
        totals = sums + splits.to(tl.int64) * slots
        tops = tl.load(sums + every * slots + slot, mask=every < splits, other=-float("inf"))
        top = tl.max(tops, 0)
        base = tl.where(top == -float("inf"), 0.0, top)
        total = tl.load(totals + every * slots + slot, mask=every < splits, other=0.0)
        total = tl.sum(total * tl.exp2((tops - base) * scale), 0)
        column = tl.arange(0, E)
        acc = tl.zeros((E,), tl.float32)
        for begin in tl.range(0, splits, STEP):
            part = (begin + tl.arange(0, STEP)).to(tl.int64)
            own_top = tl.load(sums + part * slots + slot, mask=part < splits, other=-float("inf"))
            own_total = tl.load(totals + part * slots + slot, mask=part < splits, other=0.0)
            share = own_total * tl.exp2((own_top - base) * scale)
            at = (part * slots + slot)[:, None] * width + column[None, :]
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
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    documents: int,
    window: int | None,
    causal: bool,
    scale: float,
    seqused_k: Tensor | None,
    few: int,
    splits: int,
) -> None:
    """Write contiguous `out` and `lse` of documents with up to `few` queries, and of as many behind the last one.

    `few` and `splits` are those of `decode_few` and `decode_splits`.
    """
    (queries, heads, width), (keys, groups, _) = q.shape, k.shape
    launch = launch_options("decode", width, q.dtype, architecture(q))
    tiles = decode_tiles(queries, documents, few, heads // groups, launch.rows)
    parts, sums = out, lse
    power, factor, natural_factor = scales(scale, q)
    if splits > 1:
        slots = splits, documents + 1, few, heads
        parts, sums = (q.new_empty(shape, dtype=torch.float32) for shape in ((*slots, width), (2, *slots)))
    search = search_arguments(cu_seqlens_q, cu_seqlens_k, documents, queries, keys, seqused_k)
    block_causal_attention_decode_kernel[(documents + 1, groups, tiles * splits)](
        q, k, v, parts, sums, *search, queries, keys, reach(window), few,
        *strides(q, k, v), power, factor, natural_factor, heads, heads // groups, splits,
        CAUSAL=causal, WINDOWED=window is not None, USED=seqused_k is not None,
        ROWS=launch.rows, STEP=launch.step, E=padded_width(width), WIDTH=width, PRECISION=precision_of(q),
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        block_causal_attention_combine_kernel[((documents + 1) * few * heads,)](
            parts, sums, out, lse, *search, queries, few, factor, natural_factor,
            heads, width, splits,
            MOST=MAX_SPLITS, STEP=_SPLITS_PER_STEP, E=padded_width(width), num_warps=1,
        )  # fmt: skip
