"""Registers the derivatives of operators: reverse mode once or twice, `torch.func`, an error for forward mode.

`torch.library.register_autograd` gives an operator one derivative in reverse mode. The operator then raises under
`torch.func` and drops the tangents of forward mode without a word; and a backward operator that has no formula of its
own returns a gradient that counts as constant, so that second derivatives are 0. Here every operator that takes part in
a derivative has an Autograd kernel that either differentiates or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _dispatch_tls_is_dispatch_key_excluded,
    _dispatch_tls_set_dispatch_key_excluded,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from blt_kernels._namespace import NAMESPACE

Backward = Callable[..., Any]
SetupContext = Callable[[Any, tuple[Any, ...], Any], None]

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # stands for every device
_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")
_DIFFERENTIABLE: dict[str, Callable[[Any, tuple[Any, ...]], Any]] = {}
"""For each operator with a derivative: runs it on a dispatch key set and arguments of which one requires a gradient."""


def register_autograd(operator: str, backward: Backward, *, setup_context: SetupContext) -> None:
    """Register the derivative of ``blt_kernels::operator``.

    Parameters
    ----------
    operator : str
    backward : (ctx, *gradients of the outputs) -> gradients of the arguments
        As for `torch.library.register_autograd`: one entry for each argument, a list for a list of tensors; of the last
        arguments, those without a gradient are left out. It calls operators that have derivatives, or PyTorch's own
        functions, so that it is differentiable itself.
    setup_context : (ctx, inputs, output) -> None
        Saves what `backward` needs.
    """
    overload = _overload(operator)
    bound = overload._op
    several = len(overload._schema.returns) > 1
    takes_lists = any(_tensors_of(x) == _LIST for x in overload._schema.arguments)
    returns_lists = any(_tensors_of(x) == _LIST for x in overload._schema.returns)

    class Function(torch.autograd.Function):
        # An Autograd kernel runs once for each level of torch.func, with the tensors of that level.
        @classmethod
        def apply(cls, *arguments: Any) -> Any:
            if not _are_functorch_transforms_active():
                return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]

        @staticmethod
        def forward(ctx: Any, call: _Call, *flat: Any) -> tuple[Tensor, ...]:
            ctx.lengths, arguments = call.lengths, _unflatten(flat, call.lengths)
            if call.keyset is None:
                with _AutoDispatchBelowAutograd():
                    output = bound(*arguments)
                    setup_context(ctx, arguments, output)
            else:
                # Both modes are off here, but levels of torch.func below this one differentiate too.
                nested = _are_functorch_transforms_active()
                with (
                    torch.set_grad_enabled(nested),
                    forward_ad._set_fwd_grad_enabled(nested),
                    _AutoDispatchBelowAutograd(),
                ):
                    output = overload.redispatch(call.keyset, *arguments)
                    setup_context(ctx, arguments, output)
            outputs = _as_tuple(output)
            call.output_lengths = _lengths(outputs) if returns_lists else None
            return tuple(_flatten(outputs, call.output_lengths))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            of_arguments = _as_tuple(backward(_Context(ctx), *grads))
            missing = len(overload._schema.arguments) - len(of_arguments)
            return None, *_flatten((*of_arguments, *[None] * missing), ctx.lengths)

    Function.__name__ = Function.__qualname__ = operator

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, _flatten(arguments, _lengths(arguments)))):
            raise NotImplementedError(
                f"{operator}: expected no tangents, since blt_kernels has no forward-mode derivatives: use reverse mode"
                " (torch.func.grad, vjp, jacrev), or the reference in blt_kernels.reference"
            )
        keyset &= torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and _any_requires_grad(*arguments):
            return differentiable(keyset, arguments)
        with _AutoDispatchBelowAutograd():
            return overload.redispatch(keyset, *arguments)

    def differentiable(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        call = _Call(keyset, _lengths(arguments) if takes_lists else None)
        outputs = _unflatten(Function.apply(call, *_flatten(arguments, call.lengths)), call.output_lengths)
        return outputs if several else outputs[0]

    _DIFFERENTIABLE[operator] = differentiable
    _LIBRARY.impl(operator, kernel, "Autograd", with_keyset=True)


def caller(operator: str) -> Callable[..., Any]:
    """Return a function that calls ``blt_kernels::operator`` without its Autograd kernel, to which torch takes 3 us.

    The function takes what the overload takes, without keywords.
    """
    overload = _overload(operator)
    bound = overload._op  # what the overload calls: a frame of Python less
    # Tensors that may require a gradient come before other arguments: torch takes 0.1 us to look at one.
    tensors = [_tensors_of(x) is not None for x in overload._schema.arguments]
    leading = tensors.index(False) if False in tensors else len(tensors)

    def call(*arguments: Any) -> Any:
        if is_compiling() or forward_ad._current_level >= 0 or _are_functorch_transforms_active():
            return overload(*arguments)
        if torch.is_grad_enabled() and _any_requires_grad(*arguments[:leading]):
            differentiable = _DIFFERENTIABLE.get(operator)
            return overload(*arguments) if differentiable is None else differentiable(None, arguments)
        if _dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):  # as inference mode does
            return bound(*arguments)
        _dispatch_tls_set_dispatch_key_excluded(_AUTOGRAD, True)  # takes 0.3 us less than _AutoDispatchBelowAutograd
        try:
            return bound(*arguments)
        finally:
            _dispatch_tls_set_dispatch_key_excluded(_AUTOGRAD, False)

    return call


def register_vmap(operator: str) -> None:
    """Let `torch.vmap` call ``blt_kernels::operator`` once for each entry of the batch, and stack the results."""
    overload = _overload(operator)

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        flat, spec = pytree.tree_flatten(arguments)
        dims = pytree.tree_leaves(in_dims, is_leaf=lambda x: x is None)
        outputs = []
        for i in range(max(info.batch_size, 1)):  # without entries, one of zeros gives the shapes
            entry = [
                x if dim is None else x.select(dim, i) if info.batch_size else x.sum(dim, dtype=x.dtype)
                for x, dim in zip(flat, dims, strict=True)
            ]
            outputs.append(overload(*pytree.tree_unflatten(entry, spec)))
        stacked = pytree.tree_map(lambda *entries: torch.stack(entries)[: info.batch_size], *outputs)
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    torch.library.register_vmap(f"{NAMESPACE}::{operator}", rule)


def _overload(operator: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), operator).default


def second_derivative(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor, cotangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Differentiate the gradients of `function`, which is composed of PyTorch's own functions.

    Parameters
    ----------
    function : called with `inputs`, returns a tensor
    inputs : the arguments that the gradients are of
    grad_out : the gradient of the output that they were computed from
    cotangents : a tensor for each of `inputs`

    Returns
    -------
    tuple
        The derivative in `grad_out`, then in each of `inputs`.
    """

    def gradients(grad_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(function, *inputs)[1](grad_out)

    return torch.func.vjp(gradients, grad_out, *inputs)[1](cotangents)


def save_arguments(ctx: Any, arguments: Sequence[Any]) -> None:
    """Save tensors and other arguments, none of them a list of tensors, for `saved_arguments`."""
    ctx.are_tensors = [isinstance(x, Tensor) for x in arguments]
    ctx.others = [x for x, is_tensor in zip(arguments, ctx.are_tensors, strict=True) if not is_tensor]
    ctx.save_for_backward(*compress(arguments, ctx.are_tensors))


def saved_arguments(ctx: Any) -> list[Any]:
    """Return what `save_arguments` saved, in its order."""
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    return [next(tensors) if is_tensor else next(others) for is_tensor in ctx.are_tensors]


@dataclass
class _Call:
    """One call of an operator. An autograd.Function takes and returns no lists: the lengths are those of its lists.

    Attributes
    ----------
    keyset : dispatch keys below Autograd; None if Autograd was not dispatched to
    lengths : for each argument, the length of a list, or None; None if the operator takes no list of tensors
    output_lengths : the same of the outputs, known after the call
    """

    keyset: Any
    lengths: list[int | None] | None
    output_lengths: list[int | None] | None = None


class _Context:
    """The context of a backward, whose `needs_input_grad` has a list for each argument that is a list."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx  # several threads may run backward with it: it is not written to
        self.needs_input_grad = _unflatten(ctx.needs_input_grad[1:], ctx.lengths)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


_LIST = "List[Tensor]"


def _tensors_of(argument: Any) -> str | None:
    """Return the type of an argument or a result of a schema if it is of tensors."""
    kind = str(argument.type)
    return kind if kind in ("Tensor", "Optional[Tensor]", _LIST) else None


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _lengths(values: Iterable[Any]) -> list[int | None]:
    return [len(x) if isinstance(x, (list, tuple)) else None for x in values]


def _has_tangent(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None


def _flatten(values: Sequence[Any], lengths: Sequence[int | None] | None) -> Sequence[Any]:
    """Return the entries of `values`, those of lists one by one; None stands for a whole list of None."""
    if lengths is None:
        return values
    flat: list[Any] = []
    for value, length in zip(values, lengths, strict=True):
        if length is None:
            flat.append(value)
        else:
            flat.extend([None] * length if value is None else value)
    return flat


def _unflatten(flat: tuple[Any, ...], lengths: Sequence[int | None] | None) -> tuple[Any, ...]:
    if lengths is None:
        return flat
    values, rest = [], iter(flat)
    for length in lengths:
        values.append(next(rest) if length is None else [next(rest) for _ in range(length)])
    return tuple(values)
