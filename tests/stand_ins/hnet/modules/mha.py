"""Causal attention in windows, which the original computes with flash-attn."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | tuple[int, int]) -> Tensor:
    """Attend within one document: the last query sees the last key, and `window` keys before its own."""
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    own = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    before = window[0] if isinstance(window, tuple) else window
    hidden = (key > own) | ((key < own - before) if before >= 0 else False)
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


class FlashCausalSelfAttention(nn.Module):
    def __init__(self, softmax_scale: float | None = None, window_size: int | tuple[int, int] = (-1, -1)) -> None:
        super().__init__()
        self.softmax_scale, self.window_size = softmax_scale, window_size

    def forward(self, qkv: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        if cu_seqlens is None:
            return torch.stack([attend(*row.unbind(1), self.softmax_scale, self.window_size) for row in qkv])
        documents = [qkv[begin:end] for begin, end in pairwise(cu_seqlens.tolist())]
        return torch.cat([attend(*x.unbind(1), self.softmax_scale, self.window_size) for x in documents])


class FlashCausalCrossAttention(nn.Module):
    def __init__(self, softmax_scale: float | None = None, window_size: int | tuple[int, int] = (-1, -1)) -> None:
        super().__init__()
        self.softmax_scale, self.window_size = softmax_scale, window_size

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        if cu_seqlens is None or cu_seqlens_k is None:
            rows = zip(q, kv, strict=True)
            return torch.stack([attend(x, *y.unbind(1), self.softmax_scale, self.window_size) for x, y in rows])
        documents = zip(pairwise(cu_seqlens.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
        return torch.cat(
            [
                attend(q[begin:end], *kv[first:last].unbind(1), self.softmax_scale, self.window_size)
                for (begin, end), (first, last) in documents
            ]
        )
