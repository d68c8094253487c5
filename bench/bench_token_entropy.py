"""Benches of token_entropy and linear_entropy: the shapes of BASELINES, side by side with what users run today.

``blt-kernels bench`` measures the comparisons in turn and writes the results. ``pytest bench/bench_token_entropy.py``
puts every implementation through pytest-benchmark, which has more statistics but measures one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timing
import torch
import torch.nn.functional as F
from common import name_of, nbytes
from peers import compiled
from peers import token_entropy as peers
from timing import OURS, Comparison, Make
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import assert_close, ragged_logits

ALPHABET, HIDDEN = 260, 768


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of the inputs."""

    rows: int = 8
    length: int = 8192


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield all comparisons, of the sizes of BASELINES or of small ones."""
    sizes = Sizes(2, 512) if small else Sizes()
    for dtype in (torch.float32, torch.bfloat16):
        yield partial(token_entropy_comparison, sizes, device, dtype, compile_peers)
    if device == "cuda" and not small:  # smaller inputs end before a GPU is busy
        yield partial(token_entropy_comparison, Sizes(rows=128), device, torch.bfloat16, compile_peers)
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        yield partial(linear_entropy_comparison, sizes, device, dtype)


def logits_of(sizes: Sizes, device: str, dtype: torch.dtype) -> Tensor:
    return ragged_logits((sizes.rows, sizes.length, ALPHABET), dtype=dtype, device=device)


def assert_entropy(entropy: Tensor, logits: Tensor) -> None:
    assert_close(entropy, peers.eager_entropy(logits.float()), peers.eager_entropy(logits.double()))


def token_entropy_comparison(sizes: Sizes, device: str, dtype: torch.dtype, compile_peers: bool) -> Comparison:
    logits = logits_of(sizes, device, dtype)
    alone: dict[str, Callable[[], Any]] = {
        OURS: lambda: bk.token_entropy(logits),
        "eager": lambda: peers.eager_entropy(logits),
    }
    if compile_peers:
        entropy_graph = compiled(peers.eager_entropy)
        alone["torch.compile"] = lambda: entropy_graph(logits)
    return Comparison(
        "token_entropy",
        str(list(logits.shape)),
        name_of(dtype),
        alone,
        nbytes(logits) + sizes.rows * sizes.length * 8,
        timing.reads(logits),
        nbytes(logits),
        lambda results: assert_entropy(results[OURS], logits),
        device=device,
    )


def linear_entropy_comparison(sizes: Sizes, device: str, dtype: torch.dtype) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sizes.rows * sizes.length, HIDDEN, generator=generator).to(device, dtype)
    weight = (torch.randn(ALPHABET, HIDDEN, generator=generator) * 0.1).to(device, dtype)
    flops = 2 * hidden.shape[0] * HIDDEN * ALPHABET

    def agree(results: dict[str, Any]) -> None:
        truth = peers.eager_entropy(F.linear(hidden.double(), weight.double()))
        assert_close(results[OURS], results["F.linear, eager entropy"], truth)

    return Comparison(
        "linear_entropy",
        f"{list(hidden.shape)} x {list(weight.shape)}",
        name_of(dtype),
        {
            OURS: lambda: bk.linear_entropy(hidden, weight),
            "F.linear, token_entropy": lambda: bk.token_entropy(F.linear(hidden, weight)),
            "F.linear, eager entropy": lambda: peers.eager_entropy(F.linear(hidden, weight)),
        },
        flops,
        {"torch.mm": lambda: hidden @ weight.T},
        flops,
        agree,
        unit="flop",
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_token_entropy(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
