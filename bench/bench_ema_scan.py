"""Benches of ema_scan: the patches of rows of 8192 bytes at 4.5 bytes a patch, against scans in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
from common import assert_agree, name_of, name_of_pass, nbytes, normal, steps
from peers import compiled
from peers import ema_scan as peers
from timing import OURS, Comparison, Make
from torch import Tensor

import blt_kernels as bk


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield forward and backward of many documents, and of a long one."""
    width = 32 if small else 512 if device == "cpu" else 1024
    many, one = ((2, 57, width), (1, 130, width)) if small else ((8, 1820, width), (1, 14560, width))
    for shape, dtype in ((many, torch.float32), (many, torch.bfloat16), (one, torch.float32)):
        for backward in (False, True):
            yield partial(comparison, shape, dtype, device, backward, compile_peers)


def comparison(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, backward: bool, compile_peers: bool
) -> Comparison:
    x, grad = (normal(*shape, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    generator = torch.Generator(device).manual_seed(2)
    # H-Net chooses bytes with weights of at least 1/2, and keeps the weights below 1.
    p = (0.5 + torch.rand(shape[:2], generator=generator, device=device) / 2).clamp(max=1 - 1e-4)
    leaves = x.requires_grad_(backward), p.requires_grad_(backward)

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        return steps(lambda: function(*leaves), leaves, grad if backward else None)

    implementations = {
        OURS: run(bk.ema_scan),
        "loop": run(lambda x, p: peers.loop(x, p.to(x.dtype))),
        "chunked matmul": run(peers.chunked),
    }
    if compile_peers:
        implementations["compiled chunked matmul"] = run(compiled(peers.chunked))
    if not backward:
        implementations["associative_scan"] = run(peers.scanned)

    def agree(results: dict[str, Any]) -> None:
        wide = [v.detach().double().requires_grad_(backward) for v in leaves]
        y = peers.chunked(*wide)
        truth = list(torch.autograd.grad(y, wide, grad.double())) if backward else [y]
        # The gradient of p is no more exact than the stored y.
        rounded = {name: [v.to(dtype) for v in (r if backward else [r])] for name, r in results.items()}
        assert_agree(rounded, truth, "loop")

    return Comparison(
        f"ema_scan {name_of_pass(backward)}",
        str(list(shape)),
        name_of(dtype),
        implementations,
        # Forward reads x and writes y. Backward reads the gradient, x and y and writes the gradient of x.
        nbytes(x) * (6 if backward else 2),
        timing.copies(x.detach()),
        2 * nbytes(x),
        agree,
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_ema_scan(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
