"""Peers of block_causal_attention: q ``[T, H, E]``, k and v ``[T, G, E]`` are packed, and G may be less than H."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import blt_kernels as bk
from blt_kernels.reference.block_causal_attention import block_causal_attention_reference
from peers import compiled


def masked_attention(cu_seqlens: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Call torch's attention once for all documents, with a mask of T * T booleans."""
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
    """Call torch's attention for each document; it masks windows only by a mask of booleans."""

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


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call torch's attention once for documents of one length ``[B, S, H, E]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flex_attention(cu_seqlens: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return torch's flex_attention, compiled, with a block mask that is made beforehand."""
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


def plain_attention(cu_seqlens: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attend by blocks of rows with masks, in plain PyTorch: for too many documents for a call each."""
    return lambda q, k, v: block_causal_attention_reference(q, k, v, cu_seqlens, window=window)


def cudnn_attention(lengths: list[int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Call cuDNN's attention once for documents of one length, without a window."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)

    return attention


def varlen_attention(
    cu_seqlens: Tensor, window: int | None, keys: Tensor | None = None, used: Tensor | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Call torch's variable-length flash attention, for half precision on a GPU; `keys` and `used` are of a cache."""
    from torch.nn.attention.varlen import varlen_attn

    keys = cu_seqlens if keys is None else keys
    longest = [int(offsets.diff().max()) for offsets in (cu_seqlens, keys)]
    options = {"window_size": (-1 if window is None else window - 1, 0)}  # counts keys before and after the query's own
    if used is not None:
        options["seqused_k"] = used
    says_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 has no such argument

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if says_groups else {}
        return varlen_attn(q, k, v, cu_seqlens, keys, *longest, **options, **grouped)

    return attention


def delegated_attention(cu_seqlens: Tensor, **options: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return our op with ``set_attention_backend("flash")``: FlashAttention 3 or 4 where it is installed."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = bk.attention_backend()
        bk.set_attention_backend("flash")
        try:
            return bk.block_causal_attention(q, k, v, cu_seqlens, **options)
        finally:
            bk.set_attention_backend(before)

    return attention


def attention_with_cache(used: list[int], room: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Call torch's attention for the one new query of each sequence: it reads the keys that its cache holds."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caches = zip(q.split(1), k.split(room), v.split(room), used, strict=True)
        return torch.cat([attend(one, keys[:n], values[:n]) for one, keys, values, n in caches])

    return attention
