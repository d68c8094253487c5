"""Benches of block_causal_attention: the documents of BASELINES, against what torch itself offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timing
import torch
from common import assert_agree, name_of, name_of_pass, normal, steps
from peers import block_causal_attention as peers
from timing import OURS, Comparison
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import offsets_of

DOCUMENTS = [1098, 315, 5504, 375, 118, 782]
SMALL = [40, 1, 0, 75]
HEADS, GROUPS, WIDTH, WINDOW = 16, 4, 64, 512


@dataclass(frozen=True)
class Case:
    """What is attended: documents of these lengths, `key_heads` for HEADS query heads, all or the last `window`."""

    lengths: list[int]
    window: int | None = None
    key_heads: int = HEADS
    dtype: torch.dtype = torch.float32


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Comparison]:
    """Yield forward and backward, whole and windowed; inputs are made when their turn comes."""
    lengths = SMALL if small else DOCUMENTS
    whole = Case(lengths)
    half = Case(lengths, dtype=torch.bfloat16)
    windowed = Case(lengths, window=16 if small else WINDOW)
    for case in (whole, half, windowed):
        for backward in (False, True):
            yield comparison(case, device, backward, compile_peers)
    yield comparison(Case(lengths, key_heads=GROUPS), device, False, compile_peers)


def comparison(case: Case, device: str, backward: bool, compile_peers: bool) -> Comparison:
    lengths, window, size = case.lengths, case.window, sum(case.lengths)
    q, k, v, grad = (
        normal(size, heads, WIDTH, seed=seed, dtype=case.dtype, device=device)
        for seed, heads in enumerate((HEADS, case.key_heads, case.key_heads, HEADS))
    )
    inputs = tuple(x.requires_grad_(backward) for x in (q, k, v))
    cu_seqlens = offsets_of(lengths, device=device)

    def run(attention: Callable[..., Tensor]) -> Callable[[], Any]:
        return steps(lambda: attention(*inputs), inputs, grad if backward else None)

    implementations = {
        OURS: run(lambda q, k, v: bk.block_causal_attention(q, k, v, cu_seqlens, window=window)),
        "SDPA, dense mask": run(peers.masked_attention(cu_seqlens, window)),
        "SDPA by document": run(peers.attention_by_document(lengths, window)),
    }
    if compile_peers and not (backward and device == "cpu"):  # flex_attention has no backward on the CPU
        implementations["flex_attention"] = run(peers.flex_attention(cu_seqlens, window))
    pairs = sum(min(i + 1, window or n) for n in lengths for i in range(n))
    flops = (14 if backward else 4) * pairs * HEADS * WIDTH  # 2 products forward; 5 more, recomputing one, backward
    side = 2048 if lengths == DOCUMENTS else 128
    square = normal(side, side, dtype=case.dtype, device=device)

    def agree(results: dict[str, Any]) -> None:
        # The first key head and the query heads that read it: all of them in fp64 take longer than the measurement.
        heads = (HEADS // case.key_heads, 1, 1)
        exact_inputs = tuple(
            x[:, :n].detach().double().requires_grad_(backward) for x, n in zip(inputs, heads, strict=True)
        )
        exact = peers.attention_by_document(lengths, window)(*exact_inputs)
        if backward:
            truth = torch.autograd.grad(exact, exact_inputs, grad[:, : heads[0]].double())
            shown = {name: [x[:, :n] for x, n in zip(r, heads, strict=True)] for name, r in results.items()}
        else:
            truth, shown = (exact,), {name: [r[:, : heads[0]]] for name, r in results.items()}
        assert_agree(shown, truth, "SDPA by document")

    grouping = f"{HEADS}/{case.key_heads} heads, " if case.key_heads != HEADS else ""
    return Comparison(
        f"block_causal_attention {name_of_pass(backward)}",
        f"{f'window {window}, ' if window else ''}{grouping}{list(q.shape)} in {len(lengths)} documents",
        name_of(case.dtype),
        implementations,
        flops,
        {"torch.mm": lambda: square @ square},
        2 * side**3,
        agree,
        unit="flop",
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Nothing that the tables do not show."""
    return []


def test_block_causal_attention(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
