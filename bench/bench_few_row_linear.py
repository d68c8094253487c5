"""Bench of few_row_linear: products of few rows with the weights of layers, beside torch's. It is for the CPU only.

``bench_decode.py`` prints CPU times of the same comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch.nn.functional as F
from common import assert_agree, nbytes, normal
from timing import OURS, Comparison, Make

from blt_kernels.ops.few_row_linear import few_row_linear_fwd

WIDTHS = ((256, 682), (512, 512), (768, 768), (512, 1408), (1024, 1024), (1024, 2816), (2816, 1024))
ROWS = (1, 3, 4, 5, 8, 12, 16)
TORCH = "F.linear"
WEIGHTS = 2**23  # all matrices together exceed a core's cache, as the weights of a model do


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield products by weights of several sizes and numbers of rows, also where layers call torch's."""
    if device != "cpu":
        return
    for inputs, outputs in ((16, 48),) if small else WIDTHS:
        for rows in (8,) if small else ROWS:
            yield partial(product, rows, inputs, outputs, *([1000] if small else []))


def product(rows: int, inputs: int, outputs: int, weights: int = WEIGHTS) -> Comparison:
    """Compare the operator on many matrices in turn with `F.linear`, on weights by rows and by columns."""
    x = normal(rows, inputs)
    matrices = normal(max(1, weights // (inputs * outputs)), outputs, inputs, seed=1).unbind()
    columns = [weight.t().contiguous().t() for weight in matrices]

    def agree(results: dict[str, Any]) -> None:
        truth = [F.linear(x.double(), weight.double()) for weight in matrices]
        assert_agree(results, truth, TORCH)

    implementations = {
        OURS: lambda: [few_row_linear_fwd(x, weight) for weight in matrices],
        TORCH: lambda: [F.linear(x, weight) for weight in matrices],
        "by columns": lambda: [F.linear(x, weight) for weight in columns],
    }
    shape = f"{rows} rows, {inputs} to {outputs}, {len(matrices)} times"
    limits, work = {"read the weights": lambda: [weight.sum() for weight in matrices]}, nbytes(*matrices)
    return Comparison("few_row_linear", shape, "float32", implementations, work, limits, work, agree)


def remarks(rows: list[timing.Row]) -> list[str]:
    """Say how many times as fast as the best peer each shape is."""
    return [
        f"{row.op}, {row.shape}, {row.threads} threads: {row.ratio_to_best_peer:.2f} times as fast"
        for row in rows
        if row.implementation == OURS and row.ratio_to_best_peer
    ]


def test_few_row_linear(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
