"""`unreadable` says whether an op may read the tables of a model instead of calling their modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def unreadable(byte_table: Any, tables: Sequence[Any]) -> str | None:
    """Return why the op may not read the weights of the byte table and the hash tables, or None if it may."""
    modules = [("byte table", byte_table), *(("hash tables", table) for table in tables)]
    for name, module in modules:
        if type(module) is not nn.Embedding:
            return f"the {name} are {type(module).__name__}, no plain Embedding"
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"the {name} have hooks or a forward of their own"
        if module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return f"the {name} have options of nn.Embedding"
        weight = module.weight
        if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
            return f"the weight of the {name} is a {type(weight).__name__} on {weight.device}"
    if _has_any_global_hook():
        return "there are global hooks of modules"
    dtype, device = byte_table.weight.dtype, byte_table.weight.device
    if any((module.weight.dtype, module.weight.device) != (dtype, device) for _, module in modules):
        return "the tables differ in dtype or device"
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return f"the tables are {dtype}"
    return None
