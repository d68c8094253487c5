"""Every op has all of its parts, under one name and with the same arguments everywhere (DESIGN, sections 1 and 5)."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends import emulated, emulator
from cases import CASES
from op_calls import has_cpu_kernel, make, raw_calls

import blt_kernels
from blt_kernels import _extension
from blt_kernels._extension import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(blt_kernels.__file__).parent
OPS = sorted(set(OPERATORS.values()))
# Steps change a table or a cache in place. They have no derivative, and tests of their own.
STEPS = [name for name in OPERATORS if name.endswith("_step")]
WITH_CASES = sorted({op for operator, op in OPERATORS.items() if operator not in STEPS})
EVERY_OP = pytest.mark.parametrize("op", WITH_CASES)
EVERY_OPERATOR = pytest.mark.parametrize("operator", sorted(OPERATORS))
COMPILED = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} & set(OPS)


def overload(operator: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.blt_kernels, operator).default


def schema_arguments(operator: str) -> list[str]:
    return [a.name for a in overload(operator)._schema.arguments]


def reference_of(op: str) -> ModuleType:
    return importlib.import_module(f"blt_kernels.reference.{op}")


def has(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"blt_kernels::{operator}", key)


def test_a_file_of_ops_is_one_op() -> None:
    assert [path.stem for path in sorted((PACKAGE / "ops").glob("[!_]*.py"))] == OPS


@EVERY_OP
def test_an_op_has_its_files(op: str) -> None:
    files = [f"blt_kernels/reference/{op}.py", f"tests/ops/test_{op}.py", f"docs/ops/{op}.md"]
    if op in COMPILED:
        files.append(f"bench/bench_{op}.py")
    missing = [f for f in files if not (ROOT / f).exists()]
    assert missing == [], f"{op} has no {', '.join(missing)}"
    assert [c.name for c in CASES if c.op == op], "not listed in tests/cases"


@EVERY_OP
def test_an_op_is_public_and_documented(op: str) -> None:
    function = getattr(blt_kernels, op)
    assert op in blt_kernels.__all__
    assert function is getattr(importlib.import_module(f"blt_kernels.ops.{op}"), op)
    for section in ("Parameters", "Returns", "Raises"):
        assert f"\n{section}\n---" in inspect.getdoc(function), f"the docstring of {op} has no section {section}"


@pytest.mark.parametrize("name", [n for n in blt_kernels.__all__ if inspect.isfunction(getattr(blt_kernels, n))])
def test_a_public_function_takes_what_its_reference_takes(name: str) -> None:
    function = getattr(blt_kernels, name)
    assert all(p.annotation is not p.empty for p in inspect.signature(function).parameters.values())
    if name in ("to_bytes", "to_ids", "attention_backend", "set_attention_backend"):  # they are no ops
        return
    reference = getattr(reference_of(function.__module__.split(".")[-1]), f"{name}_reference", None)
    if name == "byte_patch":  # it is static_patch with a size of 1
        assert reference is None
        return
    assert reference is not None
    assert set(inspect.signature(function).parameters) == set(inspect.signature(reference).parameters)
    listed = {c.function.__name__ for c in CASES}
    assert name in listed or f"{name}_step" in STEPS, "not listed in tests/cases"


@EVERY_OPERATOR
def test_an_operator_takes_the_arguments_of_its_reference_in_order(operator: str) -> None:
    module = reference_of(OPERATORS[operator])
    names = (f"{operator}_reference", f"{re.sub('_(fwd|step)$', '', operator)}_reference")
    reference = next(getattr(module, n) for n in names if hasattr(module, n))
    taken = list(inspect.signature(reference).parameters)
    schema = schema_arguments(operator)
    assert schema == taken, f"{operator} takes {', '.join(schema)}; {reference.__name__} takes {', '.join(taken)}"


@EVERY_OPERATOR
def test_an_operator_has_a_reference_a_fake_and_a_backward(operator: str) -> None:
    assert has(operator, "CompositeExplicitAutograd"), "no reference"
    assert has(operator, "Meta"), "no fake"
    assert operator.endswith(("_fwd", "_bwd", "_step"))
    if operator in STEPS:
        assert not has(operator, "Autograd")
    elif operator.endswith("_bwd"):
        assert operator.replace("_sparse_bwd", "_bwd").replace("_bwd", "_fwd") in OPERATORS
        assert has(operator, "Autograd"), "its second derivative would be 0"
    else:
        differentiates = f"{operator.removesuffix('_fwd')}_bwd" in OPERATORS or operator == "entropy_patch_fwd"
        missing = f"{operator} has a backward: register_autograd" if differentiates else f"{operator} has no backward"
        assert has(operator, "Autograd") == differentiates, missing


@EVERY_OPERATOR
def test_a_compiled_op_is_compiled_whole(operator: str) -> None:
    """One owner for an op on a device: all of its operators have a kernel on the CPU, or none has."""
    op = OPERATORS[operator]
    if _extension.load_cpu().isa is None:
        pytest.skip("no compiled module")
    expected = "a kernel" if op in COMPILED else "no kernel"
    assert has_cpu_kernel(overload(operator)) == (op in COMPILED), (
        f"{operator}: expected {expected} in csrc/cpu/{op}.cpp"
    )
    if op not in COMPILED:
        return
    source = (ROOT / "csrc" / "cpu" / f"{op}.cpp").read_text()
    entry = re.search(rf"\b{operator}_cpu\(([^)]*)\)\s*{{", source)
    assert entry, f"csrc/cpu/{op}.cpp defines no {operator}_cpu"
    assert [a.split()[-1].lstrip("&*") for a in entry[1].split(",")] == schema_arguments(operator)


def test_compiled_kernels_have_signatures_of_their_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that was built for another schema would read arguments of other types: importing it raises."""
    path = _extension.load_cpu().path
    if path is None:
        pytest.skip("no compiled module")
    signatures = sys.modules["blt_kernels._C"].signatures.splitlines()
    assert {line.split(":")[0] for line in signatures} == {f"&{n}_cpu" for n in OPERATORS if OPERATORS[n] in COMPILED}
    line = "&few_row_linear_fwd_cpu: Tensor Tensor Tensor? Tensor? float Tensor? float -> Tensor"
    assert line in signatures
    schema = "(Tensor x, Tensor? cu_seqlens, SymInt num_documents) -> Tensor y"
    monkeypatch.setitem(_extension.SCHEMAS, "ema_scan_fwd", schema)
    with pytest.raises(
        _extension.StaleModuleError, match=r"other operators .*: ema_scan_fwd is \(Tensor Tensor Tensor\?"
    ):
        _extension.load_cpu.__wrapped__()
    monkeypatch.delitem(_extension.SCHEMAS, "ema_scan_fwd")
    with pytest.raises(_extension.StaleModuleError, match="and no file of ops that is imported defines it here; `make"):
        _extension.load_cpu.__wrapped__()


