"""Benches of patch_pool: rows of 8192 bytes in patches of 4.5 bytes on average, against torch's reductions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
from common import assert_agree, layout_of, local_ids, name_of, name_of_pass, nbytes, normal, pad_patches, steps
from peers import patch_pool as peers
from timing import OURS, Comparison, Make
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import assert_equal

CASES = (
    (("max",), torch.float32),
    (("max",), torch.bfloat16),
    (("mean",), torch.float32),
    (("max", "mean"), torch.float32),
)


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield forward and backward of every case, then bf16 against fp32."""
    shape = (2, 256, 32) if small else (8, 8192, 512 if device == "cpu" else 1024)
    for reduce, dtype in CASES:
        for backward in (False, True):
            yield partial(comparison, shape, reduce, dtype, device, backward)
    yield partial(precision_comparison, shape, device)


def comparison(
    shape: tuple[int, int, int], reduce: tuple[str, ...], dtype: torch.dtype, device: str, backward: bool
) -> Comparison:
    layout = layout_of([shape[1]] * shape[0], device=device)
    x = normal(*shape, dtype=dtype, device=device).requires_grad_(backward)
    ids, rows_ids, offsets = layout.patch_ids.long(), local_ids(layout.patch_ids, layout), layout.patch_offsets.long()
    patches = int(layout.cu_patches.diff().max())
    grad = normal(layout.capacity, len(reduce) * shape[2], seed=1, dtype=dtype, device=device)
    padded_grad = pad_patches(grad, layout)

    def run(function: Callable[[], Tensor], gradient: Tensor = grad) -> Callable[[], Any]:
        return steps(function, (x,), gradient if backward else None)

    implementations = {
        OURS: run(lambda: bk.patch_pool(x, layout, reduce)),
        "scatter_reduce": run(lambda: peers.scatter_reduce(x, rows_ids, patches, reduce), padded_grad),
        "segment_reduce": run(lambda: peers.segment_reduce(x.flatten(0, 1), offsets, reduce)),
    }
    if "mean" in reduce:
        name = "index_add" if reduce == ("mean",) else "segment_reduce, index_add"
        implementations[name] = run(lambda: peers.segment_reduce(x.flatten(0, 1), offsets, reduce, ids))
    # Forward reads x and writes out. Backward reads grad_out and writes grad_x; for a maximum it reads x and out again.
    work = nbytes(x, grad) * (1 if not backward else 3 if "max" in reduce else 2)

    def agree(results: dict[str, Any]) -> None:
        first = x[:1].detach().double().requires_grad_(backward)  # one row is enough, and fp64 is dear
        count = int(layout.cu_patches[1])
        truth = peers.scatter_reduce(first, rows_ids[:1], count, reduce)
        if backward:
            truth = torch.autograd.grad(truth, first, grad[None, :count].double())[0]
        sampled = {}
        for name, result in results.items():
            if backward:
                sampled[name] = [result[0][:1]]
            else:
                sampled[name] = [result[:1, :count] if result.dim() == 3 else result[None, :count]]
        assert_agree(sampled, [truth], "segment_reduce")

    limits = timing.copies(x.detach()) if backward else timing.reads(x)
    return Comparison(
        f"patch_pool {', '.join(reduce)} {name_of_pass(backward)}",
        str(list(shape)),
        name_of(dtype),
        implementations,
        work,
        limits,
        nbytes(x) * (2 if backward else 1),
        agree,
        device=device,
    )


def precision_comparison(shape: tuple[int, int, int], device: str) -> Comparison:
    """Compare our bf16 with our fp32: half the bytes should take half the time."""
    layout = layout_of([shape[1]] * shape[0], device=device)
    x = normal(*shape, device=device)
    half = x.bfloat16()

    def agree(results: dict[str, Any]) -> None:
        # A maximum is one of the inputs, and rounding keeps their order.
        assert_equal(results[OURS], results["blt_kernels, float32"].bfloat16())

    return Comparison(
        "patch_pool max against float32",
        str(list(shape)),
        "bfloat16",
        {
            OURS: lambda: bk.patch_pool(half, layout),
            "blt_kernels, float32": lambda: bk.patch_pool(x, layout),
        },
        nbytes(half) + layout.capacity * shape[2] * 2,
        timing.reads(half),
        nbytes(half),
        agree,
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_patch_pool(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
