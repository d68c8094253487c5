"""Patch pooling of transformers' BLT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from blt_kernels.integrations._applied import Applied
from blt_kernels.layout import PatchLayout
from blt_kernels.ops.patch_pool import patch_pool


def patch_reduce(applied: Applied, stock: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return ``BltLocalEncoder.patch_reduce``, which pools by our op where it is given a layout as `patch_ids`."""

    def patch_reduce(self: Any, hidden_states: Tensor, max_num_patches: int, patch_ids: Any) -> Tensor:
        if not isinstance(patch_ids, PatchLayout):
            return stock(self, hidden_states, max_num_patches, patch_ids)
        applied.count("BltLocalEncoder.patch_reduce")
        pooled = patch_pool(hidden_states, patch_ids, "max")
        return pooled.view(hidden_states.shape[0], max_num_patches, hidden_states.shape[-1])

    return patch_reduce
