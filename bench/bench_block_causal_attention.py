"""Benches of block_causal_attention: the documents of BASELINES, against what torch itself offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peers
import timing
import torch
from timing import OURS, Comparison
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import assert_close, offsets_of

DOCUMENTS = [1098, 315, 5504, 375, 118, 782]
SMALL = [40, 1, 0, 75]
HEADS, WIDTH, WINDOW = 16, 64, 512


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Comparison]:
    """Yield forward and backward, whole and windowed; inputs are made when their turn comes."""
    lengths = SMALL if small else DOCUMENTS
    window = 16 if small else WINDOW
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            yield comparison(lengths, None, dtype, device, backward, compile_peers)
    yield comparison(lengths, window, torch.float32, device, False, compile_peers)


def comparison(
    lengths: list[int], window: int | None, dtype: torch.dtype, device: str, backward: bool, compile_peers: bool
) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    size = (sum(lengths), HEADS, WIDTH)
    q, k, v, grad = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(4))
    cu_seqlens = offsets_of(lengths, device=device)
    if backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))

    def steps(attention: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            out = attention(q, k, v)
            return torch.autograd.grad(out, (q, k, v), grad) if backward else out

        return run

    implementations = {
        OURS: steps(lambda q, k, v: bk.block_causal_attention(q, k, v, cu_seqlens, window=window)),
        "SDPA, dense mask": steps(peers.masked_attention(cu_seqlens, window)),
        "SDPA by document": steps(peers.attention_by_document(lengths, window)),
    }
    if compile_peers and not (backward and device == "cpu"):  # flex_attention has no backward on the CPU
        implementations["flex_attention"] = steps(peers.flex_attention(cu_seqlens, window))
    pairs = sum(min(i + 1, window or n) for n in lengths for i in range(n))
    flops = (14 if backward else 4) * pairs * HEADS * WIDTH  # 2 products forward; 5 more, recomputing one, backward
    side = 2048 if len(lengths) == len(DOCUMENTS) else 128
    square = torch.randn(side, side, generator=generator).to(device, dtype)

    def agree(results: dict[str, Any]) -> None:
        q64, k64, v64 = (x.detach().double().requires_grad_(backward) for x in (q, k, v))
        exact = peers.attention_by_document(lengths, window)(q64, k64, v64)
        truth = torch.autograd.grad(exact, (q64, k64, v64), grad.double()) if backward else exact
        assert_close(results[OURS], results["SDPA by document"], truth)

    name = f"{'window ' + str(window) + ' ' if window else ''}{list(size)} in {len(lengths)} documents"
    return Comparison(
        f"block_causal_attention {'fwd+bwd' if backward else 'fwd'}",
        name,
        str(dtype).removeprefix("torch."),
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
