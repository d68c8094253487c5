"""Which keys a query sees, and which queries see a key: both are intervals, found on the device.

Queries and keys are packed rows. Query i sees the keys ``[first_i, last_i)`` and key j is seen by the queries
``[first_j, last_j)``; neither end falls from one row to the next. So a block of rows may span documents, however many:
the rows of the other side that it meets run from its least `first` to its greatest `last`. Only where queries and keys
are not the same bytes may something in between be seen by no row, the unused end of a cache or keys in front of a
window: there a block meets several runs.

The search for documents happens once a row, and not in every head of every kernel: 8 bytes a row are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 128  # of a program


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
def documents_rows(document, cu_q, cu_k, used, documents, length_q, length_k, USED: tl.constexpr):
    """Return where the queries and the keys that count begin and end: nothing beyond the last document."""
    real = document < documents
    begin_q, end_q = offset_of(cu_q, document, length_q, real), offset_of(cu_q, document + 1, length_q, real)
    begin_k, end_k = offset_of(cu_k, document, length_k, real), offset_of(cu_k, document + 1, length_k, real)
    if USED:
        end_k = tl.minimum(end_k, begin_k + tl.maximum(tl.load(used + document, mask=real, other=0), 0))
    return begin_q, end_q, begin_k, end_k


@triton.jit
def attended_keys(row, end_q, first, end, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Return the keys ``[first, last)`` of queries of a document whose queries end at `end_q` and whose keys at `end`.

    They are within ``[0, keys)`` whatever the offsets are.
    """
    aligned = row + end - end_q  # the key at the query's own position
    last = end
    if WINDOWED:
        first = tl.maximum(first, aligned - window + 1)
    if CAUSAL:
        last = tl.minimum(last, aligned + 1)
    elif WINDOWED:
        last = tl.minimum(last, aligned + window)
    first = tl.minimum(tl.maximum(first, 0), keys) + row * 0
    return first, tl.minimum(tl.maximum(last, first), keys)


@triton.jit
def keys_of_query(
    row, cu_q, cu_k, used, documents, length_q, length_k, top_bit, keys, window, skip,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, USED: tl.constexpr,
):  # fmt: skip
    """Return the keys ``[first, last)`` that each query sees; none for documents with up to `skip` queries."""
    document = document_of(row, cu_q, documents, length_q, top_bit)
    begin_q, end_q, first, end = documents_rows(document, cu_q, cu_k, used, documents, length_q, length_k, USED)
    first, last = attended_keys(row, end_q, first, end, keys, window, CAUSAL, WINDOWED)
    last = tl.where(end_q - begin_q <= skip, first, last)
    return tl.where(document < documents, first, keys), tl.where(document < documents, last, keys)


@triton.jit
def queries_of_key(
    row, cu_q, cu_k, used, documents, length_q, length_k, top_bit, queries, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, USED: tl.constexpr,
):  # fmt: skip
    """Return the queries ``[first, last)`` that see each key, within ``[0, queries)`` whatever the offsets are."""
    document = document_of(row, cu_k, documents, length_k, top_bit)
    first, end_q, _, end_k = documents_rows(document, cu_q, cu_k, used, documents, length_q, length_k, USED)
    aligned = row - end_k + end_q  # the query at the key's own position
    last = end_q
    if CAUSAL:
        first = tl.maximum(first, aligned)
    elif WINDOWED:
        first = tl.maximum(first, aligned - window + 1)
    if WINDOWED:
        last = tl.minimum(last, aligned + window)
    # A key that does not count is behind all that do, and no query sees it.
    first = tl.where(row < end_k, first, end_q)
    first = tl.where(document < documents, tl.minimum(tl.maximum(first, 0), queries), queries)
    return first, tl.where(document < documents, tl.minimum(tl.maximum(last, first), queries), queries)


