"""Benches of boundary_patch: boundary probabilities of H-Net, side by side with PyTorch alone.

``blt-kernels bench`` measures the comparisons in turn and writes the results. ``pytest bench/bench_boundary_patch.py``
puts every implementation through pytest-benchmark, which has more statistics but measures one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
from bench_token_entropy import Sizes
from common import ragged_entropies
from peers import boundary_patch as peers
from timing import OURS, Comparison, Make

import blt_kernels as bk
from blt_kernels.models.config import RELEASED_THRESHOLD
from blt_kernels.testing import assert_equal


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield all comparisons, of one row, of the sizes of BASELINES, or of small ones."""
    for sizes in (Sizes(2, 512),) if small else (Sizes(1, 8192), Sizes()):
        yield partial(comparison, sizes, device)


def comparison(sizes: Sizes, device: str) -> Comparison:
    scores = ragged_entropies(sizes.rows, sizes.length, device=device)
    offsets = torch.arange(sizes.rows + 1, dtype=torch.int32, device=device) * sizes.length

    def from_cuts() -> bk.PatchLayout:
        decisions = scores.flatten()[1:] > RELEASED_THRESHOLD
        return bk.PatchLayout.from_cuts(torch.nn.functional.pad(decisions, (0, 1)), offsets)

    def agree(results: dict[str, Any]) -> None:
        own, (patch_ids, patch_offsets, cu_patches) = results[OURS].compact(), results["cumsum and nonzero"]
        assert_equal(own.patch_ids.long(), patch_ids)
        assert_equal(own.patch_offsets.long(), patch_offsets)
        assert_equal(own.cu_patches.long(), cu_patches)
        assert_equal(results["from_cuts"].compact().patch_offsets, own.patch_offsets)

    return Comparison(
        "boundary_patch",
        str(list(scores.shape)),
        "float32",
        {
            OURS: lambda: bk.boundary_patch(scores, at="start", threshold=RELEASED_THRESHOLD),
            "from_cuts": from_cuts,
            "cumsum and nonzero": lambda: peers.eager_patches(scores > RELEASED_THRESHOLD),
        },
        scores.numel() * (4 + 4 * 4),
        timing.copies(scores),
        scores.numel() * 8,
        agree,
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_boundary_patch(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
