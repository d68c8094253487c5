"""A copy of a model for inference, whose matrices are stored in bf16 or int8: a step of decoding reads fewer bytes."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from blt_kernels import _checks
from blt_kernels.nn import QuantizedLinear
from blt_kernels.nn.matrices import Linear

Module = TypeVar("Module", bound=nn.Module)

STORED = {"bf16": torch.bfloat16, "int8": torch.int8}
EXACT = ("patcher", "lm_head")  # these give the entropies that patches follow from, and the choice of the byte


def quantized(model: Module, weights: str) -> Module:
    """Return a copy of a model: see `ByteModel.quantized`."""
    _checks.check_choice("weights", weights, tuple(STORED))
    if is_quantized(model):
        raise ValueError("weights: expected a model that is not quantized, got one that is")
    other = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    for module in [module for name, module in other.named_modules() if name.split(".")[0] not in EXACT]:
        for name, layer in module.named_children():
            if type(layer) is Linear and name not in EXACT:
                setattr(module, name, QuantizedLinear(layer, STORED[weights]))
    return other


def is_quantized(model: nn.Module) -> bool:
    """Return whether any matrix is a `QuantizedLinear`."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def weight_error(model: nn.Module) -> float:
    """Return the root mean square of what rounding changed in the matrices, as a share of that of their weights."""
    errors = [module.error for module in model.modules() if isinstance(module, QuantizedLinear)]
    return math.sqrt(sum(error**2 for error in errors) / max(1, len(errors)))
