"""`MegaByteSteps` decodes with a `MegaByte` in fixed shapes, one id a row at a time.

The id that fills a patch closes it: the global model reads the patch before the local model reads the id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blt_kernels.models.captured import Step, Steps, shifted
from blt_kernels.models.cross_patch import CrossPatch
from blt_kernels.models.megabyte_state import MegaByteState, read_patches, read_slots
from blt_kernels.nn import embed_ids, rotary_table
from blt_kernels.nn.fixed_cache import FixedKeys, last_entries, right_aligned


class MegaByteSteps(Steps):
    """Decodes with a `MegaByte`."""

    writing = ("local",)

    def _prepare(self, state: MegaByteState) -> None:
        config, rows = self.model.config, state.rows
        size = config.patch_size
        self.row = torch.arange(rows, device=self.device)
        # Convolutions reach back over the ids before a patch.
        self.width = size + sum(n - 1 for n in config.conv_sizes)
        self.tail = last_entries(state.ids, self.width)[0].long()
        self.global_keys, self.local_keys = FixedKeys(state.global_keys), FixedKeys(state.local_keys)
        self.first_patch = torch.zeros_like(self.position)
        self.parts = state.parts.read([n - size for n in state.parts.end], state.parts.end)[0].clone()
        self._close_step = Step(self._close_patches, self.device)

    def _reserve(self, total: int) -> bool:
        return self.local_keys.reserve(total + 1)  # a row of n ids has n + 1 slots

    def _read(self) -> None:
        self.tail.copy_(shifted(self.tail, self.ids))
        super()._read()
        self.closes.copy_(self.position % self.model.config.patch_size == 0)

    def _close(self, closing: Sequence[bool]) -> None:
        if self.global_keys.reserve(max(self.lengths) // self.model.config.patch_size + 1):
            self._close_step = Step(self._close_patches, self.device)
        self._close_step()

    def _close_patches(self) -> None:
        """Give the slots of the next patch what the global model makes of the patches that are full."""
        model, size, rows = self.model, self.model.config.patch_size, self.row.shape[0]
        closing, patch = self.closes & self.alive, self.position // size
        x = embed_ids(model.global_embed_tokens, self.tail.flatten(), None)
        positions = (self.position[:, None] + torch.arange(-self.width, 0, device=self.device)).flatten()
        for convolution in model.patch_convolutions:
            x = convolution(x, positions)
        x = x.unflatten(0, (rows, -1))[:, -size:].flatten(1)
        keys = self.global_keys.extend(model.ops, patch, self.first_patch, closing)
        parts = read_patches(model, x, patch, keys)
        self.parts.copy_(torch.where(closing[:, None].expand(-1, size).reshape(-1, 1), parts, self.parts))

    def _write(self) -> Tensor:
        model, slot, size = self.model, self.position, self.model.config.patch_size
        place = slot % size
        parts = self.parts.index_select(0, self.row * size + place)
        keys: list[Any] = self.local_keys.extend(model.ops, slot, slot - place)
        if model.config.cross_patch:
            keys = self._cross_patch(keys, slot, place, parts.dtype)
        return model.lm_head(model.norm(read_slots(model, self.ids, place, parts, keys)))

    def _cross_patch(self, keys: list[Any], slot: Tensor, place: Tensor, dtype: torch.dtype) -> list[CrossPatch]:
        """Return for every layer the keys of the patch of each slot, and the last ones of the patch before."""
        model, reach = self.model, self.model.config.cross_patch
        width = model.config.patch_size + reach
        back = torch.arange(1 - width, 1, device=self.device)
        counts = torch.minimum(place + reach, slot) + 1
        slots = (slot[:, None] + back) % self.local_keys.period + self.local_keys.base[:, None]
        table = rotary_table((place[:, None] + back).flatten(), model.local_config, dtype)
        of_queries, of_keys = (model.ops.offsets(x) for x in (self.local_keys.queries, right_aligned(counts, width)))
        return [CrossPatch(of_queries, of_keys, slots.flatten(), table, own) for own in keys]
