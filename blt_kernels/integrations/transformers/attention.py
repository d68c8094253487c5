"""Self-attention and cross attention of transformers' BLT on our ops.

A layer runs on our op if its mask is one of `masks`. With a tensor or None it is left to transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blt_kernels.integrations._applied import Applied
from blt_kernels.integrations.transformers.masks import CausalMask, CrossMask
from blt_kernels.nn.positions import rotate
from blt_kernels.ops.block_causal_attention import block_causal_attention
from blt_kernels.ops.patch_cross_attention import patch_cross_attention

NAME = "blt_kernels"


def self_attention(applied: Applied, modeling: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of ``BltSelfAttention``."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any, position_embeddings: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        mask = attention_mask
        if not isinstance(mask, CausalMask):
            return stock(self, hidden_states, attention_mask, position_embeddings, *args, **kwargs)
        applied.count("BltSelfAttention.forward")
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = position_embeddings
        if torch.compiler.is_compiling():  # inductor generates no code for complex numbers
            q, k = modeling.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        else:
            table = _rotations(mask, cos, sin)
            q, k = rotate(q, table), rotate(k, table)
        return self.o_proj(_attend(q, k, v, mask, self.scaling).flatten(-2)), None

    return forward


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, scale: float | None) -> Tensor:
    out = block_causal_attention(q, k, v, window=mask.window, scale=scale, ranges=mask.ranges)
    assert isinstance(out, Tensor)  # without return_lse
    return out


def _rotations(mask: CausalMask, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the cosines and sines of interleaved pairs as complex numbers ``[B or 1, S, 1, E/2]``."""
    if mask.rotary is None or mask.rotary[0] is not cos:
        dtype = cos.dtype if cos.dtype == torch.float64 else torch.float32
        table = torch.complex(cos[..., ::2].to(dtype), sin[..., ::2].to(dtype)).unsqueeze(2)
        mask.rotary = cos, table
    return mask.rotary[1]


def cross_attention(applied: Applied, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of ``BltCrossAttention``."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        mask = attention_mask
        if not isinstance(mask, CrossMask):
            return stock(self, hidden_states, cross_attention_states, attention_mask, **kwargs)
        applied.count("BltCrossAttention.forward")
        states = self.k_norm(cross_attention_states)
        q = self.q_proj(self.q_norm(hidden_states)).unflatten(-1, (-1, self.head_dim))
        k, v = (project(states).unflatten(-1, (-1, self.head_dim)) for project in (self.k_proj, self.v_proj))
        out = patch_cross_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            mask.layout,
            direction=mask.direction,
            queries_per_patch=mask.queries_per_patch,
            scale=self.scaling,
        )
        return self.o_proj(out.view(*hidden_states.shape[:2], -1)) + hidden_states, None

    return forward


def register() -> None:
    """Make "blt_kernels" an ``attn_implementation`` of transformers. It stays one after `undo`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with query, key and value ``[B, H, S, E]``; return ``[B, S, H, E]``.

    `sdpa` takes over where `_mask` made a dense mask or None, where a layer is not causal, and where there is dropout.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = attention_mask
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    if not isinstance(mask, CausalMask) or dropout or not causal:
        if isinstance(mask, CausalMask):
            mask = _dense(query.shape[-2], mask.window, query.device) if causal else None
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return _attend(q, k, v, mask, scaling), None


def _dense(length: int, window: int | None, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return ((distance >= 0) & (distance < (length if window is None else window)))[None, None]


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Any:
    """Return a `CausalMask` for whole rows without padding, and the mask of `sdpa` for all else."""
    from transformers.masking_utils import sdpa_mask

    whole = allow_is_causal_skip and attention_mask is None and q_length == kv_length
    blt = str(getattr(kwargs.get("config"), "model_type", "")).startswith("blt")
    if whole and blt and isinstance(q_offset, int) and q_offset == kv_offset == 0:
        return CausalMask.of(batch_size, q_length, local_size, torch.device(kwargs.get("device", "cpu")))
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
