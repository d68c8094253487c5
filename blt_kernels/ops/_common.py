"""The ops share the registration of an operator, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blt_kernels._extension import OPERATORS
from blt_kernels.ops import _autograd


def define(name: str, schema: str, reference: Callable) -> Callable[..., Any]:
    """Define ``blt_kernels::name`` and return a function that calls it.

    `reference` runs wherever no compiled or Triton kernel is registered.
    """
    torch.library.define(f"blt_kernels::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"blt_kernels::{name}", "default", reference)
    _autograd.register_vmap(name)
    OPERATORS[name] = reference.__module__.rpartition(".")[2]
    return _autograd.caller(name)


def autocast_enabled(x: Tensor) -> bool:
    """Is autocast on for the device of `x`? Never on "meta", which torch refuses to ask about."""
    device = "cpu" if x.is_cpu else x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, fp64 excepted, as torch does for its matrix products."""
    if not autocast_enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
