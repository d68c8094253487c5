"""Attention of facebookresearch/blt: masks that hold documents, windows and patches, and the layers that take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blt_kernels.integrations.bytelatent.replacement import Function, Place
from blt_kernels.integrations.bytelatent.xformers import AttentionBias, attend
from blt_kernels.layout import PatchLayout
from blt_kernels.nn.positions import attention_documents
from blt_kernels.ops.patch_cross_attention import patch_cross_attention

ATTN_IMPL = "blt_kernels"


@dataclass(frozen=True)
class PatchMask:
    """Says which bytes and patches attend to each other, in place of a mask ``[B, queries, keys]``."""

    layout: PatchLayout
    direction: str
    vectors: int
    window: int | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from ``[B, queries, H, E]`` to ``[B, keys, G, E]``."""
        q_rows, k_rows, v_rows = (x.flatten(0, 1) for x in (q, k, v))
        out = patch_cross_attention(
            q_rows, k_rows, v_rows, self.layout,
            direction=self.direction, queries_per_patch=self.vectors, window=self.window,
        )  # fmt: skip
        return out.view_as(q)


def create_causal_mask(place: Place) -> Function:
    """Return ``create_causal_mask``, which makes masks of documents and windows, as xformers' are, on every device."""

    def create_causal_mask(
        seqlen: int,
        attn_impl: str,
        attn_bias_type: str | None,
        *,
        eos_id: int | None = None,
        tokens: Tensor | None = None,
        sliding_window: int | None = None,
    ) -> Any:
        if attn_impl == "flex_attention":
            return AttentionBias()  # this attn_impl ignores documents and windows in the code base, too
        if attn_impl not in ("xformers", ATTN_IMPL):
            return place.theirs(
                seqlen, attn_impl, attn_bias_type, eos_id=eos_id, tokens=tokens, sliding_window=sliding_window
            )
        if attn_bias_type in (None, "causal"):
            return AttentionBias()
        if attn_bias_type not in ("block_causal", "local_block_causal"):
            return AttentionBias(window=sliding_window)
        if tokens is None or eos_id is None:
            raise ValueError(f"tokens, eos_id: expected both with attn_bias_type {attn_bias_type!r}, got None")
        rows, size = tokens.shape
        starts = (tokens == eos_id).flatten().roll(1)  # the first entry of a row starts a document anyway
        offsets = torch.arange(rows + 1, dtype=torch.int32, device=tokens.device) * size
        window = sliding_window if attn_bias_type == "local_block_causal" else None
        return AttentionBias(attention_documents(starts, offsets), window)

    return place.counted(create_causal_mask)


def attention_forward(place: Place) -> Function:
    """Return ``Attention.forward``, which expands no grouped heads."""

    def forward(
        self: Any, x: Tensor, freq_cis: Tensor, tok_idx: Tensor | None = None, mask: Any = None, attn_impl: str = "sdpa"
    ) -> Tensor:
        bias = AttentionBias() if isinstance(mask, str) and mask == "causal" else mask
        reason = "a kv_cache" if hasattr(self, "kv_cache") else None
        if bias is not None and not isinstance(bias, AttentionBias):
            reason = f"a mask of type {type(mask).__name__}"
        if reason is not None and attn_impl == ATTN_IMPL:
            raise TypeError(f"mask: expected one of create_causal_mask with attn_impl {ATTN_IMPL!r}, got {reason}")
        if reason is not None:
            place.fell_back(reason)
            return place.theirs(self, x, freq_cis, tok_idx=tok_idx, mask=mask, attn_impl=attn_impl)
        place.count()
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.wq, self.wk, self.wv))
        q, k = place.home.apply_rotary_emb(q, k, 1, freq_cis[: x.shape[1]])
        return self.wo(attend(q, k, v, bias).flatten(2))

    return forward


def cross_attn_mask(place: Place) -> Function:
    """Return ``cross_attn_mask``, which makes a `PatchMask`."""

    def cross_attn_mask(
        patch_ids: Tensor,
        patch_lengths: Tensor,
        N: int,
        patches_as_queries: bool = False,
        cross_attn_k: int = 1,
        window: int | None = None,
        block_mask: bool = True,
    ) -> PatchMask:
        if patch_ids.shape[1] != N:
            raise ValueError(f"N: expected the {patch_ids.shape[1]} bytes of a row of patch_ids, got {N}")
        layout = PatchLayout.from_ids(patch_ids, patch_ids, patch_lengths.shape[1])
        return PatchMask(layout, "encode" if patches_as_queries else "decode", cross_attn_k, window)

    return place.counted(cross_attn_mask)


def cross_attention_forward(place: Place) -> Function:
    """Return ``CrossAttention.forward``, which adds its input to the output."""

    def forward(self: Any, x: Tensor, kv: Tensor, mask: Any = None) -> Tensor:
        if not isinstance(mask, (PatchMask, AttentionBias)):
            place.fell_back(f"a mask of type {type(mask).__name__}" if mask is not None else "no mask")
            return place.theirs(self, x, kv, mask=mask)
        place.count()
        source = self.cross_attn_norm_kv(kv)
        inputs = ((self.wq, self.cross_attn_norm_q(x)), (self.wk, source), (self.wv, source))
        q, k, v = (layer(y).unflatten(-1, (-1, self.head_dim)) for layer, y in inputs)
        out = mask.attend(q, k, v) if isinstance(mask, PatchMask) else attend(q, k, v, mask)
        return x + self.wo(out.flatten(2))

    return forward
