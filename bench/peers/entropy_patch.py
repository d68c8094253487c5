"""Peers of entropy_patch and patch_starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peers.token_entropy import eager_entropy


def eager_patch_lengths(entropy: Tensor, threshold: float) -> Tensor:
    """Turn entropies ``[B, S]`` into padded lengths by mask, start ids and differences, as facebookresearch/blt."""
    rows, size = entropy.shape
    mask = (entropy.float()[:, 1:] > threshold)[:, :-1]
    # One boolean selection finds the starts of ragged rows: each byte without a start adds a sentinel.
    position = torch.arange(2, size, device=entropy.device).expand(rows, -1)
    candidates = torch.cat((position, torch.full_like(position, size)), 1)
    starts = candidates[torch.cat((mask, ~mask), 1)].view(rows, -1)[:, : mask.sum(1).max()]
    first = torch.tensor([0, 1], device=entropy.device).expand(rows, -1)
    starts = torch.cat((first, starts, torch.full_like(first[:, :1], size)), 1)
    lengths = starts.diff()
    _check_lengths(lengths)
    used = int((lengths != 0).any(0).sum())
    lengths = lengths[:, :used]
    assert int(lengths.sum()) == rows * size
    return lengths


def _check_lengths(lengths: Tensor) -> None:
    assert bool((lengths >= 0).all())
    zero = F.pad(lengths[:, :-1] == 0, (1, 0))
    assert not bool(((lengths != 0) & zero).any())


def eager_entropy_patch(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Turn logits ``[B, S, A]`` into entropies and padded patch lengths, as facebookresearch/blt does."""
    entropy = eager_entropy(logits)
    return entropy, eager_patch_lengths(entropy, threshold)


def transformers_entropy_patch(threshold: float) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Return the steps of transformers' BLT patcher after its model, or None if it is not installed."""
    try:
        from transformers.models.blt.modeling_blt import BltPatcher, process_patch_lengths
    except ImportError:
        return None

    def steps(logits: Tensor) -> tuple[Tensor, Tensor]:
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        lengths = BltPatcher.patch_lengths_from_entropies(entropy, entropy.shape[1], patch_size=4, threshold=threshold)
        return entropy, process_patch_lengths(lengths, None)

    return steps


def entropy_and_mask(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Do as much of the work as torch.compile takes in one graph: the patches themselves depend on the data."""
    entropy = eager_entropy(logits)
    return entropy, entropy > threshold
