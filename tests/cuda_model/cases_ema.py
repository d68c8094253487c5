"""Launches of ema_scan, over the patches of documents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cuda_model.launches import WIDTH, Array, Case, Launch, blocks_at, ceil_div, data, i32, i64, layout

CHUNK, GROUP, WARPS = 32, 32, 8
PANELS = WIDTH // 256  # a warp has 8 columns in each lane
VECTORS = WIDTH // 4  # the sums of chunks are fp32
TILE = [i32(256 // VECTORS), i32(VECTORS), i32(65535 // VECTORS + 1)]


def parts(name: str, count: int) -> list:
    return [Array(f"{name} ends", count * WIDTH * 4, None, True), Array(f"{name} factors", count * 8, None, True)]


def launches_of(stem: str, rows: int, offsets: np.ndarray) -> list[Launch]:
    """Return the launches of a pass; `stem` is "fwd" or "bwd"."""
    reverse = stem == "bwd"
    chunks = ceil_div(rows, CHUNK)
    groups, blocks = ceil_div(chunks, GROUP), ceil_div(chunks * PANELS, WARPS)
    shape = [[data("offsets", offsets), i64(len(offsets) - 1), i32(rows), i32(0)], i32(WIDTH), i32(PANELS), i32(chunks)]
    p, of_chunks, of_groups = data("p", np.full(rows, 0.75, np.float32)), parts("chunk", chunks), parts("group", groups)
    tensors = {name: Array(name, rows * WIDTH * 2) for name in ("x", "y", "grad_y", "grad_x")}
    sample, scanned = blocks_at(blocks // 2, 2), tensors["grad_y" if reverse else "x"]
    steps = [
        Launch("ema_scan", rf"ema_scan_ends_kernel<__nv_bfloat16, 8, {str(reverse).lower()}>", (blocks, 1),
               [scanned, i32(WIDTH), p, shape, of_chunks], sample),
        Launch("ema_scan", r"ema_scan_groups_kernel<float, 4>", (groups - 1, 1),
               [of_chunks, i32(chunks), i32(WIDTH), TILE, of_groups, i32(groups - 1)], blocks_at(0, 1)),
        Launch("ema_scan", r"ema_scan_carries_kernel<float, 4>", (groups, 1),
               [of_chunks, i32(chunks), i32(WIDTH), TILE, of_groups], blocks_at(groups // 2, 1)),
    ]  # fmt: skip
    if not reverse:
        steps.append(Launch("ema_scan", r"ema_scan_fwd_kernel<__nv_bfloat16, 8>", (blocks, 1),
                            [tensors["x"], i32(WIDTH), p, shape, of_chunks[0], tensors["y"]], sample))  # fmt: skip
        return steps
    of_panels, grad_p = Array("of_panels", PANELS * rows * 4, None, True), Array("grad_p", rows * 4)
    grads = [tensors["grad_y"], tensors["x"], tensors["y"], i32(WIDTH), i32(WIDTH), i32(WIDTH), tensors["grad_x"],
             of_panels]  # fmt: skip
    row_blocks = ceil_div(rows, 256)
    return [
        *steps,
        Launch("ema_scan", r"ema_scan_bwd_kernel<__nv_bfloat16, 8>", (blocks, 1),
               [grads, p, shape, of_chunks[0]], sample),
        Launch("ema_scan", r"ema_scan_sum_kernel<float>", (row_blocks, 1),
               [of_panels, i32(rows), i32(PANELS), grad_p], blocks_at(row_blocks // 2, 1)),
    ]  # fmt: skip


def ema_cases() -> Iterator[Case]:
    own = layout()
    rows = own.patches
    narrow = rows * WIDTH * 2
    for stem, tensors in (("fwd", 2), ("bwd", 4)):
        yield Case(f"ema_scan {stem}", f"[{rows}, {WIDTH}]", "bfloat16", launches_of(stem, rows, own.cu_patches),
                   tensors * narrow)  # fmt: skip
