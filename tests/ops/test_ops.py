"""The checks that every op must pass (DESIGN, section 5), for every case of `cases`.

An op is judged against its reference: `eager` is that in the dtype of the inputs, `truth` that in fp64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BACKENDS, order, use
from cases import CASES
from op_calls import (
    cast,
    check,
    floats_of,
    has_cpu_kernel,
    make,
    map_tensors,
    raw_calls,
    run,
    strided,
    tensors_of,
    with_grad,
)
from op_case import OpCase
from torch import Tensor
from torch.utils import _pytree as pytree

from blt_kernels.testing import assert_close, assert_equal, poisoned_empty

SIZES = (0, 1, 2, 3, 19, 260)
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
TRACE_CASES = pytest.mark.parametrize("case", [c for c in CASES if c.trace], ids=lambda case: case.name)
GRAD_CASES = pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=lambda case: case.name)
DENSE_CASES = pytest.mark.parametrize(
    "case", [c for c in CASES if c.differentiable and not c.sparse], ids=lambda case: case.name
)
# These tests are of code above the kernels, or of threads of the CPU, of which the emulator has one.
NOT_EMULATED = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "emulated"], indirect=True)


# --- values -----------------------------------------------------------------------------------------------------------


@EVERY_CASE
def test_op_against_reference(case: OpCase, device: str) -> None:
    for dtype in case.dtypes:
        check(case, [make(case, device, num_bytes, seed, dtype) for seed, num_bytes in enumerate(SIZES)])


@EVERY_CASE
@pytest.mark.parametrize("kind", ["permuted", "offset", "expanded"])
def test_strides(case: OpCase, kind: str, device: str) -> None:
    arguments = make(case, device, 150, 5)
    check(case, [arguments, strided(arguments, kind)])


@EVERY_CASE
def test_int32_and_int64_are_the_same(case: OpCase, device: str) -> None:
    arguments = make(case, device, 80, 6)
    outputs = []
    for dtype in (torch.int32, torch.int64):
        # A PatchLayout holds int32 always; only plain tensors come in both.
        chosen = {
            name: x.to(dtype) if isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64) else x
            for name, x in arguments.items()
        }
        outputs.append(run(case, case.function, chosen))
    assert_equal(*outputs)


@EVERY_CASE
def test_every_element_is_written(case: OpCase, device: str) -> None:
    for num_bytes in (0, 1, 90):
        arguments = make(case, device, num_bytes, 7)
        expected = run(case, case.function, arguments)
        with poisoned_empty():
            assert_equal(run(case, case.function, arguments), expected)


@pytest.mark.slow
@NOT_EMULATED
@EVERY_CASE
def test_bitwise_the_same_in_every_run(case: OpCase, device: str) -> None:
    arguments = make(case, device, 700, 8)
    outputs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        outputs.append(run(case, case.function, arguments))
    assert_equal(outputs[1], outputs[0], name="2 threads against 1")
    assert_equal(outputs[2], outputs[1], name="second run")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.emulated], ids=lambda case: case.name)
def test_the_same_in_every_order_of_threads(case: OpCase) -> None:
    """Results do not show in what order threads and blocks run."""
    arguments = make(case, "cpu", 300, 8)
    with use("emulated"):
        expected = run(case, case.function, arguments)
        for name in ("BACKWARD", "RANDOM"):
            with order(name, seed=9):
                assert_equal(run(case, case.function, arguments), expected, name=name)


@EVERY_CASE
def test_arguments_are_not_written(case: OpCase, device: str) -> None:
    arguments = make(case, device, 80, 9)
    before = map_tensors(Tensor.clone, arguments)
    run(case, case.function, arguments)
    assert_equal(arguments, before)


# --- autograd ---------------------------------------------------------------------------------------------------------


def of_leaves(case: OpCase, arguments: dict[str, Any]) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return the first floating output as a function of the differentiable tensors alone, and these."""
    leaves, spec = pytree.tree_flatten({name: arguments[name] for name in case.differentiable})

    def function(*values: Tensor) -> Tensor:
        return floats_of(case.function(**{**arguments, **pytree.tree_unflatten(values, spec)}))[0]

    return function, tuple(leaves)


@DENSE_CASES
def test_gradcheck(case: OpCase, device: str) -> None:
    function, leaves = of_leaves(case, with_grad(case, make(case, device, 12, 10, torch.float64)))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@NOT_EMULATED
@DENSE_CASES
def test_second_derivatives(case: OpCase, device: str) -> None:
    function, leaves = of_leaves(case, with_grad(case, make(case, device, 12, 10, torch.float64)))
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@NOT_EMULATED
@pytest.mark.parametrize("case", [c for c in CASES if c.sparse], ids=lambda case: case.name)
def test_sparse_gradients_have_no_second_derivative(case: OpCase, device: str) -> None:
    function, leaves = of_leaves(case, with_grad(case, make(case, device, 12, 10, torch.float64)))
    grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match='grad: expected "dense"'):
        sum(g.to_dense().square().sum() for g in grads).backward()


