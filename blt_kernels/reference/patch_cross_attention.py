"""patch_cross_attention in plain PyTorch: the specification of `ops.patch_cross_attention`.

An edge joins a byte with the K vectors of one patch. Without a window a byte has one edge; with a window of w patches
it has w of them, one for each distance. What lives on the edges of one distance has shape ``[T, K, H, ...]``, on the
bytes ``[T, 1, H, ...]``, on the patches ``[C, K, H, ...]``; so no mask over bytes and patches is ever needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.layout import PatchLayout
from blt_kernels.reference._ragged import (
    accumulator,
    backward_takes_padded_heads,
    operator_of,
    scale_of,
    takes_padded_heads,
)


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
    out, _lse = patch_cross_attention_fwd_reference(
        q, k, v, offsets, layout.cu_patches, ids, direction, queries_per_patch, window, scale
    )
    return out


@dataclass(frozen=True)
class PatchMask:
    """Holds the arguments that follow the tensors in the schemas of the operators.

    `offsets` and `ids` are `patch_offsets` and `patch_ids` of a layout, or its `decode_offsets` and `decode_ids`, by
    the direction.
    """

    offsets: Tensor
    cu_patches: Tensor
    ids: Tensor
    direction: str
    queries_per_patch: int
    window: int | None
    scale: float | None


@takes_padded_heads
@operator_of(PatchMask)
def patch_cross_attention_fwd_reference(q: Tensor, k: Tensor, v: Tensor, mask: PatchMask) -> tuple[Tensor, Tensor]:
    """With s = scale * q k^T over the edges of a query: out = softmax(s) v, lse = logsumexp(s)."""
    graph, query, key, value = _prepared(q, k, v, mask)
    scores = [(e.queries.read(query) * e.keys.read(key)).sum(-1, keepdim=True).where(e.real, -torch.inf) for e in graph]
    top = torch.stack([e.queries.max(s.detach()) for e, s in zip(graph, scores, strict=True)]).amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    total, out = torch.zeros_like(top), torch.zeros_like(query)
    for e, s in zip(graph, scores, strict=True):
        p = (s - e.queries.read(top)).exp()
        total = total + e.queries.sum(p)
        out = out + e.queries.sum(p * e.keys.read(value))
    out = out / total.masked_fill(total == 0, 1)
    lse = top + total.detach().log()
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:-1])


@backward_takes_padded_heads
@operator_of(PatchMask)
def patch_cross_attention_bwd_reference(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: PatchMask
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = softmax(s) and ds = p * (g v^T - sum(p * g v^T)): dq = scale * ds k, dk = scale * ds^T q, dv = p^T g.

    exp(s - lse) is p, but for the rounding of lse: it is divided by its sum.
    """
    graph, query, key, value = _prepared(q, k, v, mask)
    grad = graph[0].queries.side(grad_out)
    shift = graph[0].queries.side(lse[..., None])
    grad_q, grad_k, grad_v = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    weights, slopes = [], []
    total, delta = torch.zeros_like(shift), torch.zeros_like(shift)
    for e in graph:
        s = (e.queries.read(query) * e.keys.read(key)).sum(-1, keepdim=True)
        weights.append((s - e.queries.read(shift)).exp().where(e.real, 0))
        slopes.append((e.queries.read(grad) * e.keys.read(value)).sum(-1, keepdim=True).where(e.real, 0))
        total = total + e.queries.sum(weights[-1])
        delta = delta + e.queries.sum(weights[-1] * slopes[-1])
    total = total.masked_fill(total == 0, 1)
    for e, weight, dp in zip(graph, weights, slopes, strict=True):
        p = (weight / e.queries.read(total)).where(e.real, 0)
        ds = p * (dp - e.queries.read(delta / total))
        grad_q += e.queries.sum(ds * e.keys.read(key))
        grad_k += e.keys.sum(ds * e.queries.read(query))
        grad_v += e.keys.sum(p * e.queries.read(grad))
    grad_q *= scale_of(q, mask.scale)
    grad_k, grad_v = (
        x.reshape(*k.shape[:-1], q.shape[-2] // k.shape[-2], k.shape[-1]).sum(-2) for x in (grad_k, grad_v)
    )
    return grad_q.reshape(q.shape).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


@dataclass(frozen=True)
class _Bytes:
    """One side of the edges: `inside` says which bytes have an id, bool ``[T, 1, 1, 1]``. The others count as zeros."""

    inside: Tensor

    def side(self, x: Tensor) -> Tensor:
        return x.to(accumulator(x)).contiguous().unsqueeze(1).where(self.inside, 0)

    def read(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)

    def max(self, x: Tensor) -> Tensor:
        return x.amax(1, keepdim=True)


@dataclass(frozen=True)
class _Patches:
    """The other side: `patch` is the patch that a byte meets, int64 ``[T]``, and C where there is none."""

    patch: Tensor
    capacity: int
    queries_per_patch: int

    def side(self, x: Tensor) -> Tensor:
        return x.to(accumulator(x)).contiguous().unflatten(0, (self.capacity, self.queries_per_patch))

    def read(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)).index_select(0, self.patch)

    def sum(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.capacity + 1, *x.shape[1:]).index_add(0, self.patch, x)[:-1]

    def max(self, x: Tensor) -> Tensor:
        buffer = x.new_full((self.capacity + 1, *x.shape[1:]), -torch.inf)
        return buffer.scatter_reduce(0, self.patch.view(-1, 1, 1, 1).expand_as(x), x, "amax")[:-1]


class _Edges(NamedTuple):
    """The edges of one distance: how either side is read along them and summed back.

    Attributes
    ----------
    real : bool ``[T, 1, 1, 1]``
        The byte meets a patch.
    queries, keys : the two sides
    """

    real: Tensor
    queries: _Bytes | _Patches
    keys: _Bytes | _Patches


def _prepared(q: Tensor, k: Tensor, v: Tensor, mask: PatchMask) -> tuple[list[_Edges], Tensor, Tensor, Tensor]:
    """Return the graph, scaled queries, keys and values."""
    graph = _graph(mask)
    key, value = (graph[0].keys.side(_repeat(x, q)) for x in (k, v))
    return graph, graph[0].queries.side(q) * scale_of(q, mask.scale), key, value


def _graph(mask: PatchMask) -> list[_Edges]:
    """Return edges by distance d: encoding, patch ids[i] + d reads byte i; decoding, byte i reads patch ids[i] - d."""
    capacity, ids, encode = mask.offsets.shape[0] - 1, mask.ids, mask.direction == "encode"
    queries_per_patch = mask.queries_per_patch if capacity else 1  # no patch may have any number of queries
    bounds = F.pad(mask.cu_patches, (0, 1)).long()
    document = torch.searchsorted(mask.cu_patches[1:].contiguous(), ids.contiguous(), right=True)  # of the patch
    low, high = bounds[document], bounds[document + 1]
    inside = ids >= 0
    graph = []
    for distance in range(1 if mask.window is None else max(1, min(mask.window, capacity))):
        patch = ids.long() + (distance if encode else -distance)
        real = inside & (patch >= low) & (patch < high)
        on_bytes = _Bytes(inside.view(-1, 1, 1, 1))
        on_patches = _Patches(patch.where(real, capacity), capacity, queries_per_patch)
        sides = (on_patches, on_bytes) if encode else (on_bytes, on_patches)
        graph.append(_Edges(real.view(-1, 1, 1, 1), *sides))
    return graph


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values ``[*, G, E]`` once for each of the H heads of q: head h is head ``h // (H / G)``."""
    return x.repeat_interleave(q.shape[-2] // x.shape[-2], -2)
