"""Patching of transformers' BLT: the entropy model, and layouts with their padded patch axis.

transformers pads the patches of every row to the most that a row has, and counts a patch that the byte to come would
start. Layouts here have this axis: ``B * slots`` patches, of which the last ones of a row may be empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blt_kernels.integrations._applied import Applied
from blt_kernels.integrations.transformers.masks import CausalMask
from blt_kernels.layout import PatchLayout
from blt_kernels.ops.entropy_patch import patch_starts
from blt_kernels.ops.token_entropy import token_entropy


@dataclass(frozen=True, eq=False)
class Patches:
    """Holds the patches of a batch, for our ops and for transformers' functions.

    Attributes
    ----------
    layout : PatchLayout
        Of ``B * slots`` patches.
    ids, decode_ids : int64 ``[B, S]``
        The slot of each byte in its row, and the slot whose output it reads.
    slots : int
    """

    layout: PatchLayout
    ids: Tensor
    decode_ids: Tensor
    slots: int


def patches_of_entropies(entropies: Tensor, threshold: float, max_patch_length: int | None, compare: str) -> Patches:
    """Cut rows of entropies ``[B, S]`` into patches. Synchronises once, for the number of slots."""
    if compare == "model":
        threshold = torch.tensor(threshold, dtype=entropies.dtype).item()
    rows, length = entropies.shape
    layout = patch_starts(entropies, threshold=threshold, max_patch_length=max_patch_length)
    counts = layout.cu_patches.diff()
    last = torch.arange(1, rows + 1, device=entropies.device) * length - 1
    opens = layout.decode_ids[last] == layout.patch_ids[last]  # the byte to come would start a patch
    slots = int((counts + opens).max())
    first = layout.cu_patches[:-1, None]
    ids, decode_ids = layout.patch_ids.view(rows, length) - first, layout.decode_ids.view(rows, length) - first
    if rows == 1 and slots <= layout.capacity:
        return Patches(_trimmed(layout, slots), ids.long(), decode_ids.long(), slots)
    return Patches(PatchLayout.from_ids(ids, decode_ids, slots), ids.long(), decode_ids.long(), slots)


def _trimmed(layout: PatchLayout, slots: int) -> PatchLayout:
    """Return the layout of one row with a capacity of `slots`, all of which count as patches."""
    cu_patches = torch.arange(2, dtype=torch.int32, device=layout.device) * slots
    return replace(
        layout,
        patch_offsets=layout.patch_offsets[: slots + 1],
        decode_offsets=layout.decode_offsets[: slots + 1],
        cu_patches=cu_patches,
    )


def patches_of_lengths(patch_lengths: Tensor, length: int) -> Patches:
    """Return the patches that transformers' patch lengths ``[B, Pmax]`` mean, bytes beyond their sum included."""
    slots = patch_lengths.shape[1]
    position = torch.arange(length, device=patch_lengths.device).expand(patch_lengths.shape[0], -1).contiguous()

    def ids_of(lengths: Tensor) -> Tensor:
        lengths = lengths.long()
        starts = lengths.cumsum(-1) - lengths
        return torch.searchsorted(starts.contiguous(), position, right=True) - 1

    ids, decode_ids = ids_of(patch_lengths), ids_of(patch_lengths[:, 1:])
    return Patches(PatchLayout.from_ids(ids, decode_ids, slots), ids, decode_ids, slots)


def lengths_from_entropies(applied: Applied, stock: Callable[..., Any], compare: str) -> Callable[..., Tensor]:
    """Return ``BltPatcher.patch_lengths_from_entropies``."""
    label = "BltPatcher.patch_lengths_from_entropies"

    def patch_lengths_from_entropies(
        entropies: Tensor, sequence_length: int, patch_size: int | None = None, threshold: float | None = None
    ) -> Tensor:
        if threshold is None or entropies.dim() != 2 or entropies.shape[1] != sequence_length or not entropies.numel():
            applied.fell_back(label, f"entropies {list(entropies.shape)} of {sequence_length} bytes")
            return stock(entropies, sequence_length, patch_size, threshold)
        applied.count(label)
        if compare == "model":
            threshold = torch.tensor(threshold, dtype=entropies.dtype).item()
        return patch_starts(entropies, threshold=threshold).to_lengths(padding=-1)

    return patch_lengths_from_entropies


def patcher_forward(
    applied: Applied, modeling: Any, stock: Callable[..., Any], attention: bool, patching: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return the forward of ``BltPatcher`` for whole rows of ids; other calls are left to transformers."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        *args: Any,
        patch_size: int | None = None,
        threshold: float | None = None,
        max_patch_length: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        names = ("attention_mask", "position_ids", "past_key_values", "cache", "inputs_embeds", "use_cache")
        reason = None
        if input_ids is None or args or any(kwargs.get(name) is not None for name in names):
            reason = "arguments beside input_ids"
        elif self.training and config.dropout:
            reason = "dropout"
        elif not input_ids.numel():
            reason = "no bytes"
        if reason is not None:
            applied.fell_back("BltPatcher.forward", reason)
            rest = {"patch_size": patch_size, "threshold": threshold, "max_patch_length": max_patch_length}
            return stock(self, input_ids, *args, **rest, **kwargs)
        applied.count("BltPatcher.forward")
        hidden_states = self.embed_tokens(input_ids)
        rows, length = hidden_states.shape[:2]
        position_ids = torch.arange(length, device=hidden_states.device)[None]
        if attention:
            window = config.sliding_window if has_windows(modeling) else None
            mask: Any = CausalMask.of(rows, length, window, hidden_states.device)
        else:
            mask = dense_mask(modeling, config, config.sliding_window, hidden_states)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, attention_mask=mask)
        logits = self.lm_head(self.norm(hidden_states))
        entropies = token_entropy(logits) if patching else torch.distributions.Categorical(logits=logits).entropy()
        if patch_size is None:
            lengths = torch.ones((rows, length), dtype=hidden_states.dtype, device=hidden_states.device)
        else:
            lengths = self.patch_lengths_from_entropies(
                entropies=entropies, sequence_length=length, patch_size=patch_size, threshold=threshold
            )
        return entropies, modeling.process_patch_lengths(lengths, max_patch_length), logits

    return forward


def has_windows(modeling: Any) -> bool:
    """Return whether this version of transformers applies the windows of a BLT's configuration."""
    return hasattr(modeling, "create_sliding_window_causal_mask")


def dense_mask(modeling: Any, config: Any, window: int | None, embeds: Tensor) -> Any:
    """Return the mask that transformers makes for whole rows."""
    windowed = window is not None and has_windows(modeling)
    make = modeling.create_sliding_window_causal_mask if windowed else modeling.create_causal_mask
    return make(config, embeds, None, None)  # neither padding nor a cache
