"""Peers of block_causal_attention: q ``[T, H, E]``, k and v ``[T, G, E]`` are packed, and G may be less than H."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peers import compiled


def masked_attention(cu_seqlens: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One call of torch's attention for all documents, with a mask of T * T booleans."""
    position = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    distance = position[:, None] - position
    mask = (document[:, None] == document) & (distance >= 0) & (distance < (window or position.numel()))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return attention


def attention_by_document(lengths: list[int], window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A call of torch's attention for each document; it masks windows only by a mask of booleans."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None
        if window is not None:
            mask = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool, device=q.device).tril().triu(1 - window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(*x) for x in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)])

    return attention


def flex_attention(cu_seqlens: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's flex_attention, compiled, with a block mask that is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    size = int(cu_seqlens[-1])
    position = torch.arange(size, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key) & (query - key < (window or size))

    mask = create_block_mask(visible, None, None, size, size, device=cu_seqlens.device.type)
    run = compiled(flex)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return attention


def varlen_attention(cu_seqlens: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's variable-length flash attention, for half precision on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    longest = int(cu_seqlens.diff().max())
    reach = (-1 if window is None else window - 1, 0)  # keys before the query's own, and behind it

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=reach, enable_gqa=grouped)

    return attention


def attention_with_cache(used: list[int], room: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A call of torch's attention for the one new query of each sequence: it reads the keys that its cache holds."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caches = zip(q.split(1), k.split(room), v.split(room), used, strict=True)
        return torch.cat([attend(one, keys[:n], values[:n]) for one, keys, values, n in caches])

    return attention
