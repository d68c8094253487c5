"""Reports what a capture of a CUDA graph forbids, on tensors of "meta", which stand in for those of a GPU.

Whatever would read values on the host, or copy pageable memory to the device, is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from op_calls import tensors_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "meta"


class Watch(TorchDispatchMode):
    """Report, in `forbidden`, calls that a capture on `DEVICE` does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs))
        on_device = [x for x in given if x.device.type == DEVICE]
        if on_device and waits(func, args):
            self.forbidden.append(f"{func} reads values of the device")
        if on_device and torch.device(kwargs.get("device") or DEVICE).type == "cpu":
            self.forbidden.append(f"{func} copies to the host")
        result = func(*args, **kwargs)
        made = [x for x in tensors_of(result) if x.device.type == DEVICE]
        from_host = [x for x in given if x.device.type == "cpu"]
        if torch.Tag.pointwise in func.tags:  # its kernel takes a number of the host as an argument
            from_host = [x for x in from_host if x.dim()]
        if from_host and (on_device or made):
            self.forbidden.append(f"{func} copies from the host")
        return result


class WatchConstructors(TorchFunctionMode):
    """Report tensors made of numbers or arrays of the host, which no dispatcher is told about on "meta"."""

    def __init__(self, forbidden: list[str]) -> None:
        super().__init__()
        self.forbidden = forbidden

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor) and result.device.type == DEVICE:
            self.forbidden.append(f"{func.__name__} copies from the host")
        if func is Tensor.__getitem__ and args[0].device.type == DEVICE and any(isinstance(i, list) for i in args[1:]):
            self.forbidden.append("a list of indices is copied from the host")
        return result


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether the size or the value of what `func` returns depends on values of its arguments."""
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
        return any(x.dtype in (torch.bool, torch.uint8) for x in tensors_of(args[1]))
    return bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags))


def forbidden(function: Callable[[], Any]) -> list[str]:
    """Return what `function` does that a capture would not allow."""
    with Watch() as watch, WatchConstructors(watch.forbidden):
        try:
            function()
        except (NotImplementedError, RuntimeError):
            if not watch.forbidden:
                raise
    return watch.forbidden
