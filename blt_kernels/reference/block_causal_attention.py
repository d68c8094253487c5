"""block_causal_attention in plain PyTorch: the specification of `ops.block_causal_attention`.

The keys that a query attends to are an interval of the packed keys. Queries are taken in blocks, so that memory is
O(T), and where queries and keys are the same bytes a block only takes the keys that its window can reach: time is
O(T * (window + block)).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.layout import AttentionRanges
from blt_kernels.reference._ragged import (
    accumulator,
    backward_takes_padded_heads,
    document_offsets,
    operator_of,
    scale_of,
    takes_padded_heads,
)

_QUERY_BLOCK = 128

_Intervals = tuple[Tensor, Tensor]  # first, and one after the last, of each query or key


@dataclass(frozen=True)
class AttentionMask:
    """Holds the arguments that follow the tensors in the schemas of the operators, which give the mask, and the scale.

    Without `cu_seqlens_q` there are `num_documents` documents of one length, of queries as of keys. `ranges` are the
    intervals that `ops.attention_ranges` found for the same arguments, which kernels on CUDA read.
    """

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    window: int | None
    causal: bool
    scale: float | None
    seqused_k: Tensor | None
    ranges: Tensor | None = None
    num_documents: int = 1

    def __post_init__(self) -> None:
        if self.cu_seqlens_q is not None:
            object.__setattr__(self, "num_documents", self.cu_seqlens_q.shape[0] - 1)

    def with_offsets(self, q: Tensor, k: Tensor) -> AttentionMask:
        """Return this mask with document offsets, which are made for documents of one length."""
        if self.cu_seqlens_q is not None:
            return self
        cu_seqlens_k = None if k.shape[0] == q.shape[0] else document_offsets(k, None, self.num_documents)
        return replace(self, cu_seqlens_q=document_offsets(q, None, self.num_documents), cu_seqlens_k=cu_seqlens_k)

    @property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """The document offsets of the queries and of the keys."""
        if self.cu_seqlens_q is None:
            raise ValueError("cu_seqlens_q: expected offsets, as with_offsets makes them, got None")
        return self.cu_seqlens_q, self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k

    def same_bytes(self, num_queries: int, num_keys: int) -> bool:
        """Return whether query i and key i are the same byte."""
        return self.cu_seqlens_k is None and self.seqused_k is None and num_queries == num_keys

    def keys_of_queries(self, num_queries: int, num_keys: int) -> _Intervals:
        """Return the keys ``[first, last)`` that each query attends to, int64 within ``[0, num_keys]``.

        Query i of n, of a document with m keys, attends to key j if j < m, j - i <= m - n (causal) and
        |j - i - m + n| < window. For queries beyond the last document both ends are `num_keys`.
        """
        return self._intervals(num_queries, num_keys, of_keys=False)

    def queries_of_keys(self, num_queries: int, num_keys: int) -> _Intervals:
        """Return the queries ``[first, last)`` that attend to each key; beyond the last document `num_queries`."""
        return self._intervals(num_keys, num_queries, of_keys=True)

    def _intervals(self, rows: int, others: int, of_keys: bool) -> _Intervals:
        cu_q, cu_k = (offsets.long() for offsets in self.offsets)
        used = cu_k[1:] if self.seqused_k is None else torch.minimum(cu_k[:-1] + self.seqused_k.clamp(min=0), cu_k[1:])
        # One more document, which is empty, owns what is beyond the last one.
        begin_q, end_q, begin_k, end_k = (F.pad(x, (0, 1)) for x in (cu_q[:-1], cu_q[1:], cu_k[:-1], used))
        # Offsets are int32: a longer window reaches no further, and would overflow.
        back = rows + others if self.window is None else min(self.window, 2**31 - 1) - 1
        ahead = 0 if self.causal else back
        offsets, begin, end, shift = cu_q, begin_k, end_k, end_k - end_q
        if of_keys:
            offsets, begin, end, shift, back, ahead = cu_k, begin_q, end_q, end_q - end_k, ahead, back
        row = torch.arange(rows, device=cu_q.device)
        document = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
        position = row + shift[document]  # what the row is aligned with on the other side
        first = torch.maximum(begin[document], position - back)
        last = torch.minimum(end[document], position + ahead + 1)
        if of_keys:  # unused keys are behind the used ones
            first = torch.where(row < end_k[document], first, end[document])
        beyond = document == self.num_documents
        first = first.clamp(0, others).masked_fill(beyond, others)
        return first, torch.maximum(last.clamp(max=others), first).masked_fill(beyond, others)


def attended_keys(first: Tensor, last: Tensor, num_keys: int) -> Tensor:
    """Return which keys at least one of the queries, which attend to ``[first, last)``, attends to: bool."""
    attends = (first < last).int()
    edges = attends.new_zeros(num_keys + 1).index_add_(0, first, attends).index_add_(0, last, -attends)
    return edges.cumsum(0)[:-1] > 0


def block_causal_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    seqused_k: Tensor | None = None,
    ranges: AttentionRanges | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention within documents; see `ops.block_causal_attention`. It does not read `ranges`."""
    num_documents = q.shape[0] if q.dim() == 4 else 1
    out, lse = block_causal_attention_fwd_reference(
        q, k, v, cu_seqlens_q, cu_seqlens_k, window, causal, scale, seqused_k, None, num_documents
    )
    return (out, lse) if return_lse else out


