"""Benches of linear_cross_entropy: the heads of byte models and of a token model, forward and with backward.

The work is that of the products alone: two flops for each number of hidden and each logit forward, four backward.
Whoever computes the logits anew in backward does a third more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
from common import assert_agree, name_of, name_of_pass, normal, steps
from peers import compiled
from peers import linear_cross_entropy as peers
from timing import OURS, Comparison, Make
from torch import Tensor

import blt_kernels as bk

BYTES, TOKENS = 260, 32768


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield forward and backward for bytes at several widths, for many rows, and for tokens."""
    more = 8 if device == "cuda" else 1
    sizes = [(8192 * more, width, BYTES) for width in (128, 512, 1024)]
    sizes += [(1 << 20, 128, BYTES), (2048 * more, 512, TOKENS)]
    for size in [(70, 16, BYTES), (40, 16, 1000)] if small else sizes:
        for backward in (False, True):
            yield partial(comparison, *size, device, backward, compile_peers)


def comparison(rows: int, width: int, alphabet: int, device: str, backward: bool, compile_peers: bool) -> Comparison:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = normal(rows, width, dtype=dtype, device=device).requires_grad_(backward)
    weight = (normal(alphabet, width, seed=1, device=device) * width**-0.5).to(dtype).requires_grad_(backward)
    targets = torch.randint(alphabet, (rows,), generator=torch.Generator().manual_seed(2)).to(device)
    grad = torch.full((rows,), 1 / rows, device=device)

    def run(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        leaves = hidden, weight
        return steps(lambda: function(*leaves, targets), leaves, grad if backward else None)

    implementations = {
        OURS: run(bk.linear_cross_entropy),
        "F.cross_entropy": run(peers.stored),
        "chunked, checkpointed": run(peers.chunked),
    }
    if compile_peers:
        implementations["torch.compile"] = run(compiled(peers.stored))

    def agree(results: dict[str, Any]) -> None:
        wide = [x.detach().double().requires_grad_(backward) for x in (hidden, weight)]
        loss = peers.chunked(*wide, targets)
        truth = list(torch.autograd.grad(loss, wide, grad.double())) if backward else [loss]
        assert_agree({name: list(r) if backward else [r] for name, r in results.items()}, truth, "F.cross_entropy")

    product = 2 * rows * width * alphabet
    return Comparison(
        f"linear_cross_entropy {name_of_pass(backward)}",
        f"{[rows, width]} x {[alphabet, width]}",
        name_of(dtype),
        implementations,
        product * (3 if backward else 1),
        {"torch.mm": lambda: hidden.detach() @ weight.detach().T},
        product,
        agree,
        unit="flop",
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_linear_cross_entropy(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
