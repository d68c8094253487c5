"""Masks and pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from xformers.ops import fmha


def pooling_downsample(h: Tensor, max_num_patches: int, pooling_mode: str, patch_ids: Tensor) -> Tensor:
    """Concatenate mean, min and max, whichever the mode names."""
    index = patch_ids[..., None].expand_as(h)
    asked = [("mean", ("avg", "mean")), ("amin", ("min",)), ("amax", ("max",))]
    zeros = h.new_zeros(h.shape[0], max_num_patches, h.shape[2])
    return torch.cat(
        [
            zeros.scatter_reduce(1, index, h, reduce, include_self=False)
            for reduce, names in asked
            if any(name in pooling_mode for name in names)
        ],
        -1,
    )


def downsample(
    h: Tensor,
    num_patches: int,
    patch_lengths: Tensor | None = None,
    patch_ids: Tensor | None = None,
    downsampling_by_pooling: str | None = None,
    patch_size: int = 4,
) -> Tensor:
    assert downsampling_by_pooling is not None
    assert patch_ids is not None
    return pooling_downsample(h, num_patches, downsampling_by_pooling, patch_ids)


def create_causal_mask(
    seqlen: int,
    attn_impl: str,
    attn_bias_type: str | None,
    *,
    eos_id: int | None = None,
    tokens: Tensor | None = None,
    sliding_window: int | None = None,
) -> Any:
    if attn_impl == "xformers":
        if attn_bias_type in (None, "causal"):
            return fmha.attn_bias.LowerTriangularMask()
        if attn_bias_type not in ("block_causal", "local_block_causal"):
            return fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=sliding_window - 1, window_right=0)
        lengths = [len(part) for row in tokens.tolist() for part in documents_of(row, eos_id)]
        mask = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(q_seqlen=lengths)
        return mask if attn_bias_type == "block_causal" else mask.make_local_attention(sliding_window)
    if attn_impl == "sdpa" and attn_bias_type == "causal":
        return "causal"
    if attn_impl == "sdpa":
        raise ValueError(f"sdpa has no {attn_bias_type}")
    raise NotImplementedError(attn_impl)


def documents_of(row: list[int], eos_id: int | None) -> list[list[int]]:
    """Split a row after each `eos_id`."""
    parts: list[list[int]] = [[]]
    for token in row:
        parts[-1].append(token)
        if token == eos_id:
            parts.append([])
    return [part for part in parts if part]