@pytest.mark.slow
@NOT_EMULATED
@DENSE_CASES
def test_torch_func(case: OpCase, device: str) -> None:
    """Gradients of `torch.func`, also of each entry of a batch, are those of autograd; forward mode raises."""
    function, leaves = of_leaves(case, make(case, device, 30, 10, torch.float64))

    def loss(*values: Tensor) -> Tensor:
        return function(*values).square().sum()

    def expected(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = tuple(x.detach().requires_grad_() for x in values)
        return torch.autograd.grad(loss(*values), values)

    every = tuple(range(len(leaves)))
    assert_close(torch.func.grad(loss, every)(*leaves), expected(leaves), expected(leaves))
    batch = [tuple(x * factor for x in leaves) for factor in (1, -0.5, 2)]
    stacked = tuple(torch.stack(entries) for entries in zip(*batch, strict=True))
    each = tuple(torch.stack(entries) for entries in zip(*map(expected, batch), strict=True))
    assert_close(torch.vmap(torch.func.grad(loss, every))(*stacked), each, each)
    outputs = torch.stack([function(*values) for values in batch])
    assert_equal(torch.vmap(function)(*stacked), outputs)
    first = torch.vmap(function, in_dims=(0, *[None] * (len(leaves) - 1)))(stacked[0], *leaves[1:])
    assert_equal(first[0], outputs[0])
    assert torch.vmap(function)(*(x[:0] for x in stacked)).shape == outputs[:0].shape

    def penalty(gradients: Callable[..., tuple[Tensor, ...]], *values: Tensor) -> Tensor:
        return sum(g.square().sum() for g in gradients(*values))

    def by_autograd(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*values), values, create_graph=True)

    by_func = torch.func.grad(loss, every)
    asked = tuple(x.detach().requires_grad_() for x in leaves)
    twice = torch.autograd.grad(penalty(by_autograd, *asked), asked)
    nested = torch.func.grad(lambda *values: penalty(by_func, *values), every)(*leaves)
    mixed = torch.autograd.grad(penalty(by_func, *asked), asked)  # autograd differentiates torch.func's result
    assert_close(nested, twice, twice)
    assert_close(mixed, twice, twice)

    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(loss, leaves, leaves)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="expected no tangents"):
        function(torch.autograd.forward_ad.make_dual(leaves[0], leaves[0]), *leaves[1:])
    with pytest.raises(NotImplementedError, match="expected no tangents"):
        torch.func.jvp(lambda *values: sum(g.sum() for g in by_func(*values)), leaves, leaves)


OF_OFFSETS_ALONE = ("static_patch", "byte_patch", "attention_ranges")


@NOT_EMULATED
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if not c.differentiable and c.function.__name__ not in OF_OFFSETS_ALONE],
    ids=lambda case: case.name,
)
def test_vmap(case: OpCase, device: str) -> None:
    """Ops without gradients take batches too; offsets stay shared."""
    batch = [make(case, device, 30, seed) for seed in (1, 2)]
    name = next(name for name in ("tokens", "entropy", "marks", "x") if name in batch[0])
    shared = {key: x for key, x in batch[0].items() if key != name}
    values = [entry[name] for entry in batch]
    expected = [case.function(**{name: x}, **shared) for x in values]
    actual = torch.vmap(lambda x: case.function(**{name: x}, **shared))(torch.stack(values))
    assert_equal(tensors_of(actual), [torch.stack(x) for x in zip(*map(tensors_of, expected), strict=True)])


@GRAD_CASES
def test_only_asked_gradients_are_computed(case: OpCase, device: str) -> None:
    arguments = make(case, device, 60, 11)
    _, grads = run(case, case.function, arguments)
    leaves = {name: len(tensors_of(arguments[name])) for name in case.differentiable}
    position = 0
    for name, count in leaves.items():
        alone = dataclasses.replace(case, differentiable=(name,))
        _, own = run(alone, case.function, arguments)
        assert_equal(own, grads[position : position + count], name=f"gradient of {name} alone")
        position += count


# --- torch.library, torch.compile, autocast --------------------------------------------------------------


