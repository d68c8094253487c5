"""Benches of entropy_patch and patch_starts: the shapes of BASELINES, side by side with what users run today.

``blt-kernels bench`` measures the comparisons in turn and writes the results. ``pytest bench/bench_entropy_patch.py``
puts every implementation through pytest-benchmark, which has more statistics but measures one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
from bench_token_entropy import Sizes, assert_entropy, logits_of
from common import name_of, nbytes, ragged_entropies
from peers import compiled
from peers import entropy_patch as peers
from timing import OURS, Comparison, Make
from torch import Tensor

import blt_kernels as bk
from blt_kernels.models.config import RELEASED_THRESHOLD


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield all comparisons, of the sizes of BASELINES or of small ones."""
    sizes = Sizes(2, 512) if small else Sizes()
    for dtype in (torch.float32, torch.bfloat16):
        yield partial(entropy_patch_comparison, sizes, device, dtype, compile_peers)
    if device == "cuda" and not small:  # smaller inputs end before a GPU is busy
        yield partial(entropy_patch_comparison, Sizes(rows=128), device, torch.bfloat16, compile_peers)
    yield partial(patch_starts_comparison, sizes, device)


def starts(lengths: Tensor, size: int) -> list[list[int]]:
    """Return where the patches of each row of `size` bytes start. Lengths are padded with 0, or -1 in transformers."""
    found = (lengths.cumsum(1) - lengths).tolist()
    return [sorted({start for start in row if start < size}) for row in found]


def entropy_patch_comparison(sizes: Sizes, device: str, dtype: torch.dtype, compile_peers: bool) -> Comparison:
    logits = logits_of(sizes, device, dtype)

    def agree(results: dict[str, Any]) -> None:
        entropy, layout = results[OURS]
        assert_entropy(entropy, logits)
        expected = starts(layout.to_lengths(), sizes.length)
        # Steps in bf16 arithmetic flip decisions near the threshold, of which these logits have none.
        for name in set(results) & {"facebookresearch/blt", "transformers"}:
            assert starts(results[name][1], sizes.length) == expected, name

    implementations: dict[str, Callable[[], Any]] = {
        OURS: lambda: bk.entropy_patch(logits, threshold=RELEASED_THRESHOLD),
        "facebookresearch/blt": lambda: peers.eager_entropy_patch(logits, RELEASED_THRESHOLD),
    }
    if steps := peers.transformers_entropy_patch(RELEASED_THRESHOLD):
        implementations["transformers"] = lambda: steps(logits)
    if compile_peers:
        graph = compiled(peers.entropy_and_mask)
        implementations["torch.compile, mask only"] = lambda: graph(logits, RELEASED_THRESHOLD)
    # The op writes entropy and what backward needs, patch_ids, decode_ids, patch_offsets and decode_offsets.
    return Comparison(
        "entropy_patch",
        str(list(logits.shape)),
        name_of(dtype),
        implementations,
        nbytes(logits) + sizes.rows * sizes.length * (4 + 4 + 4 * 4),
        timing.reads(logits),
        nbytes(logits),
        agree,
        device=device,
    )


def patch_starts_comparison(sizes: Sizes, device: str) -> Comparison:
    entropy = ragged_entropies(sizes.rows, sizes.length, device=device)

    def agree(results: dict[str, Any]) -> None:
        own, theirs = results[OURS].to_lengths(), results["facebookresearch/blt"]
        assert starts(own, sizes.length) == starts(theirs, sizes.length)

    return Comparison(
        "patch_starts",
        str(list(entropy.shape)),
        "float32",
        {
            OURS: lambda: bk.patch_starts(entropy, threshold=RELEASED_THRESHOLD),
            "facebookresearch/blt": lambda: peers.eager_patch_lengths(entropy, RELEASED_THRESHOLD),
        },
        entropy.numel() * (4 + 3 * 4),
        timing.copies(entropy),
        entropy.numel() * 8,
        agree,
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_entropy_patch(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
