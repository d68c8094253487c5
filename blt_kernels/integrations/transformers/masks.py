"""Masks without a matrix, which transformers' BLT passes from layer to layer in place of dense ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blt_kernels.layout import AttentionRanges, PatchLayout
from blt_kernels.ops.block_causal_attention import attention_ranges


@dataclass(eq=False)
class CausalMask:
    """Says that every row is one document, and how far a query attends back.

    Attributes
    ----------
    window : int or None
        As in `block_causal_attention`.
    ranges : AttentionRanges or None
        Computed once for all layers on CUDA.
    rotary : (Tensor, Tensor) or None
        The cosines that transformers gave the last layer, and the rotations made of them.
    """

    window: int | None
    ranges: AttentionRanges | None = None
    rotary: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(rows: int, length: int, window: int | None, device: torch.device) -> CausalMask:
        """Return the mask of `rows` documents of one `length`."""
        if device.type == "cpu":
            return CausalMask(window)
        offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
        return CausalMask(window, attention_ranges(offsets, num_queries=rows * length, window=window))

    def to(self, device: torch.device | str, **_: Any) -> CausalMask:
        """Return a mask for a layer on another device, as accelerate asks for."""
        return CausalMask(self.window)


@dataclass(eq=False)
class CrossMask:
    """Says which bytes and patches attend to each other in cross attention.

    Attributes
    ----------
    layout : PatchLayout
        Of ``B * slots`` patches.
    direction : str
        "encode" or "decode".
    queries_per_patch : int
    """

    layout: PatchLayout
    direction: str
    queries_per_patch: int

    def to(self, device: torch.device | str, **_: Any) -> CrossMask:
        """Return the mask for a layer on another device, as accelerate asks for."""
        return replace(self, layout=self.layout.to(device))