CUDA_SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))}
CUDA = set(CUDA_SOURCES) & set(OPS)
CPU_ONLY = {"few_row_linear", "few_row_layer"}  # public functions call torch on CUDA


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_owner_on_cuda(op: str) -> None:
    assert _extension.is_triton(op) + (op in CUDA) + (op in CPU_ONLY) == 1


@EVERY_OPERATOR
def test_an_op_has_all_of_its_cuda_kernels(operator: str) -> None:
    """Launchers are registered under CUDA in ``_C_cuda`` and ``_C_jit``, and for the emulator, from one source."""
    op = OPERATORS[operator]
    expected = "a kernel" if op in CUDA else "no kernel"
    assert (operator in emulated()) == (op in CUDA), f"{operator}: expected {expected} in csrc/cuda/{op}.cu"
    if op not in CUDA:
        return
    names = (operator.rsplit("_", 1)[0], op)  # a part of a large op may have a file of its own
    source = next(CUDA_SOURCES[name] for name in names if name in CUDA_SOURCES)
    entry = re.search(rf"\b{operator}_cuda\(([^)]*)\)\s*{{", source)
    assert entry, f"no {operator}_cuda"
    assert [a.split()[-1].lstrip("&*") for a in entry[1].split(",")] == schema_arguments(operator)


def test_kernels_are_named_after_their_op() -> None:
    """Those that launch under the name of an operator; steps that several share have names of their own."""
    names = {kernel.split("<")[0].removeprefix("blt::") for kernel in emulator().kernels() if "anonymous" not in kernel}
    assert all(name.endswith("_kernel") for name in names)
    by_layout = {"entropy_patch_fwd", *(n for n in OPERATORS if n.endswith(("_patch_fwd", "_starts_fwd")))}
    by_token_entropy = {"linear_entropy_fwd", "linear_entropy_bwd"}
    owned = [n for n in OPERATORS if n in emulated() and n not in by_layout | by_token_entropy]
    assert [n for n in owned if not any(name.startswith(n.rsplit("_", 1)[0]) for name in names)] == []


def test_cases_reach_every_operator() -> None:
    reached, differentiable = set(), set()
    for case in CASES:
        for operator, _ in raw_calls(case, make(case, "cpu", 20, 0)):
            name = operator.name().removeprefix("blt_kernels::")
            reached.add(name)
            if case.differentiable and name.endswith("_fwd"):
                differentiable.add(name)
    assert sorted(reached) == sorted(set(OPERATORS) - set(STEPS)), "steps are in test_optim.py"
    assert {n for n in OPERATORS if n.endswith("_fwd") and has(n, "Autograd")} == differentiable