@pytest.mark.slow
@TRACE_CASES
@pytest.mark.parametrize("inputs", ["contiguous", "permuted", "empty"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(case: OpCase, inputs: str, installed: str) -> None:
    arguments = make(case, installed, 0 if inputs == "empty" else 40, 12)
    if inputs == "permuted":
        arguments = strided(arguments, "permuted")
    for operator, args in raw_calls(case, arguments):
        # Operators of the forward are called with leaves; those of the backward are not differentiable themselves.
        grad = operator.name().endswith("_fwd")
        args = map_tensors(lambda x: x.detach().requires_grad_(x.requires_grad and grad), args)  # noqa: B023
        torch.library.opcheck(operator, args)


def compiled(case: OpCase, backend: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(case.function, fullgraph=True, dynamic=True, backend=backend)


@pytest.mark.slow
@TRACE_CASES
def test_compile_without_recompiling(case: OpCase, installed: str) -> None:
    function = compiled(case, "aot_eager")
    options: dict[str, Any] = {}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_bytes, seed in ((101, 13), (250, 14), (400, 15)):
            arguments = make(case, installed, num_bytes, seed)
            # Thresholds are constants of a compiled model: the graph is specialised to floats.
            options = options or {name: x for name, x in arguments.items() if isinstance(x, float)}
            arguments.update(options)
            assert_equal(run(case, function, arguments), run(case, case.function, arguments))


@pytest.mark.slow
@TRACE_CASES
def test_inductor(case: OpCase, installed: str) -> None:
    function = compiled(case, "inductor")
    check(case, [make(case, installed, num_bytes, 16) for num_bytes in (101, 250)], function)


@NOT_EMULATED
@EVERY_CASE
def test_autocast(case: OpCase, device: str) -> None:
    if torch.float32 not in case.dtypes:
        pytest.skip("no floating arguments")
    arguments = make(case, device, 50, 17)
    lower = cast(arguments, torch.bfloat16) if case.autocast else arguments
    expected, expected_grads = run(case, case.function, lower)
    with torch.autocast(device, torch.bfloat16):
        actual, grads = run(case, case.function, arguments)
        # A model under autocast meets both: parameters in fp32, activations in bf16.
        mixed = {
            name: cast(x, torch.bfloat16) if i == 0 and case.autocast else x
            for i, (name, x) in enumerate(arguments.items())
        }
        from_mixed, _ = run(case, case.function, mixed)
    assert_equal(actual, expected)
    assert_equal(from_mixed, expected)
    assert all(g.dtype == torch.float32 for g in grads)
    assert_equal([g.to(e.dtype) for g, e in zip(grads, expected_grads, strict=True)], expected_grads)


# --- memory safety ----------------------------------------------------------------------------------------------------


def bad_offsets(good: Tensor) -> dict[str, Tensor]:
    swapped = good.clone()
    swapped[1:-1] = good[1:-1].flip(0)
    return {
        "negative": good - 1,
        "beyond the data": good + torch.arange(good.numel(), dtype=good.dtype, device=good.device),
        "far beyond the data": torch.where(good == good[-1], 2**31 - 1, good).to(good.dtype),
        "falling": swapped,
        "not from 0": torch.cat([good[:1] + 1, good[1:]]),
    }


def bad_indices(good: Tensor) -> dict[str, Tensor]:
    return {"low": torch.full_like(good, -(2**31)), "high": torch.full_like(good, 2**31 - 1), "turned": good.flip(0)}


@EVERY_CASE
def test_bad_indices_reach_no_memory(case: OpCase, backend: str, device: str) -> None:
    """A raw operator may be called with indices that no public function lets through. It must not crash.

    Compiled kernels on the CPU must name bad document offsets, which everything else is bounded by. Those for a GPU do
    not look at values before they run: they stay inside their tensors, as the emulator checks.
    """
    arguments = make(case, device, 60, 20)
    for operator, args in raw_calls(case, arguments):
        for position, good in enumerate(args):
            name = operator._schema.arguments[position].name
            if not isinstance(good, Tensor) or good.is_floating_point():
                continue
            offsets = name.startswith("cu_seqlens")
            for bad in (bad_offsets if offsets else bad_indices)(good).values():
                call = (*args[:position], bad, *args[position + 1 :])
                if offsets and backend == "cpu" and has_cpu_kernel(operator):
                    with pytest.raises(RuntimeError, match=name):
                        operator(*call)
                    continue
                message = ""
                try:
                    operator(*call)
                except (RuntimeError, IndexError, ValueError) as error:
                    message = str(error)
                assert "_kernel<" not in message  # it would be a fault that the emulator found


@pytest.mark.parametrize("case", {case.op: case for case in reversed(CASES)}.values(), ids=lambda case: case.op)
def test_shorter_arguments_reach_no_memory(case: OpCase) -> None:
    """A raw operator may be called with tensors that do not fit one another, in rows or in columns.

    The CPU kernels have the same checks, in csrc/common/args.
    """
    arguments = make(case, "cpu", 60, 20)
    with use("emulated"):
        for operator, args in raw_calls(case, arguments):
            for position, good in enumerate(args):
                if not isinstance(good, Tensor) or not good.dim():
                    continue
                for dim in {0, good.dim() - 1}:
                    message = ""
                    try:
                        operator(
                            *args[:position], good.narrow(dim, 0, good.shape[dim] // 2).clone(), *args[position + 1 :]
                        )
                    except (RuntimeError, IndexError, ValueError) as error:
                        message = str(error)
                    name = f"{operator.name()}, {operator._schema.arguments[position].name}, dimension {dim}"
                    assert "_kernel<" not in message, f"{name}: {message}"
