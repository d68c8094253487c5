"""patch_cross_attention in plain PyTorch: the specification of `ops.patch_cross_attention`.

An edge joins a byte with the K vectors of one patch. Without a window a byte has one edge; with a window of w patches
it has w of them, one for each distance. What lives on the edges of one distance has shape ``[T, K, H, ...]``, on the
bytes ``[T, 1, H, ...]``, on the patches ``[C, K, H, ...]``; so no mask over bytes and patches is ever needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.layout import PatchLayout
from blt_kernels.reference._ragged import accumulator, scale_of


def patch_cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PatchLayout,
    *,
    direction: str,
    queries_per_patch: int,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute attention between patches and bytes; see `ops.patch_cross_attention`."""
    encode = direction == "encode"
    offsets, ids = (layout.patch_offsets, layout.patch_ids) if encode else (layout.decode_offsets, layout.decode_ids)
    query, key, value = (x.flatten(0, 1) if x.dim() == 4 else x for x in (q, k, v))
    out, _lse = patch_cross_attention_fwd_reference(
        query, key, value, offsets, layout.cu_patches, ids, direction, queries_per_patch, window, scale
    )
    return out.view(q.shape)


def patch_cross_attention_fwd_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    cu_patches: Tensor,
    ids: Tensor,
    direction: str,
    queries_per_patch: int,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """With s = scale * q k^T over the edges of a query: out = softmax(s) v, lse = logsumexp(s)."""
    graph = _graph(offsets, cu_patches, ids, direction, queries_per_patch, window)
    query, key, value = graph[0].query_side(q) * scale_of(q, scale), *(graph[0].key_side(_repeat(x, q)) for x in (k, v))
    scores = [(e.query(query) * e.key(key)).sum(-1, keepdim=True).where(e.real, -torch.inf) for e in graph]
    top = torch.stack([e.max_query(s.detach()) for e, s in zip(graph, scores, strict=True)]).amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    total, out = torch.zeros_like(top), torch.zeros_like(query)
    for e, s in zip(graph, scores, strict=True):
        p = (s - e.query(top)).exp()
        total = total + e.sum_query(p)
        out = out + e.sum_query(p * e.key(value))
    out = out / total.masked_fill(total == 0, 1)
    lse = top + total.detach().log()
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:-1])


def patch_cross_attention_bwd_reference(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    cu_patches: Tensor,
    ids: Tensor,
    direction: str,
    queries_per_patch: int,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = softmax(s) and ds = p * (g v^T - sum(p * g v^T)): dq = scale * ds k, dk = scale * ds^T q, dv = p^T g.

    exp(s - lse) is p, but for the rounding of lse: it is divided by its sum.
    """
    graph = _graph(offsets, cu_patches, ids, direction, queries_per_patch, window)
    query, key, value = graph[0].query_side(q) * scale_of(q, scale), *(graph[0].key_side(_repeat(x, q)) for x in (k, v))
    grad = graph[0].query_side(grad_out)
    shift = graph[0].query_side(lse[..., None])
    grad_q, grad_k, grad_v = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    weights, slopes = [], []
    total, delta = torch.zeros_like(shift), torch.zeros_like(shift)
    for e in graph:
        s = (e.query(query) * e.key(key)).sum(-1, keepdim=True)
        weights.append((s - e.query(shift)).exp().where(e.real, 0))
        slopes.append((e.query(grad) * e.key(value)).sum(-1, keepdim=True).where(e.real, 0))
        total = total + e.sum_query(weights[-1])
        delta = delta + e.sum_query(weights[-1] * slopes[-1])
    total = total.masked_fill(total == 0, 1)
    for e, weight, dp in zip(graph, weights, slopes, strict=True):
        p = (weight / e.query(total)).where(e.real, 0)
        ds = p * (dp - e.query(delta / total))
        grad_q += e.sum_query(ds * e.key(key))
        grad_k += e.sum_key(ds * e.query(query))
        grad_v += e.sum_key(p * e.query(grad))
    grad_q *= scale_of(q, scale)
    grad_k, grad_v = (
        x.reshape(*k.shape[:-1], q.shape[-2] // k.shape[-2], k.shape[-1]).sum(-2) for x in (grad_k, grad_v)
    )
    return grad_q.reshape(q.shape).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


@dataclass(frozen=True)
class _Edges:
    """The edges of one distance: how either side is read along them and summed back.

    Attributes
    ----------
    patch : int64 ``[T]``
        The patch that a byte meets; C where there is none.
    inside : bool ``[T, 1, 1, 1]``
        The byte has an id. What the others hold, anything at all, is replaced by zeros.
    real : bool ``[T, 1, 1, 1]``
        The byte meets a patch.
    """

    patch: Tensor
    inside: Tensor
    real: Tensor
    capacity: int
    queries_per_patch: int
    encode: bool

    def query_side(self, x: Tensor) -> Tensor:
        return self._patches(x) if self.encode else self._bytes(x)

    def key_side(self, x: Tensor) -> Tensor:
        return self._bytes(x) if self.encode else self._patches(x)

    def query(self, x: Tensor) -> Tensor:
        return self._read_patches(x) if self.encode else x

    def key(self, x: Tensor) -> Tensor:
        return x if self.encode else self._read_patches(x)

    def sum_query(self, x: Tensor) -> Tensor:
        return self._sum_patches(x) if self.encode else x.sum(1, keepdim=True)

    def sum_key(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) if self.encode else self._sum_patches(x)

    def max_query(self, x: Tensor) -> Tensor:
        if not self.encode:
            return x.amax(1, keepdim=True)
        buffer = x.new_full((self.capacity + 1, *x.shape[1:]), -torch.inf)
        return buffer.scatter_reduce(0, self.patch.view(-1, 1, 1, 1).expand_as(x), x, "amax")[:-1]

    def _bytes(self, x: Tensor) -> Tensor:
        return x.to(accumulator(x)).contiguous().unsqueeze(1).where(self.inside, 0)

    def _patches(self, x: Tensor) -> Tensor:
        return x.to(accumulator(x)).contiguous().unflatten(0, (self.capacity, self.queries_per_patch))

    def _read_patches(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)).index_select(0, self.patch)

    def _sum_patches(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.capacity + 1, *x.shape[1:]).index_add(0, self.patch, x)[:-1]


def _graph(
    offsets: Tensor,
    cu_patches: Tensor,
    ids: Tensor,
    direction: str,
    queries_per_patch: int,
    window: int | None,
) -> list[_Edges]:
    """Return edges by distance d: encoding, patch ids[i] + d reads byte i; decoding, byte i reads patch ids[i] - d."""
    capacity = offsets.shape[0] - 1
    queries_per_patch = queries_per_patch if capacity else 1  # no patch may have any number of queries
    bounds = F.pad(cu_patches, (0, 1)).long()
    document = torch.searchsorted(cu_patches[1:].contiguous(), ids.contiguous(), right=True)  # of the patch
    low, high = bounds[document], bounds[document + 1]
    inside = ids >= 0
    graph = []
    for distance in range(1 if window is None else max(1, min(window, capacity))):
        patch = ids.long() + (distance if direction == "encode" else -distance)
        real = inside & (patch >= low) & (patch < high)
        graph.append(
            _Edges(
                patch.where(real, capacity),
                inside.view(-1, 1, 1, 1),
                real.view(-1, 1, 1, 1),
                capacity,
                queries_per_patch,
                direction == "encode",
            )
        )
    return graph


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values ``[*, G, E]`` once for each of the H heads of q: head h is head ``h // (H / G)``."""
    return x.repeat_interleave(q.shape[-2] // x.shape[-2], -2)
