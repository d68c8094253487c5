"""Launches of patch_pool and patch_unpool."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cuda_model.launches import (
    BYTES,
    PATCHES_A_PERIOD,
    WIDTH,
    Array,
    Case,
    Launch,
    Layout,
    blocks_at,
    boolean,
    ceil_div,
    data,
    i32,
    i64,
    layout,
)

SHAPE = f"[{BYTES}, {WIDTH}], 4.5 bytes a patch"
VECTORS = WIDTH // 8  # a row has so many vectors of 8 columns, each owned by a thread
PART = 64
TILE = [i32(256 // VECTORS), i32(VECTORS), i32(65535 // VECTORS + 1)]
ROW_WARPS = (0, 4)  # these warps are the first of the four of a row


def patch_rows(offsets: np.ndarray, stride: int = WIDTH) -> list:
    patches = len(offsets) - 1
    return [data("patch_offsets", offsets), i64(patches), i32(BYTES), i32(WIDTH), i32(stride)]


def row_blocks(groups: int) -> int:
    return ceil_div(groups * VECTORS, 256)


def part_levels(kind: str) -> list:
    """Return the results of the parts of both levels, of one kind: "max", "sum" or none."""
    sizes = {"max": 2, "sum": 4, "": 0}
    levels: list = []
    for count in (BYTES // PART, BYTES // PART**2):
        folds = Array("parts", count * WIDTH * sizes[kind], None, True) if kind else None
        levels.append([folds if kind == "max" else None, None, folds if kind == "sum" else None])
    return [*levels, boolean(bool(kind))]


def part_launches(stem: str, kind: str, ids: np.ndarray, first: Launch | None = None) -> list[Launch]:
    """Return the folds of parts of long patches. There are none here, so all threads leave after two loads."""
    launches = [] if first is None else [first]
    for level, count in ((1, BYTES // PART), (2, BYTES // PART**2)):
        if level == 1 and first is not None:
            continue
        x = Array("x", BYTES * WIDTH * 2) if level == 1 else None
        arguments = [x, data("ids", ids), i64(count), i32(WIDTH), i32(WIDTH if x else 0), TILE, part_levels(kind)]
        blocks = row_blocks(count)
        launches.append(
            Launch(stem, r"segment_parts_kernel<__nv_bfloat16, 8>", (blocks, 1), arguments, blocks_at(blocks // 2, 2))
        )
    return launches


def ties(asked: bool) -> list:
    return [part_levels("sum" if asked else ""), boolean(asked)]


def pool_forward(own: Layout, name: str, code: int, kinds: int) -> list[Launch]:
    kind, blocks = "max" if name == "max" else "sum", row_blocks(own.patches)
    reductions = [i32(1), boolean(True), i64(code)]
    arguments = [
        Array("x", BYTES * WIDTH * 2), patch_rows(own.offsets), TILE, reductions, part_levels(kind),
        Array("out", own.patches * WIDTH * 2),
    ]  # fmt: skip
    owners = Launch(
        "patch_pool", rf"patch_pool_fwd_kernel<__nv_bfloat16, 8, .*{kinds}", (blocks, 1), arguments,
        period_of_patches(blocks), warps=ROW_WARPS,
    )  # fmt: skip
    return [*part_launches("patch_pool", kind, own.patch_ids), owners]


def period_of_patches(blocks: int) -> list[tuple[int, int]]:
    return blocks_at(blocks // 2 // 16 * 16, PATCHES_A_PERIOD // 2)  # a block has two patches


def pool_backward(own: Layout, name: str, code: int, kinds: int) -> list[Launch]:
    wide, narrow, is_max = BYTES * WIDTH * 2, own.patches * WIDTH * 2, name == "max"
    reductions = [i32(1), boolean(True), i64(code)]
    x, out = (Array("x", wide), Array("out", narrow)) if is_max else (None, None)
    tensors = [Array("grad_out", narrow), x, out, Array("grad_x", wide), i32(WIDTH if is_max else 0), i32(WIDTH)]
    rows, ids = patch_rows(own.offsets, WIDTH if is_max else 0), data("ids", own.patch_ids)
    behind = [i64(WIDTH), i64(WIDTH if is_max else 0), reductions, ties(is_max), ties(False)]
    blocks, part_blocks = row_blocks(own.patches), row_blocks(BYTES // PART)
    counted = Launch(
        "patch_pool", r"patch_pool_ties_kernel<__nv_bfloat16, 8>", (part_blocks, 1),
        [x, out, rows, ids, i64(BYTES // PART), TILE, i64(WIDTH), Array("ties", BYTES // PART * WIDTH * 4, None, True)],
        blocks_at(part_blocks // 2, 2),
    )  # fmt: skip
    return [
        *(part_launches("patch_pool", "sum", own.patch_ids, counted) if is_max else []),
        Launch("patch_pool", rf"patch_pool_bwd_kernel<__nv_bfloat16, 8, .*{kinds}", (blocks, 1),
               [tensors, rows, TILE, *behind], period_of_patches(blocks), warps=ROW_WARPS),
        Launch("patch_pool", r"patch_pool_parts_bwd_kernel<__nv_bfloat16, 8>", (part_blocks, 1),
               [tensors, rows, ids, TILE, *behind], blocks_at(part_blocks // 2, 2)),
    ]  # fmt: skip


def unpool_forward(own: Layout, ids: np.ndarray) -> Launch:
    blocks = row_blocks(ceil_div(BYTES, 16))
    arguments = [
        Array("y", own.patches * WIDTH * 2), data("ids", ids), i64(BYTES), i64(own.patches), i32(WIDTH), i64(WIDTH),
        TILE, Array("out", BYTES * WIDTH * 2),
    ]  # fmt: skip
    return Launch(
        "patch_unpool", r"patch_unpool_fwd_kernel<__nv_bfloat16, 8>", (blocks, 1), arguments,
        blocks_at(blocks // 2, 9), warps=ROW_WARPS,
    )  # fmt: skip


def unpool_backward(own: Layout, ids: np.ndarray, offsets: np.ndarray) -> list[Launch]:
    blocks = row_blocks(own.patches)
    arguments = [
        Array("grad_out", BYTES * WIDTH * 2), data("ids", ids), patch_rows(offsets), TILE, part_levels("sum"),
        Array("grad_y", own.patches * WIDTH * 2),
    ]  # fmt: skip
    owners = Launch(
        "patch_unpool", r"patch_unpool_bwd_kernel<__nv_bfloat16, 8>", (blocks, 1), arguments,
        period_of_patches(blocks), warps=ROW_WARPS,
    )  # fmt: skip
    return [*part_launches("patch_unpool", "sum", ids), owners]


def pool_cases() -> Iterator[Case]:
    own = layout()
    wide, narrow = BYTES * WIDTH * 2, own.patches * WIDTH * 2
    for name, code, forward, backward in (("max", 0, 0, 0), ("mean", 2, 2, 2)):
        yield Case(f"patch_pool {name} fwd", SHAPE, "bfloat16", pool_forward(own, name, code, forward), wide + narrow)
        min_bytes = wide + narrow + (wide + narrow if name == "max" else 0)
        yield Case(f"patch_pool {name} bwd", SHAPE, "bfloat16", pool_backward(own, name, code, backward), min_bytes)
    for kind, ids, offsets in (
        ("patch", own.patch_ids, own.offsets),
        ("decode", own.decode_ids, own.decode_offsets),
    ):
        min_bytes = wide + narrow + BYTES * 4
        yield Case(f"patch_unpool {kind} fwd", SHAPE, "bfloat16", [unpool_forward(own, ids)], min_bytes)
        yield Case(f"patch_unpool {kind} bwd", SHAPE, "bfloat16", unpool_backward(own, ids, offsets), min_bytes)
