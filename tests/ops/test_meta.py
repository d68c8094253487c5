"""Tensors without data, on "meta" or in FakeTensorMode: ops and models give what they give on the CPU but values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import CASES
from model_cases import CONFIGS, documents
from op_calls import make, map_tensors, run, tensors_of
from op_case import OpCase
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import blt_kernels as bk

KINDS = ["meta", "fake"]


def without_data(kind: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Return a context, and the function that takes the data from a tensor in it."""
    mode = FakeTensorMode()
    return (nullcontext(), lambda x: x.to("meta")) if kind == "meta" else (mode, mode.from_tensor)


def described(tree: Any) -> list[tuple[torch.Size, tuple[int, ...], torch.dtype]]:
    return [(x.shape, x.stride(), x.dtype) for x in tensors_of(tree)]


IN_16_BITS = [case for case in CASES if torch.bfloat16 in case.dtypes]
NUMBERS = [
    *(pytest.param(case, kind, None, id=f"{case.name}-{kind}") for case in CASES for kind in KINDS),
    *(pytest.param(case, "meta", torch.bfloat16, id=f"{case.name}-bfloat16") for case in IN_16_BITS),
]


@pytest.mark.parametrize(("case", "kind", "dtype"), NUMBERS)
def test_ops_give_shapes(case: OpCase, kind: str, dtype: torch.dtype | None) -> None:
    arguments = make(case, "cpu", 40, 1, dtype)
    context, take = without_data(kind)
    with context:
        empty = map_tensors(take, arguments)
        if case.sparse:  # how many rows a coalesced gradient has depends on the data
            with pytest.raises((RuntimeError, DynamicOutputShapeException), match=r"dynamic|data-dependent|sparse_bwd"):
                run(case, case.function, empty)
            return
        fake = described(run(case, case.function, empty))
    for allocated, written in zip(fake, described(run(case, case.function, arguments)), strict=True):
        assert allocated == written, f"a fake of {case.op} allocates {allocated}, its kernel {written}"


@pytest.mark.parametrize("kind", KINDS)
def test_padded_input_gives_shapes(kind: str) -> None:
    context, take = without_data(kind)
    with context:
        logits, q = take(torch.zeros(2, 7, 9)), take(torch.zeros(2, 7, 2, 8))
        entropy, layout = bk.entropy_patch(logits, threshold=1.0)
        assert (entropy.shape, layout.num_bytes, layout.num_documents) == ((2, 7), 14, 2)
        assert bk.block_causal_attention(q, q, q).shape == q.shape


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_steps_take_tensors_without_data(kind: str) -> None:
    context, take = without_data(kind)
    with context:
        table, sums, rows, values = (
            take(x) for x in (torch.ones(9, 4), torch.ones(9), torch.arange(3), torch.ones(3, 4))
        )
        assert torch.ops.blt_kernels.sgd_step(table, rows, values, 0.1) is None
        assert torch.ops.blt_kernels.rowwise_adagrad_step(table, sums, rows, values, 0.1, 1e-8) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ops", "split"), [("fused", False), ("fused", True), ("reference", True)])
@pytest.mark.parametrize("name", ["byte_lm", "blt", "blt_cross_windows", "blt_space", "megabyte_extended"])
def test_models_give_shapes(name: str, ops: str, split: bool, kind: str) -> None:
    """Built, run, differentiated and asked for patches without any data."""
    cls, config = CONFIGS[name]
    mega = name.startswith("megabyte")
    changes = {"split_documents": True} if split and not mega else {}
    options = {"strided": True} if split and mega else {}
    context, take = without_data(kind)
    with context, torch.device("meta" if kind == "meta" else "cpu"):
        model = cls(dataclasses.replace(config, **changes), ops)
        tokens, rows = (take(x) for x in documents())
        assert model(tokens, rows, **options).shape == (*tokens.shape, 260)
        loss = model.loss(tokens, rows, **options)
        loss.backward()
        if hasattr(model, "patch"):
            patches = model.patch(tokens, rows)
            layout = patches[1] if isinstance(patches, tuple) else patches
            assert (layout.num_bytes, layout.num_documents) == (tokens.shape[0], rows.shape[0] - 1)
    assert loss.shape == ()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == key.startswith("patcher."), key
