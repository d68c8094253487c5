"""What a user would run instead of the ops: the steps of other code bases, in eager PyTorch or compiled.

transformers' own functions are called where it is installed. facebookresearch/blt is no package; what its patcher does
is written out here, with the checks that it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# --- entropy and patches ----------------------------------------------------------------------------------------------


def eager_entropy(logits: Tensor) -> Tensor:
    """The entropy of facebookresearch/blt, in the dtype of the logits."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p * log_p.exp()).sum(-1)


def eager_patch_lengths(entropy: Tensor, threshold: float) -> Tensor:
    """facebookresearch/blt: entropies ``[B, S]`` to padded lengths, by a mask, start ids and their differences."""
    rows, size = entropy.shape
    mask = (entropy.float()[:, 1:] > threshold)[:, :-1]
    # Start ids of ragged rows by one boolean selection: as many sentinels as there are bytes without a start.
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
    """facebookresearch/blt: logits ``[B, S, A]`` to entropies and padded patch lengths."""
    entropy = eager_entropy(logits)
    return entropy, eager_patch_lengths(entropy, threshold)


def transformers_entropy_patch(threshold: float) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """The steps of transformers' BLT patcher after its model, or None if it is not installed."""
    try:
        from transformers.models.blt.modeling_blt import BltPatcher, process_patch_lengths
    except ImportError:
        return None

    def steps(logits: Tensor) -> tuple[Tensor, Tensor]:
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        lengths = BltPatcher.patch_lengths_from_entropies(entropy, entropy.shape[1], patch_size=4, threshold=threshold)
        return entropy, process_patch_lengths(lengths, None)

    return steps


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for the shapes that it is called with, as a benchmark would want."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def entropy_and_mask(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """As much of the work as torch.compile takes in one graph: the patches themselves depend on the data."""
    entropy = eager_entropy(logits)
    return entropy, entropy > threshold


# --- attention within documents: q, k and v are packed [T, H, E] ------------------------------------------------------


def masked_attention(cu_seqlens: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One call of torch's attention for all documents, with a mask of T * T booleans."""
    position = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    distance = position[:, None] - position
    mask = (document[:, None] == document) & (distance >= 0) & (distance < (window or position.numel()))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return attention


def attention_by_document(lengths: list[int], window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A call of torch's attention for each document; it masks windows only by a mask of booleans."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None
        if window is not None:
            mask = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool, device=q.device).tril().triu(1 - window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return out[0].transpose(0, 1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(*x) for x in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)])

    return attention


def flex_attention(cu_seqlens: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's flex_attention, compiled, with a block mask that is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    size = int(cu_seqlens[-1])
    position = torch.arange(size, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key) & (query - key < (window or size))

    mask = create_block_mask(visible, None, None, size, size, device=cu_seqlens.device.type)
    run = compiled(flex)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return run(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attention