@takes_padded_heads
@operator_of(AttentionMask)
def block_causal_attention_fwd_reference(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """With s = scale * q k^T over the keys that a query attends to: out = softmax(s) v, lse = logsumexp(s)."""
    mask, same_bytes = mask.with_offsets(q, k), mask.same_bytes(q.shape[0], k.shape[0])
    first, last = mask.keys_of_queries(q.shape[0], k.shape[0])
    attended = attended_keys(first, last, k.shape[0])
    query = _zero_unless(first < last, q) * scale_of(q, mask.scale)
    key, value = _zero_unless(attended, k), _zero_unless(attended, v)
    if not key.shape[0]:  # a masked key, so that there is a maximum
        key, value = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (key, value))
    outs, lses = [], []
    with _full_precision(q):
        for rows, keys in _blocks(q.shape[0], key.shape[0], mask, same_bytes and k.shape[0] > 0):
            queries = _by_kv_head(query[rows], key.shape[1])  # [G, H/G * rows, E]
            masked = _masked(keys, first[rows], last[rows], q.shape[1] // k.shape[1])  # [H/G * rows, keys]
            scores = torch.bmm(queries, key[keys].permute(1, 2, 0)).masked_fill_(masked, -torch.inf)
            maximum = scores.detach().amax(-1, keepdim=True)
            maximum = maximum.masked_fill(maximum == -torch.inf, 0)
            p = scores.sub_(maximum).exp_()
            total = p.sum(-1, keepdim=True)
            out = torch.bmm(p, value[keys].transpose(0, 1)) / total.masked_fill(total == 0, 1)
            outs.append(_by_query(out, query[rows]))
            lses.append(_by_query(maximum + total.detach().log(), query[rows])[..., 0])
    return torch.cat(outs).to(q.dtype), torch.cat(lses)


@backward_takes_padded_heads
@operator_of(AttentionMask)
def block_causal_attention_bwd_reference(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: AttentionMask
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = softmax(s) and ds = p * (g v^T - sum(p * g v^T)): dq = scale * ds k, dk = scale * ds^T q, dv = p^T g.

    Kernels take p = exp(s - lse) and sum(g * out), which is the same but for the rounding of lse and out.
    """
    mask, same_bytes = mask.with_offsets(q, k), mask.same_bytes(q.shape[0], k.shape[0])
    first, last = mask.keys_of_queries(q.shape[0], k.shape[0])
    attended = attended_keys(first, last, k.shape[0])
    query = _zero_unless(first < last, q) * scale_of(q, mask.scale)
    key, value = _zero_unless(attended, k), _zero_unless(attended, v)
    grad = _zero_unless(first < last, grad_out)
    grad_q, grad_k, grad_v = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    with _full_precision(q):
        for rows, keys in _blocks(q.shape[0], key.shape[0], mask, same_bytes):
            queries, grads = (_by_kv_head(x[rows], key.shape[1]) for x in (query, grad))
            masked = _masked(keys, first[rows], last[rows], q.shape[1] // k.shape[1])
            scores = torch.bmm(queries, key[keys].permute(1, 2, 0)).masked_fill_(masked, -torch.inf)
            p = scores.softmax(-1).masked_fill_(masked, 0)
            dp = torch.bmm(grads, value[keys].permute(1, 2, 0))
            ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p)
            grad_q[rows] = _by_query(torch.bmm(ds, key[keys].transpose(0, 1)), query[rows])
            grad_k[keys] += torch.bmm(ds.mT, queries).transpose(0, 1)  # sums over the query heads of a key head
            grad_v[keys] += torch.bmm(p.mT, grads).transpose(0, 1)
    grad_q *= scale_of(q, mask.scale)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def attention_ranges_reference(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    num_queries: int,
    num_keys: int | None = None,
    window: int | None = None,
    causal: bool = True,
    seqused_k: Tensor | None = None,
) -> AttentionRanges:
    """Return the intervals of queries and keys; see `ops.attention_ranges`."""
    num_keys = num_queries if num_keys is None else num_keys
    intervals = block_causal_attention_ranges_fwd_reference(
        cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, window, causal, seqused_k
    )
    return AttentionRanges(intervals, num_queries, num_keys, window, causal)


def block_causal_attention_ranges_fwd_reference(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    num_queries: int,
    num_keys: int,
    window: int | None,
    causal: bool,
    seqused_k: Tensor | None,
) -> Tensor:
    """Return the keys of each query, then the queries of each key, for numbers rounded up to a multiple of 4."""
    mask = AttentionMask(cu_seqlens_q, cu_seqlens_k, window, causal, None, seqused_k)
    padded_queries, padded_keys = ((n + 3) // 4 * 4 for n in (num_queries, num_keys))
    of_queries = mask.keys_of_queries(padded_queries, num_keys)
    return torch.cat((*of_queries, *mask.queries_of_keys(num_queries, padded_keys))).int()


def _zero_unless(attended: Tensor, x: Tensor) -> Tensor:
    """Return `x` in the accumulator's dtype, with zeros where it takes no part and may hold anything."""
    return x.to(accumulator(x)).masked_fill(~attended[:, None, None], 0)


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off: products keep the dtype of their arguments. torch has no autocast for "meta"."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def _blocks(num_queries: int, num_keys: int, mask: AttentionMask, same_bytes: bool) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries, at least one, each with a range of keys that holds all it attends to."""
    for begin in range(0, max(num_queries, 1), _QUERY_BLOCK):
        end = min(begin + _QUERY_BLOCK, num_queries)
        first, last = 0, num_keys
        if same_bytes and mask.window is not None:
            first, last = max(begin - mask.window + 1, 0), min(end + mask.window - 1, num_keys)
        if same_bytes and mask.causal:
            last = end
        yield slice(begin, end), slice(first, last)


def _masked(keys: slice, first: Tensor, last: Tensor, heads_per_kv_head: int) -> Tensor:
    """Return where the query does not attend to the key: bool ``[H/G * queries, keys]``."""
    position = torch.arange(keys.start, keys.stop, device=first.device)
    masked = (position < first[:, None]) | (position >= last[:, None])
    return masked.repeat(heads_per_kv_head, 1)


def _by_kv_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """Reshape ``[queries, H, E]`` to ``[G, H/G * queries, E]``: head h reads key head h // (H/G)."""
    return x.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_query(x: Tensor, like: Tensor) -> Tensor:
    """Reshape ``[G, H/G * queries, E]`` back to ``[queries, H, E]``, the shape of `like` but for E."""
    queries, heads = like.shape[:2]
    return x.unflatten(1, (heads // x.shape[0], queries)).permute(2, 0, 1, 3).flatten(1, 2)
