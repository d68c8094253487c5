"""Compare every op with fp64 in many ways, forward and backward, to see whether it is right on this GPU at all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from cases import CASES
from cuda_graphs import replaced, warm_up
from op_calls import backward, check, cotangents_of, forward, make, map_tensors, run, tensors_of
from op_case import OpCase
from timing import OURS, Row, failed_row
from torch import Tensor

import blt_kernels as bk
from blt_kernels.models.captured import capture
from blt_kernels.testing import assert_equal, poisoned_empty
from gpu_stages import Case
from gpu_stages.target import Target

SIZES = (0, 1, 19, 260, 5000)
LARGE = 700  # so many bytes take several blocks
TINY = (0, 40)


def smoke_cases(target: Target) -> list[Case]:
    """Return the first case of every function, then the second ones: in fp32 and bf16, or with ids.

    A rehearsal has one case an op.

    Attention comes last, since Triton compiles its kernels meanwhile.
    """
    by_function: dict[Any, list[OpCase]] = {}
    for case in CASES:
        by_function.setdefault(case.function, []).append(case)
    ordered = sorted(
        ((place, case) for cases in by_function.values() for place, case in enumerate(cases)),
        key=lambda x: (x[1].op == "block_causal_attention", x[0]),
    )
    if target.rehearsal:
        decoding = next((0, case) for case in CASES if case.label == "decoding")
        ordered = [*{case.op: (0, case) for _, case in reversed(ordered)}.values(), decoding]
    found = []
    for _place, case in ordered:
        for dtype in dtypes_of(case)[: 1 if target.rehearsal else None]:
            name = f"{case.name} {str(dtype).removeprefix('torch.')}"
            found.append(Case(name, partial(smoke, case=case, dtype=dtype, name=name)))
    if not target.rehearsal:
        found.append(Case("first launch in a capture", first_launch_in_a_capture))
    return [case for case in found if target.wants(case.name)]


def dtypes_of(case: OpCase) -> list[torch.dtype]:
    return [d for d in (torch.float32, torch.bfloat16) if d in case.dtypes] or list(case.dtypes[:1])


def smoke(target: Target, case: OpCase, dtype: torch.dtype, name: str) -> Iterator[Row]:
    """Check accuracy, unwritten memory, two runs and a graph: the first that fails is the case's row."""
    sizes, large = (TINY, TINY[-1]) if target.rehearsal else (SIZES, LARGE)
    check(case, [make(case, target.device, n, seed, dtype) for seed, n in enumerate(sizes)])
    arguments = make(case, target.device, large, 7, dtype)
    expected = run(case, case.function, arguments)
    with poisoned_empty():
        assert_equal(run(case, case.function, arguments), expected, name="with poisoned memory")
    assert_equal(run(case, case.function, arguments), expected, name="second run")
    if not case.sparse:  # how many rows a sparse gradient has is known on the device only
        graph(target, case, dtype, large)
    yield failed_row(f"smoke {name}", f"{sizes} bytes", "", OURS, "ok")


def graph(target: Target, case: OpCase, dtype: torch.dtype, num_bytes: int) -> None:
    """Compare a captured step, replayed on other values, with eager code."""
    first, second = (make(case, target.device, num_bytes, seed, dtype) for seed in (18, 19))
    second = {name: x if isinstance(x, Tensor) else first[name] for name, x in second.items()}
    if any(a.shape != b.shape for a, b in zip(tensors_of(first), tensors_of(second), strict=True)):
        second = map_tensors(Tensor.clone, first)
    out, _ = forward(case, case.function, first)
    cotangents = cotangents_of(case, out)

    def step(arguments: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        return backward(case, *forward(case, case.function, arguments), cotangents)

    replay, captured = target.capture(lambda: step(first))
    replaced(tensors_of(first), tensors_of(second))
    replay()
    assert_equal(captured, step(second), name="replayed graph")


def first_launch_in_a_capture(target: Target) -> Iterator[Row]:
    """A kernel that was never launched asks for a warm-up. fp64 is what no other case uses."""
    case = next(c for c in CASES if c.function is bk.patch_unpool)
    arguments = make(case, target.device, 40, 1, torch.float64)
    warm_up(lambda: arguments["y"] * 2)
    try:
        capture(lambda: case.function(**arguments))
    except RuntimeError as error:
        if "warm-up" not in str(error):
            raise
    else:
        raise AssertionError("a first launch in a capture raised nothing")
    if not target.usable():
        raise RuntimeError("the failed capture left the process unusable")
    yield failed_row("smoke first launch in a capture", "", "", OURS, "ok")
