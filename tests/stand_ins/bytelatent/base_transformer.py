"""Transformer layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from xformers.ops import AttentionBias, fmha


def rotations(dim: int, end: int, theta: float) -> Tensor:
    """Return unit complex numbers ``[end, dim / 2]``."""
    frequency = theta ** (-torch.arange(0, dim, 2).double() / dim)
    angle = torch.arange(end)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


def apply_rotary_emb(xq: Tensor, xk: Tensor, seq_dim: int, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    assert seq_dim == 1

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).type_as(x)

    return turned(xq), turned(xk)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from ``[B, S, H, E]`` with a mask of booleans ``[..., queries, keys]``; queries without a key get 0."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1).nan_to_num(0.0), v)


class Attention(nn.Module):
    def __init__(self, dim: int, head_dim: int, n_heads: int, n_kv_heads: int, rope_theta: float) -> None:
        super().__init__()
        self.head_dim, self.n_heads, self.n_kv_heads = head_dim, n_heads, n_kv_heads
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(
        self, x: Tensor, freq_cis: Tensor, tok_idx: Tensor | None = None, mask: Any = None, attn_impl: str = "sdpa"
    ) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.wq, self.wk, self.wv))
        q, k = apply_rotary_emb(q, k, 1, freq_cis[: x.shape[1]])
        if hasattr(self, "kv_cache"):
            k, v = self.kv_cache.update(k, v, tok_idx)
        if attn_impl == "xformers":
            assert mask is None or isinstance(mask, AttentionBias)
            out = fmha.memory_efficient_attention(q, k, v, attn_bias=mask)
        elif attn_impl == "sdpa":
            assert mask is None or isinstance(mask, (str, Tensor))
            if mask == "causal" if isinstance(mask, str) else False:
                mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
            out = dense_attention(q, k, v, mask)
        else:
            raise NotImplementedError(attn_impl)
        return self.wo(out.flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, n_heads: int, args: Any) -> None:
        super().__init__()
        self.attention = Attention(dim, dim // n_heads, n_heads, n_heads, args.rope_theta)
        self.feed_forward = FeedForward(dim, 2 * dim)
        self.attention_norm = nn.RMSNorm(dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(dim, eps=args.norm_eps)

    def forward(
        self, x: Tensor, freq_cis: Tensor, tok_idx: Tensor | None = None, mask: Any = None, attn_impl: str = "sdpa"
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), freq_cis, tok_idx=tok_idx, mask=mask, attn_impl=attn_impl)
        return x + self.feed_forward(self.ffn_norm(x))


class BaseTransformer(nn.Module):
    def __init__(self, dim: int, n_layers: int, n_heads: int, args: Any) -> None:
        super().__init__()
        self.dim, self.attn_impl, self.eos_id = dim, args.attn_impl, args.eos_id
        self.layers = nn.ModuleList(TransformerBlock(dim, n_heads, args) for _ in range(n_layers))
        self.rope = (dim // n_heads, args.rope_theta)

    def run(self, h: Tensor, mask: Any) -> Tensor:
        freq_cis = rotations(self.rope[0], h.shape[1], self.rope[1])
        for layer in self.layers:
            h = layer(h, freq_cis, mask=mask, attn_impl=self.attn_impl)
        return h
