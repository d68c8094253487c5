"""The global transformer, and cross attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bytelatent.base_transformer import BaseTransformer, dense_attention
from bytelatent.model.utils import create_causal_mask


class CrossAttention(nn.Module):
    def __init__(self, dim: int, head_dim: int, n_heads: int, n_kv_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.head_dim, self.n_heads, self.n_kv_heads = head_dim, n_heads, n_kv_heads
        self.cross_attn_norm_q = nn.RMSNorm(dim, eps=norm_eps)
        self.cross_attn_norm_kv = nn.RMSNorm(dim, eps=norm_eps)
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, kv: Tensor, mask: Any = None) -> Tensor:
        source = self.cross_attn_norm_kv(kv)
        q = self.wq(self.cross_attn_norm_q(x)).unflatten(-1, (-1, self.head_dim))
        k, v = (layer(source).unflatten(-1, (-1, self.head_dim)) for layer in (self.wk, self.wv))
        assert mask is None or isinstance(mask, Tensor)
        return x + self.wo(dense_attention(q, k, v, mask).flatten(2))


class GlobalTransformer(BaseTransformer):
    def __init__(self, args: Any) -> None:
        super().__init__(args.dim_global, args.n_layers_global, args.n_heads_global, args)
        self.attn_bias_type = args.attn_bias_type
        width = args.dim_local_encoder * args.cross_attn_k
        self.token_embedding_projection = nn.Linear(width, self.dim, bias=False) if width != self.dim else None

    def forward(self, tokens: Tensor, embeds: Tensor) -> Tensor:
        mask = create_causal_mask(
            tokens.shape[1], self.attn_impl, self.attn_bias_type, tokens=tokens, eos_id=self.eos_id
        )
        projection = self.token_embedding_projection
        return self.run(embeds if projection is None else projection(embeds), mask)
