"""Peers of patch_cross_attention, without a window.

The masked ones want rows: queries ``[B, Q, H, E]``, keys and values ``[B, N, H, E]``, and the patches that queries and
keys belong to, ``[B, Q]`` and ``[B, N]``: where these are equal, they meet. The others want packed bytes ``[T, H, E]``,
patches ``[C * K, H, E]`` and the patch of each byte, int64 ``[T]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peers import compiled

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def additive_mask(query_patch: Tensor, key_patch: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask of transformers: 0 where a query and a key meet, the most negative number elsewhere."""
    meet = query_patch[:, None, :, None] == key_patch[:, None, None, :]
    return torch.zeros(meet.shape, dtype=dtype, device=meet.device).masked_fill_(~meet, torch.finfo(dtype).min)


def masked_attention(query_patch: Tensor, key_patch: Tensor, dtype: torch.dtype) -> Attention:
    """Call torch's attention as transformers does, with a mask of B * Q * N numbers that is made beforehand."""
    mask = additive_mask(query_patch, key_patch, dtype)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attention


def flex_attention(query_patch: Tensor, key_patch: Tensor) -> Attention:
    """Return torch's flex_attention, compiled, with facebookresearch/blt's block mask, which is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    meet = query_patch[:, :, None] == key_patch[:, None, :]

    def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return meet[batch, query, key]

    rows, queries, keys = meet.shape
    mask = create_block_mask(visible, rows, None, queries, keys, device=meet.device.type)
    run = compiled(flex)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return run(q, k, v, block_mask=mask).transpose(1, 2)

    return attention


def gather_decode(ids: Tensor, vectors: int) -> Attention:
    """Copy the K vectors of each byte's patch to the byte, in plain PyTorch. Every byte needs a patch."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.unflatten(0, (-1, vectors)).index_select(0, ids) for x in (k, v))  # [T, K, H, E]
        scores = torch.einsum("the,tkhe->tkh", q, keys) * q.shape[-1] ** -0.5
        return torch.einsum("tkh,tkhe->the", scores.softmax(1), values)

    return attention


def gather_encode(ids: Tensor, vectors: int) -> Attention:
    """Copy the K queries of each byte's patch to the byte, in plain PyTorch; scattered reductions make the softmax."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = q.unflatten(0, (-1, vectors)).index_select(0, ids)  # [T, K, H, E]
        scores = torch.einsum("tkhe,the->tkh", queries, k) * q.shape[-1] ** -0.5
        none = scores.new_full((q.shape[0] // vectors, *scores.shape[1:]), -torch.inf)
        index = ids[:, None, None].expand_as(scores)
        top = none.scatter_reduce(0, index, scores.detach(), "amax")
        weights = (scores - top.index_select(0, ids)).exp()
        total = torch.zeros_like(top).index_add(0, ids, weights)
        out = q.new_zeros(*top.shape, q.shape[-1]).index_add(0, ids, weights[..., None] * v[:, None])
        return (out / total[..., None]).flatten(0, 1)

    return attention
