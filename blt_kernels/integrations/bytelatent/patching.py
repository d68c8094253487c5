"""Patching of facebookresearch/blt: entropies, boundaries, and the patch ids of bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blt_kernels.integrations.bytelatent.replacement import Function, Place
from blt_kernels.ops.entropy_patch import patch_starts, space_patch
from blt_kernels.ops.token_entropy import token_entropy

EXACT = (torch.float32, torch.float64)


def entropy(place: Place) -> Function:
    """Return ``entropy``; logits of 16 bits are left to the code base."""

    def entropy(scores: Tensor) -> Tensor:
        if scores.dtype not in EXACT:
            place.fell_back(f"logits of {scores.dtype}")
            return place.theirs(scores)
        place.count()
        return token_entropy(scores)

    return entropy


def calculate_entropies(place: Place) -> Function:
    """Return ``calculate_entropies``, which does not pad short input to a whole context."""

    def calculate_entropies(
        tokens: Tensor,
        entropy_model: Any,
        patching_batch_size: int,
        device: str | None = None,
        enable_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        context = getattr(entropy_model, "max_length", 8192)
        if isinstance(entropy_model, place.modules["transformer"].LMTransformer) and 0 < tokens.numel() < context:
            place.count()
            entropy_model = _Shorter(entropy_model, tokens.numel())
        else:
            place.fell_back("no LMTransformer" if tokens.numel() < context else f"{context} bytes or more")
        return place.theirs(tokens, entropy_model, patching_batch_size, device, enable_grad)

    return calculate_entropies


class _Shorter:
    """Calls an entropy model whose context is as long as its input."""

    def __init__(self, model: Any, max_length: int) -> None:
        self.model, self.max_length = model, max_length

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


def patch(place: Place) -> Function:
    """Return ``Patcher.patch``: by entropy with a threshold, compared in the dtype of the entropies, and at spaces."""

    def patch(
        self: Any,
        tokens: Tensor,
        include_next_token: bool = False,
        preds: Tensor | None = None,
        entropies: Tensor | None = None,
        threshold: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        threshold = self.threshold if threshold is None else threshold
        reason = _left_out(self, tokens, threshold)
        if reason is not None:
            place.fell_back(reason)
            return place.theirs(self, tokens, include_next_token, preds, entropies, threshold)
        place.count()
        if self.patching_mode == "space":
            return space_patch(tokens).to_lengths(include_next_byte=include_next_token), None
        if entropies is not None:
            scores = entropies.float()
        elif preds is not None:
            scores = place.home.entropy(preds)
        else:
            arguments = (tokens, self.entropy_model, self.patching_batch_size, self.device)
            scores, _ = place.home.calculate_entropies(*arguments)
        layout = patch_starts(
            scores,
            threshold=threshold,
            threshold_add=self.threshold_add,
            monotonic=self.monotonicity,
            max_patch_length=self.max_patch_length,
            compare="model",
        )
        lengths = layout.to_lengths(include_next_byte=include_next_token)
        return lengths if self.max_patch_length is None else lengths.to(tokens.dtype), scores

    return patch


def _left_out(patcher: Any, tokens: Tensor, threshold: float | None) -> str | None:
    """Return why a call of ``Patcher.patch`` is left to the code base, or None."""
    mode = getattr(patcher.patching_mode, "value", patcher.patching_mode)
    if patcher.log_time:
        return "log_time"
    if mode not in ("entropy", "space"):
        return f"patching_mode {mode}"
    if tokens.numel() == 0:
        return "no bytes"
    if mode == "space":
        return None if patcher.max_patch_length is None else "max_patch_length at spaces"
    return "no threshold" if threshold is None else None


def patch_ids_from_lengths(place: Place) -> Function:
    """Return ``patch_ids_from_lengths``, without its comparison of every byte with every patch."""

    def patch_ids_from_lengths(patch_lengths: Tensor, seq_len: int) -> Tensor:
        ends = patch_lengths.cumsum(-1)
        position = torch.arange(seq_len, dtype=ends.dtype, device=ends.device).expand(ends.shape[0], seq_len)
        return torch.searchsorted(ends, position.contiguous(), right=True)

    return place.counted(patch_ids_from_lengths)
