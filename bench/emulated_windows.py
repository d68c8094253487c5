"""Count what the CUDA kernels of patch_cross_attention access with windows: ``python bench/emulated_windows.py``.

The kernels run on the emulator, so no GPU is needed. It prints the longest chain of accesses of a thread for one long
patch, and the traffic of ragged patches over the minimum, at which every tensor passes once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import backends
from common import layout_of

from blt_kernels import PatchLayout

VECTORS, WIDTH = 2, 64
BYTES = (2048, 8192)  # a long patch has so many


def passes(layout: PatchLayout, direction: str, window: int, heads: int) -> tuple[list[Callable[[], Any]], list[int]]:
    """Return forward and backward of bf16 tensors, and the bytes that each has to move."""
    sides = [layout.capacity * VECTORS, layout.num_bytes]
    queries, keys = sides if direction == "encode" else sides[::-1]
    q, k, v, grad = (torch.randn(n, heads, WIDTH, dtype=torch.bfloat16) for n in (queries, keys, keys, queries))
    offsets, ids = layout.patch_offsets, layout.patch_ids
    if direction == "decode":
        offsets, ids = layout.decode_offsets, layout.decode_ids
    rest = (offsets, layout.cu_patches, ids, direction, VECTORS, window, None)
    ops = torch.ops.blt_kernels
    with backends.use("emulated"):
        out, lse = ops.patch_cross_attention_fwd(q, k, v, *rest)
    forward = 2 * q.nbytes + k.nbytes + v.nbytes + lse.nbytes
    backward = 3 * q.nbytes + 2 * k.nbytes + 2 * v.nbytes + lse.nbytes
    runs: list[Callable[[], Any]] = [
        lambda: ops.patch_cross_attention_fwd(q, k, v, *rest),
        lambda: ops.patch_cross_attention_bwd(grad, q, k, v, out, lse, *rest),
    ]
    return runs, [forward, backward]


def chain(run: Callable[[], Any]) -> int:
    """Return the longest chain of accesses of a thread in any launch."""
    return max(launch.longest for launch in backends.launches(run))


def main() -> None:
    print(f"longest chain of accesses, one patch of {BYTES[0]} and of {BYTES[1]} bytes: forward, backward")
    for direction in ("encode", "decode"):
        for window in (1, 2, 16, 17):
            chains: list[list[int]] = []
            for size in BYTES:
                layout = PatchLayout.from_lengths(torch.tensor([[1] * 20 + [size]]))
                chains.append([chain(run) for run in passes(layout.compact(), direction, window, 1)[0]])
            (short_fwd, short_bwd), (long_fwd, long_bwd) = chains
            print(f"{direction}, window {window}: {short_fwd} {long_fwd}, {short_bwd} {long_bwd}", flush=True)
    print("traffic over the minimum, 1200 bytes in patches of 4.5 bytes, 16 heads: forward, backward")
    for direction in ("encode", "decode"):
        for window in (1, 2, 3, 4):
            runs, minimum = passes(layout_of([1200]).compact(), direction, window, 16)
            forward, backward = (backends.traffic(run) / n for run, n in zip(runs, minimum, strict=True))
            print(f"{direction}, window {window}: {forward:.2f}, {backward:.2f}", flush=True)


if __name__ == "__main__":
    main()
