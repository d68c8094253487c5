"""Activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import xformers.ops  # noqa: F401
from torch.utils.checkpoint import CheckpointPolicy

default_no_recompute_ops = {
    torch.ops.aten.mm.default,
    torch.ops.xformers_flash.flash_fwd.default,
    torch.ops.xformers.efficient_attention_forward_cutlass.default,
}


def get_default_policy(no_recompute_ops: set[Any] | None = None) -> Callable[..., CheckpointPolicy]:
    kept = no_recompute_ops or default_no_recompute_ops

    def policy(_ctx: Any, func: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if func in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
