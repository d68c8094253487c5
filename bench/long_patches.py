"""Time one patch of nearly all bytes against ragged patches of 4.5 bytes: ``python bench/long_patches.py``.

It prints ratios of medians, interleaved in one process, on the CPU with two threads. The aim is at most 1.2.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import layout_of

import blt_kernels as bk
from blt_kernels import PatchLayout

ROUNDS = 5
HEADS, WIDTH, VECTORS = 8, 64, 2


def ratio(functions: list[Callable[[], Any]]) -> float:
    """Return the median time of the first function over that of the second."""
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for own, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]) / statistics.median(times[1][1:])


def report(name: str, ops: list[Callable[..., Any]], inputs: list[tuple[torch.Tensor, ...]]) -> None:
    """Print the ratios of forward and backward."""
    detached = [tuple(x.detach() for x in own) for own in inputs]
    forward = ratio([lambda op=op, own=own: op(*own) for op, own in zip(ops, detached, strict=True)])
    outs = [op(*own) for op, own in zip(ops, inputs, strict=True)]
    grads = [torch.randn(out.shape).to(out.dtype) for out in outs]
    cases = zip(outs, inputs, grads, strict=True)
    backward = ratio([lambda case=case: torch.autograd.grad(*case, retain_graph=True) for case in cases])
    print(f"{name}: forward {forward:.2f}, backward {backward:.2f}", flush=True)


def layouts(num_bytes: int, window: int = 1) -> list[PatchLayout]:
    """Return one long patch between `window` patches of one byte on either side, and ragged patches.

    So both have about as many pairs of a byte and a patch.
    """
    ones = [1] * window
    long = PatchLayout.from_lengths(torch.tensor([[*ones, num_bytes - 2 * window, *ones]]))
    return [long.compact(), layout_of([num_bytes]).compact()]


def main() -> None:
    torch.set_num_threads(2)
    both = layouts(1_000_000)
    for width, dtype in ((64, torch.float32), (256, torch.float32), (256, torch.bfloat16)):
        x = torch.randn(1_000_000, width).to(dtype).requires_grad_()
        for reduce in ("max", "mean"):
            ops = [lambda x, layout=layout, reduce=reduce: bk.patch_pool(x, layout, reduce) for layout in both]
            report(f"patch_pool {reduce} D = {width} {dtype}", ops, [(x,), (x,)])
    both = layouts(200_000)
    x = torch.randn(200_000, 64).requires_grad_()
    ops = [lambda x, layout=layout: bk.patch_pool(x, layout, ("max", "min", "mean")) for layout in both]
    report("patch_pool max, min, mean D = 64 torch.float32, 200000 bytes", ops, [(x,), (x,)])
    sizes = {1: 200_000, 2: 100_000, 3: 70_000, 8: 25_000, 64: 8_000}  # every window has about as many pairs
    for direction, (window, num_bytes) in itertools.product(("encode", "decode"), sizes.items()):
        both = layouts(num_bytes, window)
        options = {"direction": direction, "queries_per_patch": VECTORS, "window": window}
        inputs = []
        for layout in both:
            sides = [layout.capacity * VECTORS, layout.num_bytes]
            queries, keys = sides if direction == "encode" else sides[::-1]
            inputs.append(tuple(torch.randn(n, HEADS, WIDTH).requires_grad_() for n in (queries, keys, keys)))
        attend = [
            lambda q, k, v, layout=layout, options=options: bk.patch_cross_attention(q, k, v, layout, **options)
            for layout in both
        ]
        report(f"patch_cross_attention {direction}, window {window}, {num_bytes} bytes", attend, inputs)


if __name__ == "__main__":
    main()
