"""`ByteLM`, `BLT` and `MegaByte` are composed of these layers over packed data.

The layers are Llama's blocks: RMSNorm, rotary positions in interleaved pairs, SwiGLU, no biases.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels.layout import AttentionRanges, PatchLayout
from blt_kernels.nn.config import TransformerConfig
from blt_kernels.nn.functional import rms_norm, swiglu
from blt_kernels.nn.positions import rotate


def init_normal(weight: Tensor, std: float) -> None:
    """Draw `weight` from a normal of deviation `std`, cut at three deviations. Fake tensors have no values."""
    if not isinstance(weight, FakeTensor):  # torch reads the values and draws again until all of them fit
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a matrix drawn from a normal of deviation ``in_features^-0.5``, cut at three deviations."""
    layer = nn.Linear(in_features, out_features, bias=False)
    init_normal(layer.weight, in_features**-0.5)
    return layer


def embedding(rows: int, dim: int) -> nn.Embedding:
    """Return a table drawn from a normal of deviation 0.5, as large as the updates of a layer."""
    table = nn.Embedding(rows, dim)
    init_normal(table.weight, 0.5)
    return table


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight``, in the weight's dtype, to which autocast's bf16 is converted."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
        if not _checks.readable(x):
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps  # the default of torch
        return rms_norm(x, self.weight, eps)


class SelfAttention(nn.Module):
    """Causal attention within documents, with rotary positions."""

    def __init__(self, config: TransformerConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.attention, self.window, self.head_dim = ops.block_causal_attention, config.window, config.head_dim
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.dim, config.dim)

    def forward(
        self, x: Tensor, table: Tensor, documents: Tensor | Documents, ranges: AttentionRanges | None = None
    ) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = self.attention(rotate(q, table), rotate(k, table), v, documents, window=self.window, ranges=ranges)
        return self.o_proj(out.flatten(-2))


class CrossAttention(nn.Module):
    """Attention between patches and bytes. Returns the update of the queries without their residual."""

    def __init__(
        self,
        config: TransformerConfig,
        ops: SimpleNamespace,
        direction: str,
        queries_per_patch: int,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.head_dim, self.window = ops.patch_cross_attention, config.head_dim, window
        self.direction, self.queries_per_patch = direction, queries_per_patch
        self.q_norm = RMSNorm(config.dim, config.norm_eps)
        self.k_norm = RMSNorm(config.dim, config.norm_eps)
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.dim, config.dim)

    def forward(self, queries: Tensor, states: Tensor, layout: PatchLayout) -> Tensor:
        states = self.k_norm(states)
        q = self.q_proj(self.q_norm(queries)).unflatten(-1, (-1, self.head_dim))
        k, v = (p(states).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        out = self.attention(
            q, k, v, layout, direction=self.direction, queries_per_patch=self.queries_per_patch, window=self.window
        )
        return self.o_proj(out.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = linear(config.dim, config.hidden_dim)
        self.up_proj = linear(config.dim, config.hidden_dim)
        self.down_proj = linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up) if _checks.readable(gate) else F.silu(gate) * up)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with a norm before and a residual around it.

    Layers of the same documents and window can share their ``ranges``: see `attention_ranges`.
    """

    recompute = False  # True: backward computes the layer again, so that only its input is kept

    def __init__(self, config: TransformerConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = SelfAttention(config, ops)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, table: Tensor, documents: Tensor | Documents, ranges: AttentionRanges | None = None
    ) -> Tensor:
        if self.recompute and torch.is_grad_enabled():  # a layer draws no random numbers
            return checkpoint(self._layer, x, table, documents, ranges, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x, table, documents, ranges)

    def _layer(self, x: Tensor, table: Tensor, documents: Tensor | Documents, ranges: AttentionRanges | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), table, documents, ranges)
        return x + self.mlp(self.post_attention_layernorm(x))
