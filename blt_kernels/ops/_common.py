"""The ops share the registration of operators, what their fakes allocate, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from blt_kernels import _checks
from blt_kernels._extension import OPERATORS, SCHEMAS
from blt_kernels._namespace import NAMESPACE
from blt_kernels.ops import _autograd
from blt_kernels.reference._ragged import accumulator, ordered_like

_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")


def define(name: str, schema: str, reference: Callable, fake: Callable) -> Callable[..., Any]:
    """Define ``blt_kernels::name`` and return a function that calls it.

    `reference` runs wherever no compiled or Triton kernel is registered. `fake` allocates the outputs as kernels do.
    """
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    checked = _of_dense_tensors(name, reference)
    torch.library.impl(f"{NAMESPACE}::{name}", "default", checked)
    for key in ("NestedTensorCPU", "NestedTensorCUDA"):  # the default does not take nested tensors
        _LIBRARY.impl(name, checked, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    _autograd.register_vmap(name)
    SCHEMAS[name] = schema
    OPERATORS[name] = reference.__module__.rpartition(".")[2]
    return _autograd.caller(name)


def _of_dense_tensors(name: str, reference: Callable) -> Callable:
    """Return the reference as a kernel that refuses sparse, nested and missing tensors: torch calls it for them too."""
    schema = getattr(getattr(torch.ops, NAMESPACE), name).default._schema
    names = [argument.name for argument in schema.arguments]
    required = [argument.name for argument in schema.arguments if str(argument.type) == "Tensor"]

    @wraps(reference)
    def checked(*arguments: Any) -> Any:
        for argument, value in zip(names, arguments, strict=False):
            if value is None and argument in required:
                raise TypeError(f"{argument}: expected a tensor, got None")
            for x in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(x, Tensor):
                    _checks.check_dense(argument, x)
        return reference(*arguments)

    return checked


def autocast_enabled(x: Tensor) -> bool:
    """Is autocast on for the device of `x`? Never on "meta", which torch refuses to ask about."""
    if not _is_any_autocast_enabled():
        return False
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype, which is on, fp64 excepted, as torch does for its matrix products."""
    first, like = next(iter(tensors.items()))
    check_autocast(first, like, **tensors)
    dtype = torch.get_autocast_dtype(like.device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors.values())


def check_autocast(first: str, like: Tensor, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are dense, and fp64 if `like`, which is called `first`, is, and only then."""
    for name, x in tensors.items():
        _checks.check_dense(name, x)
        if (x.dtype == torch.float64) != (like.dtype == torch.float64):
            expected = f"dtype {like.dtype} of {first}, since autocast leaves fp64 as it is"
            raise TypeError(f"{name}: expected {expected}, got {x.dtype}")


def empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Allocate contiguous tensors of these shapes and dtypes."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def empty_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Allocate the gradients of tensors of heads, ``[T, H, E]`` or ``[B, S, H, E]``, as `ordered_like` orders them."""
    return tuple(ordered_like(x, x.new_empty(x.shape)) for x in tensors)


def packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of heads packed, ``[B * S, H, E]``; or padded as they are, if all are, and packing would copy one.

    Operators of attention take padded tensors of any strides.
    """
    if all(x.dim() == 4 for x in tensors) and not all(map(_is_packed, tensors)):
        return tensors
    return tuple(x.flatten(0, 1) if x.dim() == 4 else x for x in tensors)


def _is_packed(x: Tensor) -> bool:
    return x.shape[0] <= 1 or x.shape[1] <= 1 or x.stride(0) == x.shape[1] * x.stride(1)


def empty_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Allocate `out` and `lse` of attention."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=accumulator(q))


def register_attention(operator: str, forward: Callable, backward: Callable) -> None:
    """Register the derivatives of attention.

    Parameters
    ----------
    operator : str
        ``operator_fwd`` takes (q, k, v, *arguments) and returns (out, lse); ``operator_bwd`` takes
        (grad_out, q, k, v, out, lse, *arguments) and returns the gradients of q, k and v.
    forward : the reference of ``operator_fwd``
    backward : calls ``operator_bwd``
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _autograd.save_arguments(ctx, (*inputs[:3], *output, *inputs[3:]))
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def first_backward(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor, ...]:
        return () if grad_out is None else backward(grad_out, *_autograd.saved_arguments(ctx))

    def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _autograd.save_arguments(ctx, (*inputs[:4], *inputs[6:]))

    def second_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        grad_out, q, k, v, *arguments = _autograd.saved_arguments(ctx)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return forward(q, k, v, *arguments)[0]

        # The gradients depend on out and lse through q, k and v alone.
        return _autograd.second_derivative(attention, (q, k, v), grad_out, cotangents)

    _autograd.register_autograd(f"{operator}_fwd", first_backward, setup_context=save)
    _autograd.register_autograd(f"{operator}_bwd", second_backward, setup_context=save_gradients)
