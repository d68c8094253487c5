"""The optimizer of a training run, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch

from blt_kernels.models.base import ByteModel
from blt_kernels.train.config import TrainConfig

_GLOBAL_LAYERS = ("global_transformer.layers.", "global_layers.")


def make_optimizer(model: ByteModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW. Matrices decay; norms and tables do not.

    A group has a `scale` of the learning rate, and parameters that are all sharded or all whole.
    """
    decays = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
    rate = config.learning_rate if config.global_learning_rate is None else config.global_learning_rate
    ratio = rate / config.learning_rate
    groups: dict[tuple[Any, ...], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = ratio if name.startswith(_GLOBAL_LAYERS) else 1.0
            key = (config.weight_decay if parameter in decays else 0.0, scale, type(parameter.data))
            groups.setdefault(key, []).append(parameter)
    options = [{"params": params, "weight_decay": key[0], "scale": key[1]} for key, params in groups.items()]
    return torch.optim.AdamW(options, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of a linear warm-up, then of a cosine that ends at `final_learning_rate` at the last step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    part = (step - config.warmup) / max(config.steps - 1 - config.warmup, 1)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * part)) / 2
