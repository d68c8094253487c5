"""Find the keys that each query attends to, and the queries that attend to each key: intervals, on the device.

Query i attends to the keys ``[first_i, last_i)`` and the queries ``[first_j, last_j)`` attend to key j; neither end
falls from one query or key to the next. So a block of queries may span documents, however many: its keys run from its
smallest `first` to its largest `last`. Only where queries and keys are not the same bytes may there be keys in between
that no query of the block attends to, the unused end of a cache or keys in front of a window: there a block has several
ranges.

Ownership: a program finds both ends for 128 queries or 128 keys. It searches for their documents once, and not in every
head of every kernel. Bytes: 8 are written for each query and key; the offsets come from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.reference.block_causal_attention import AttentionMask

_BLOCK = 128  # a program has so many queries or keys


@triton.jit
def offset_of(cu_seqlens, document, length, mask):
    """Return where a document begins: what `cu_seqlens` says, or a multiple of the `length` of all documents."""
    if cu_seqlens is None:
        offset = tl.where(mask, document.to(tl.int64) * length, 0)
    else:
        offset = tl.load(cu_seqlens + document, mask=mask, other=0).to(tl.int64)
    return offset


@triton.jit
def document_of(row, cu_seqlens, documents, length, top_bit):
    """Return the document of each row, `documents` beyond the last one; `top_bit` is the highest of `documents`."""
    if cu_seqlens is None:
        document = tl.minimum(row // tl.maximum(length, 1), documents).to(tl.int32)
    else:
        document = (row * 0).to(tl.int32)
        bit = top_bit
        while bit > 0:
            ahead = document + bit
            inside = ahead <= documents
            document = tl.where(inside & (tl.load(cu_seqlens + ahead, mask=inside, other=0) <= row), ahead, document)
            bit = bit // 2
    return document


@triton.jit
def document_bounds(document, cu_q, cu_k, used, documents, length_q, length_k, USED: tl.constexpr):
    """Return where the queries and the used keys of a document begin and end: nothing beyond the last document."""
    real = document < documents
    begin_q, end_q = offset_of(cu_q, document, length_q, real), offset_of(cu_q, document + 1, length_q, real)
    begin_k, end_k = offset_of(cu_k, document, length_k, real), offset_of(cu_k, document + 1, length_k, real)
    if USED:
        end_k = tl.minimum(end_k, begin_k + tl.maximum(tl.load(used + document, mask=real, other=0), 0))
    return begin_q, end_q, begin_k, end_k


@triton.jit
def attended_keys(query, end_q, first, end, num_keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Return the keys ``[first, last)`` of queries of a document whose queries end at `end_q` and whose keys at `end`.

    They are within ``[0, num_keys)`` whatever the offsets are.
    """
    aligned = query + end - end_q  # is the key at the query's own position
    last = end
    if WINDOWED:
        first = tl.maximum(first, aligned - window + 1)
    if CAUSAL:
        last = tl.minimum(last, aligned + 1)
    elif WINDOWED:
        last = tl.minimum(last, aligned + window)
    first = tl.minimum(tl.maximum(first, 0), num_keys) + query * 0
    return first, tl.minimum(tl.maximum(last, first), num_keys)