@triton.jit(do_not_specialize=["documents", "length_q", "length_k", "top_bit", "queries", "keys", "window", "skip"])
def block_causal_attention_ranges_kernel(
    of_queries, of_keys, cu_q, cu_k, used, documents, length_q, length_k, top_bit, queries, keys, window, skip,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, USED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write ``of_queries [2, queries]`` and ``of_keys [2, keys]``, first and last of each, rounded up to 16 bytes.

    The blocks of queries come first. A grid of no more than these leaves the keys out.
    """
    blocks = tl.cdiv(queries, ROWS)
    block = tl.program_id(0)
    if block < blocks:
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        first, last = keys_of_query(
            row, cu_q, cu_k, used, documents, length_q, length_k, top_bit, keys, window, skip, CAUSAL, WINDOWED, USED
        )
        size = tl.cdiv(queries, 4).to(tl.int64) * 4
        tl.store(of_queries + row, first.to(tl.int32), mask=row < size)
        tl.store(of_queries + size + row, last.to(tl.int32), mask=row < size)
    else:
        row = (block - blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        first, last = queries_of_key(
            row, cu_q, cu_k, used, documents, length_q, length_k, top_bit, queries, window, CAUSAL, WINDOWED, USED
        )
        size = tl.cdiv(keys, 4).to(tl.int64) * 4
        tl.store(of_keys + row, first.to(tl.int32), mask=row < size)
        tl.store(of_keys + size + row, last.to(tl.int32), mask=row < size)


@triton.jit
def load_ranges(first, last, row, rows, others):
    """Return `first` and `last` of the rows of a program, and after which of them nothing is seen for a while.

    Rows beyond the end see nothing. The ranges are the caller's and may hold anything: no `last` exceeds `others`, the
    number of rows of the other side, and `next_run` begins at 0 or later.
    """
    first_row = tl.load(first + row, mask=row < rows, other=0)
    last_row = tl.minimum(tl.load(last + row, mask=row < rows, other=0), others)
    gap = tl.load(first + row + 1, mask=row < rows - 1, other=0) > last_row
    return first_row, last_row, gap


@triton.jit
def next_run(first, last, gap, done):
    """Return the first run ``[begin, end)`` of what the rows see behind `done`; begin >= end if there is nothing.

    Some row sees each row of a run: what nobody sees may hold anything, NaN for instance, and 0 * NaN is NaN. A run
    ends at the first gap behind its begin, which may follow a row that sees nothing itself.
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
    with torch.cuda.device_of(cu_seqlens_q):
        documents = cu_seqlens_q.shape[0] - 1
        offsets = cu_seqlens_q, cu_seqlens_k, documents, window, causal, seqused_k
        return _write(cu_seqlens_q, num_queries, num_keys, *offsets, 0, True)


def ranges(
    like: Tensor,
    queries: int,
    keys: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_documents: int,
    window: int | None,
    causal: bool,
    seqused_k: Tensor | None,
    skip: int = 0,
    with_keys: bool = False,
    made: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return `first` and `last` of every query, and of every key: int32, on the device of `like`, from one launch.

    Queries of documents with up to `skip` queries see no key. Those of keys are not written unless `with_keys`.
    Nothing is launched where all are `made` already and no queries are skipped.
    """
    if made is not None:
        expected = _size(queries, keys)
        if made.dtype != torch.int32 or made.shape != (expected,) or not made.is_contiguous():
            raise ValueError(f"ranges: expected contiguous int32 [{expected}], got {made.dtype} {list(made.shape)}")
    if made is None or skip:
        offsets = (cu_seqlens_q, cu_seqlens_k, num_documents, window, causal, seqused_k)
        made = _write(like, queries, keys, *offsets, skip, with_keys)
    of_queries, of_keys = made[: _size(queries, 0)], made[_size(queries, 0) :]
    return of_queries.view(2, -1)[:, :queries].unbind(), of_keys.view(2, -1)[:, :keys].unbind()  # type: ignore


def _size(queries: int, keys: int) -> int:
    """Return how many numbers `first` and `last` take, in rows of 16 bytes.

    So the kernels are not compiled again for a `last` that begins elsewhere.
    """
    return 8 * (triton.cdiv(queries, 4) + triton.cdiv(keys, 4))


def _write(
    like: Tensor, queries: int, keys: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    num_documents: int, window: int | None, causal: bool, seqused_k: Tensor | None, skip: int, with_keys: bool,
) -> Tensor:  # fmt: skip
    """Return what `ranges` splits, from one launch; the part of keys is empty unless `with_keys`."""
    out = like.new_empty(_size(queries, keys if with_keys else 0), dtype=torch.int32)
    blocks = triton.cdiv(queries, _ROWS) + (triton.cdiv(keys, _ROWS) if with_keys else 0)
    if not blocks:
        return out
    search = search_arguments(cu_seqlens_q, cu_seqlens_k, num_documents, queries, keys, seqused_k)
    block_causal_attention_ranges_kernel[(blocks,)](
        out, out[_size(queries, 0) :], *search, 1 << num_documents.bit_length() >> 1, queries, keys, reach(window),
        skip,
        CAUSAL=causal, WINDOWED=window is not None, USED=seqused_k is not None, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return out


def reach(window: int | None) -> int:
    """Return the `window` that kernels are given: rows are int32, so a longer one than that reaches no further."""
    return 0 if window is None else min(window, 2**31 - 1)


def search_arguments(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    documents: int,
    queries: int,
    keys: int,
    seqused_k: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int, int]:
    """Return what `documents_rows` reads: offsets of queries and keys, used keys, and the number of documents.

    Last come the lengths in queries and keys of a document, which count where there are no offsets.
    """
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    each = max(documents, 1)
    used = cu_seqlens_q if seqused_k is None else seqused_k  # not read without seqused_k
    return cu_seqlens_q, cu_k, used, documents, queries // each, keys // each
