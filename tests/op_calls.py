"""Call an op on a case of `cases`: forward, backward, operators behind it, and the comparison with its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from op_case import OpCase
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from blt_kernels.testing import assert_close, assert_equal


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Cast the floating tensors of `tree`."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def tensors_of(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def floats_of(tree: Any) -> list[Tensor]:
    return [x for x in tensors_of(tree) if x.is_floating_point()]


def with_grad(case: OpCase, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return detached arguments; differentiable ones are leaves that ask for gradients and keep their strides."""
    return {
        name: map_tensors(lambda x: x.detach().requires_grad_(), value) if name in case.differentiable else value
        for name, value in arguments.items()
    }


def cotangents_of(case: OpCase, out: Any) -> list[Tensor]:
    """Return a cotangent for each gradient: powers of two of both signs, the same in every run, exact in any dtype."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            2.0 ** torch.randint(-2, 3, x.shape, generator=generator)
            * (1 - 2 * torch.randint(2, x.shape, generator=generator))
        ).to(x.device, x.dtype)
        for x in floats_of(out)
        if case.differentiable and x.requires_grad
    ]


def forward(case: OpCase, function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Return outputs of `function`, and the leaves that have gradients."""
    arguments = with_grad(case, arguments)
    return function(**arguments), tensors_of({name: arguments[name] for name in case.differentiable})


def backward(case: OpCase, out: Any, leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """Return detached outputs, and the gradients of the leaves."""
    if not case.differentiable:
        return out, []
    results = [x for x in floats_of(out) if x.requires_grad]
    return map_tensors(Tensor.detach, out), list(torch.autograd.grad(results, leaves, cotangents))


def run(case: OpCase, function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Return the outputs of `function`, and gradients of its differentiable arguments for fixed cotangents."""
    out, leaves = forward(case, function, arguments)
    out, grads = backward(case, out, leaves, cotangents_of(case, out))
    return out, [g.to_dense() if g.is_sparse else g for g in grads]


def check(case: OpCase, batch: list[dict[str, Any]], function: Callable[..., Any] | None = None) -> None:
    """Outputs and gradients of `function`, the op by default, are as accurate as the reference's, integers equal.

    The errors of the `batch` are judged together: those of a few numbers are luck.
    """
    columns: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for arguments in batch:
        results = [
            run(case, function or case.function, arguments),
            plain(case, arguments),
            run(case, case.reference, cast(arguments, torch.float64)),
        ]
        for what, group in (("output", [tensors_of(out) for out, _ in results]), ("gradient", [g for _, g in results])):
            for i, triple in enumerate(zip(*group, strict=True)):
                columns.setdefault(f"{what} {i}", []).append(triple)
    for name, triples in columns.items():
        actual, eager, truth = zip(*triples, strict=True)
        if actual[0].is_floating_point():
            assert_close(actual, eager, truth, name=name)
        else:
            assert_equal(actual, truth, name=name)


def plain(case: OpCase, arguments: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Return the results of the reference in the dtype of the arguments.

    In fp64 that is the truth itself, whose error nobody knows. It is taken to be that of fp32 scaled down, four times
    over, because op and truth both err and one sample says little about the tails. fp64 is there for gradcheck.
    """
    if not any(x.dtype == torch.float64 for x in floats_of(arguments)):
        return run(case, case.reference, arguments)
    scale = 4 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    rounded = cast(arguments, torch.float32)
    truth, rough, exact = (run(case, case.reference, x) for x in (arguments, rounded, cast(rounded, torch.float64)))
    return pytree.tree_map(
        lambda t, r, e: t + (r.double() - e) * scale if t.is_floating_point() else t, truth, rough, exact
    )


def strided(tree: Any, kind: str) -> Any:
    """Return the same values with other strides; `expanded` repeats the first row of every floating tensor."""

    def change(x: Tensor) -> Tensor:
        if kind == "offset":
            room = x.new_zeros(x.numel() + 3)
            room[3:] = x.flatten()
            return room[3:].view(x.shape)
        if kind == "permuted":
            if x.dim() >= 2:
                return x.transpose(0, -1).contiguous().transpose(0, -1)
            return torch.stack([x, x], -1)[..., 0]
        repeat = x.is_floating_point() and x.dim() >= 1 and x.shape[0] > 0
        return x[:1].expand(x.shape) if repeat else x

    return map_tensors(change, tree)


class Recorder(TorchDispatchMode):
    """Notes every call of an operator of this library, backward ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "blt_kernels":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tensors_of(out))])
        return out


def heads_outside(x: Tensor) -> Tensor:
    """Return ``[B, S, H, E]`` with the memory of ``[B, H, S, E]``, as other code bases hold heads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def first_of_a_cache(x: Tensor) -> Tensor:
    """Return ``[B, S, H, E]`` as the first S of the longer sequence that a cache has room for, before NaN."""
    batch, length, heads, width = x.shape
    cache = x.new_full((batch, heads, length + 3, width), float("nan"))
    cache[:, :, :length] = x.transpose(1, 2)
    return cache[:, :, :length].transpose(1, 2)


def bytes_without_copies(call: Callable[[], Any]) -> int:
    """Return the bytes that a call allocates, and assert that it runs no operator that copies."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        results = call()
    names = {event.name for event in records.events()}
    copies = {name for name in names if any(word in name for word in ("copy", "clone", "contiguous"))}
    assert not copies, names
    del results
    return sum(max(event.cpu_memory_usage, 0) for event in records.events())


def raw_calls(case: OpCase, arguments: dict[str, Any]) -> list[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    """Yield the operators that the op calls, forward and backward, with their arguments."""
    with Recorder() as recorder:
        run(case, case.function, arguments)
    assert recorder.calls, "the op calls no operator of this library"
    return recorder.calls


def has_cpu_kernel(operator: torch._ops.OpOverload) -> bool:
    """Return whether there is a compiled kernel, as opposed to the reference."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU")


def make(case: OpCase, device: str, num_bytes: int, seed: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return arguments on `device`, in fp32 unless the case has no floating arguments."""
    if dtype is None:
        dtype = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
    return map_tensors(lambda x: x.to(device), case.make(dtype, num_bytes, seed))
