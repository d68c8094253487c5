"""block_causal_attention in plain PyTorch: the specification of `ops.block_causal_attention`.

The keys that a query sees are an interval of the packed keys. Queries are taken in blocks of rows, so that memory is
O(T), and where queries and keys are the same bytes a block only takes the keys that its window can reach: time is
O(T * (window + block)).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.layout import AttentionRanges
from blt_kernels.reference._ragged import document_offsets

_BLOCK = 128  # query rows


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
    """Attention within documents; see `ops.block_causal_attention`. `ranges` saves kernels work and is not read."""
    num_documents = q.shape[0] if q.dim() == 4 else 1
    query, key, value = (x.flatten(0, 1) if x.dim() == 4 else x for x in (q, k, v))
    out, lse = block_causal_attention_fwd_reference(
        query, key, value, cu_seqlens_q, cu_seqlens_k, window, causal, scale, seqused_k, None, num_documents
    )
    return (out.view(q.shape), lse.view(q.shape[:-1])) if return_lse else out.view(q.shape)


def block_causal_attention_fwd_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    causal: bool,
    scale: float | None,
    seqused_k: Tensor | None,
    ranges: Tensor | None = None,
    num_documents: int = 1,
) -> tuple[Tensor, Tensor]:
    """With s = scale * q k^T over the keys that a row sees: out = softmax(s) v, lse = logsumexp(s)."""
    cu_seqlens_q, cu_seqlens_k = offsets_of(q, k, cu_seqlens_q, cu_seqlens_k, num_documents)
    first, last, live = visible(q, k, cu_seqlens_q, cu_seqlens_k, window, causal, seqused_k)
    query = _clean(q, first < last) * _scale(q, scale)
    key, value = _clean(k, live), _clean(v, live)
    if not key.shape[0]:  # a key that nobody sees, so that there is a maximum
        key, value = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (key, value))
    aligned = cu_seqlens_k is None and seqused_k is None and k.shape[0] > 0
    outs, lses = [], []
    with _full_precision(q):
        for rows, keys in _blocks(q.shape[0], key.shape[0], window, causal, aligned):
            queries = _by_group(query[rows], key.shape[1])  # [G, H/G * rows, E]
            hidden = _hidden(keys, first[rows], last[rows], q.shape[1] // k.shape[1])  # [H/G * rows, keys]
            scores = torch.bmm(queries, key[keys].permute(1, 2, 0)).masked_fill_(hidden, -torch.inf)
            top = scores.detach().amax(-1, keepdim=True)
            top = top.masked_fill(top == -torch.inf, 0)
            p = scores.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            out = torch.bmm(p, value[keys].transpose(0, 1)) / total.masked_fill(total == 0, 1)
            outs.append(_by_row(out, query[rows]))
            lses.append(_by_row(top + total.detach().log(), query[rows])[..., 0])
    return torch.cat(outs).to(q.dtype), torch.cat(lses)


def block_causal_attention_bwd_reference(
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
    ranges: Tensor | None = None,
    num_documents: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = softmax(s) and ds = p * (g v^T - sum(p * g v^T)): dq = scale * ds k, dk = scale * ds^T q, dv = p^T g.

    Kernels take p = exp(s - lse) and sum(g * out), which is the same but for the rounding of lse and out.
    """
    cu_seqlens_q, cu_seqlens_k = offsets_of(q, k, cu_seqlens_q, cu_seqlens_k, num_documents)
    first, last, live = visible(q, k, cu_seqlens_q, cu_seqlens_k, window, causal, seqused_k)
    query = _clean(q, first < last) * _scale(q, scale)
    key, value = _clean(k, live), _clean(v, live)
    grad = _clean(grad_out, first < last)
    aligned = cu_seqlens_k is None and seqused_k is None
    grad_q, grad_k, grad_v = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    with _full_precision(q):
        for rows, keys in _blocks(q.shape[0], key.shape[0], window, causal, aligned):
            queries, grads = (_by_group(x[rows], key.shape[1]) for x in (query, grad))
            hidden = _hidden(keys, first[rows], last[rows], q.shape[1] // k.shape[1])
            scores = torch.bmm(queries, key[keys].permute(1, 2, 0)).masked_fill_(hidden, -torch.inf)
            p = scores.softmax(-1).masked_fill_(hidden, 0)
            slopes = torch.bmm(grads, value[keys].permute(1, 2, 0))
            ds = slopes.sub_((p * slopes).sum(-1, keepdim=True)).mul_(p)
            grad_q[rows] = _by_row(torch.bmm(ds, key[keys].transpose(0, 1)), query[rows])
            grad_k[keys] += torch.bmm(ds.mT, queries).transpose(0, 1)  # sums over the heads of a group
            grad_v[keys] += torch.bmm(p.mT, grads).transpose(0, 1)
    grad_q *= _scale(q, scale)
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
    """Intervals of queries and keys; see `ops.attention_ranges`."""
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
    """Query i of n, of a document with m keys, sees key j if j < m, j - i <= m - n (causal), |j - i - m + n| < window.

    Rows beyond the last document, of which there are at least as many as round up to a multiple of 4, see nothing: both
    ends are the number of rows of the other side.
    """
    cu_q = cu_seqlens_q.long()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.long()
    end_k = cu_k[1:] if seqused_k is None else torch.minimum(cu_k[:-1] + seqused_k.clamp(min=0), cu_k[1:])
    before = num_queries + num_keys if window is None else min(window, 2**31 - 1) - 1  # keys that a query looks back
    after = 0 if causal else before
    begin_q, last_q, begin_k, last_k = (F.pad(x, (0, 1)) for x in (cu_q[:-1], cu_q[1:], cu_k[:-1], end_k))
    rows: list[Tensor] = []
    for total, others, offsets, begin, end, shift, back, ahead in (
        (num_queries, num_keys, cu_q, begin_k, last_k, last_k - last_q, before, after),
        (num_keys, num_queries, cu_k, begin_q, last_q, last_q - last_k, after, before),
    ):
        row, document = _documents((total + 3) // 4 * 4, offsets)
        position = row + shift[document]
        first = torch.maximum(begin[document], position - back)
        last = torch.minimum(end[document], position + ahead + 1)
        if rows:  # keys, of which some may not count
            first = torch.where(row < last_k[document], first, end[document])
        beyond = document == offsets.shape[0] - 1
        first = first.clamp(0, others).masked_fill(beyond, others)
        rows += [first, torch.maximum(last.clamp(max=others), first).masked_fill(beyond, others)]
    return torch.cat(rows).int()


def offsets_of(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, num_documents: int
) -> tuple[Tensor, Tensor | None]:
    """Return the offsets of queries and of keys, those of `num_documents` of one length if none are given."""
    if cu_seqlens_q is not None:
        return cu_seqlens_q, cu_seqlens_k
    cu_seqlens_k = None if k.shape[0] == q.shape[0] else document_offsets(k, None, num_documents)
    return document_offsets(q, None, num_documents), cu_seqlens_k


def visible(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    causal: bool,
    seqused_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query i sees the packed keys ``[first[i], last[i])``; live[j]: some query sees key j."""
    cu_q = cu_seqlens_q.long()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.long()
    end = cu_k[1:] if seqused_k is None else torch.minimum(cu_k[:-1] + seqused_k.clamp(min=0), cu_k[1:])
    # One more document, without keys, owns the rows beyond the last one.
    start, end, shift = (F.pad(x, (0, 1)) for x in (cu_k[:-1], end, end - cu_q[1:]))
    row, document = _documents(q.shape[0], cu_q)
    position = row + shift[document]  # the key that the query is aligned with
    first, last = start[document], end[document]
    if window is not None:
        window = min(window, 2**31 - 1)  # offsets are int32: a longer window reaches no further, and would overflow
        first = torch.maximum(first, position - (window - 1))
    if causal:
        last = torch.minimum(last, position + 1)
    elif window is not None:
        last = torch.minimum(last, position + window)
    sees = (first < last).int()
    edges = sees.new_zeros(k.shape[0] + 1)
    edges.index_add_(0, first.clamp(0, k.shape[0]), sees).index_add_(0, last.clamp(0, k.shape[0]), -sees)
    return first, last, edges.cumsum(0)[:-1] > 0


def _documents(rows: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Index and document of each row; the document is B beyond the last one."""
    row = torch.arange(rows, device=cu_seqlens.device)
    return row, torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)


def _clean(x: Tensor, live: Tensor) -> Tensor:
    """Rows in the accumulator's dtype; those that are not live, which may hold anything, as zeros."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.masked_fill(~live[:, None, None], 0)


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Products in the dtype of their arguments, whatever autocast says; torch refuses to ask about "meta"."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _blocks(queries: int, keys: int, window: int | None, causal: bool, aligned: bool) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows, at least one, each with a range of keys that holds all it sees."""
    for row in range(0, max(queries, 1), _BLOCK):
        end = min(row + _BLOCK, queries)
        before, after = 0, keys
        if aligned and window is not None:
            before, after = max(row - window + 1, 0), min(end + window - 1, keys)
        if aligned and causal:
            after = end
        yield slice(row, end), slice(before, after)


def _hidden(keys: slice, first: Tensor, last: Tensor, heads: int) -> Tensor:
    """Where the query does not see the key: bool ``[H/G * rows, keys]``."""
    position = torch.arange(keys.start, keys.stop, device=first.device)
    hidden = (position < first[:, None]) | (position >= last[:, None])
    return hidden.repeat(heads, 1)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """``[rows, H, E]`` to ``[G, H/G * rows, E]``: head h reads key head h // (H/G)."""
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_row(x: Tensor, like: Tensor) -> Tensor:
    """``[G, H/G * rows, E]`` back to ``[rows, H, E]``, the shape of `like` but for E."""
    rows, heads = like.shape[:2]
    return x.unflatten(1, (heads // x.shape[0], rows)).permute(2, 0, 1, 3).flatten(1, 2)