@triton.jit(
    do_not_specialize=["documents", "length_q", "length_k", "top_bit", "num_queries", "num_keys", "window", "skip"]
)
def block_causal_attention_ranges_kernel(
    of_queries, of_keys, cu_q, cu_k, used, documents, length_q, length_k, top_bit, num_queries, num_keys, window, skip,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``of_queries [2, num_queries]`` and ``of_keys [2, num_keys]``, first and last of each, padded to 16 bytes.

    Queries of documents with up to `skip` queries attend to no key. All intervals are within the other side, whatever
    the offsets are. The blocks of queries come first. A grid of no more than these leaves the keys out.
    """
    blocks = tl.cdiv(num_queries, BLOCK)
    block = tl.program_id(0)
    if block < blocks:
        query = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        document = document_of(query, cu_q, documents, length_q, top_bit)
        begin_q, end_q, first, end_k = document_bounds(document, cu_q, cu_k, used, documents, length_q, length_k, USED)
        first, last = attended_keys(query, end_q, first, end_k, num_keys, window, CAUSAL, WINDOWED)
        last = tl.where(end_q - begin_q <= skip, first, last)
        first = tl.where(document < documents, first, num_keys)
        last = tl.where(document < documents, last, num_keys)
        size = tl.cdiv(num_queries, 4).to(tl.int64) * 4
        tl.store(of_queries + query, first.to(tl.int32), mask=query < size)
        tl.store(of_queries + size + query, last.to(tl.int32), mask=query < size)
    else:
        key = (block - blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        document = document_of(key, cu_k, documents, length_k, top_bit)
        first, end_q, _, end_k = document_bounds(document, cu_q, cu_k, used, documents, length_q, length_k, USED)
        aligned = key - end_k + end_q  # is the query at the key's own position
        last = end_q
        if CAUSAL:
            first = tl.maximum(first, aligned)
        elif WINDOWED:
            first = tl.maximum(first, aligned - window + 1)
        if WINDOWED:
            last = tl.minimum(last, aligned + window)
        # Unused keys are behind the used ones, and no query attends to them.
        first = tl.where(key < end_k, first, end_q)
        first = tl.where(document < documents, tl.minimum(tl.maximum(first, 0), num_queries), num_queries)
        last = tl.where(document < documents, tl.minimum(tl.maximum(last, first), num_queries), num_queries)
        size = tl.cdiv(num_keys, 4).to(tl.int64) * 4
        tl.store(of_keys + key, first.to(tl.int32), mask=key < size)
        tl.store(of_keys + size + key, last.to(tl.int32), mask=key < size)


@triton.jit
def load_ranges(first, last, row, rows, others):
    """Return `first` and `last` of the queries or keys of a program, and which of them a gap follows.

    What is beyond the end has an empty interval. The ranges are the caller's and may hold anything: no `last` exceeds
    `others`, the length of the other side, and `next_range` begins at 0 or later.
    """
    first_of_row = tl.load(first + row, mask=row < rows, other=0)
    last_of_row = tl.minimum(tl.load(last + row, mask=row < rows, other=0), others)
    gap = tl.load(first + row + 1, mask=row < rows - 1, other=0) > last_of_row
    return first_of_row, last_of_row, gap


@triton.jit
def next_range(first, last, gap, done):
    """Return the next contiguous range ``[begin, end)`` after `done` that at least one row attends to.

    begin >= end if there is none. Gaps are skipped: they may hold NaN, and 0 * NaN is NaN. A range ends at the first
    gap after its begin, which may follow a row that attends to nothing itself.
    """
    ahead = (first < last) & (last > done)
    begin = tl.maximum(tl.min(tl.where(ahead, first, 2147483647)), done)
    end = tl.max(tl.where(ahead, last, 0))
    return begin, tl.minimum(end, tl.min(tl.where(gap & (last > begin), last, 2147483647)))


def block_causal_attention_ranges_fwd_cuda(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    num_queries: int,
    num_keys: int,
    window: int | None,
    causal: bool,
    seqused_k: Tensor | None,
) -> Tensor:
    """Run the operator; see `ops.attention_ranges`."""
    mask = AttentionMask(cu_seqlens_q, cu_seqlens_k, window, causal, None, seqused_k)
    with torch.cuda.device_of(cu_seqlens_q):
        return _write(mask, num_queries, num_keys, cu_seqlens_q.device, 0, True)


def ranges(
    mask: AttentionMask, q: Tensor, k: Tensor, skip: int = 0, with_keys: bool = False
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return `first` and `last` of every query, and of every key: int32, on the device, from one launch.

    Queries of documents with up to `skip` queries attend to no key. Those of keys are not written unless `with_keys`.
    Nothing is launched where `mask.ranges` has them already and no queries are skipped.
    """
    found, num_queries, num_keys = mask.ranges, q.shape[0], k.shape[0]
    if found is not None:
        expected = _size(num_queries, num_keys)
        if found.dtype != torch.int32 or found.shape != (expected,) or not found.is_contiguous():
            raise ValueError(f"ranges: expected contiguous int32 [{expected}], got {found.dtype} {list(found.shape)}")
    if found is None or skip:
        found = _write(mask, num_queries, num_keys, q.device, skip, with_keys)
    of_queries, of_keys = found[: _size(num_queries, 0)], found[_size(num_queries, 0) :]
    return of_queries.view(2, -1)[:, :num_queries].unbind(), of_keys.view(2, -1)[:, :num_keys].unbind()  # type: ignore


def _size(num_queries: int, num_keys: int) -> int:
    """Return how many numbers `first` and `last` take, padded to 16 bytes each.

    So the kernels are not compiled again for a `last` that begins elsewhere.
    """
    return 8 * (triton.cdiv(num_queries, 4) + triton.cdiv(num_keys, 4))


def _write(
    mask: AttentionMask, num_queries: int, num_keys: int, device: torch.device, skip: int, with_keys: bool
) -> Tensor:
    """Return what `ranges` splits, from one launch; the part of keys is empty unless `with_keys`."""
    out = torch.empty(_size(num_queries, num_keys if with_keys else 0), dtype=torch.int32, device=device)
    blocks = triton.cdiv(num_queries, _BLOCK) + (triton.cdiv(num_keys, _BLOCK) if with_keys else 0)
    if not blocks:
        return out
    block_causal_attention_ranges_kernel[(blocks,)](
        out, out[_size(num_queries, 0) :], *offset_arguments(mask, num_queries, num_keys),
        1 << mask.num_documents.bit_length() >> 1, num_queries, num_keys, window_argument(mask), skip,
        **mask_constants(mask), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def window_argument(mask: AttentionMask) -> int:
    """Return the `window` that kernels are given: intervals are int32, so a longer one than that reaches no further."""
    return 0 if mask.window is None else min(mask.window, 2**31 - 1)


def offset_arguments(
    mask: AttentionMask, num_queries: int, num_keys: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int, int]:
    """Return what kernels find documents by: `cu_q`, `cu_k`, `used`, `documents`, `length_q` and `length_k`.

    The lengths are those of all documents where there are no offsets. `used` is not read without `seqused_k`.
    """
    cu_q, documents = mask.cu_seqlens_q, max(mask.num_documents, 1)
    cu_k = cu_q if mask.cu_seqlens_k is None else mask.cu_seqlens_k
    used = cu_q if mask.seqused_k is None else mask.seqused_k
    return cu_q, cu_k, used, mask.num_documents, num_queries // documents, num_keys // documents


def mask_constants(mask: AttentionMask) -> dict[str, bool]:
    """Return the constants of kernels that find intervals."""
    return {"CAUSAL": mask.causal, "WINDOWED": mask.window is not None, "USED": mask.seqused_k is not None}
