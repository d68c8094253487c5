"""Launches of token_entropy, entropy_patch and linear_entropy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cuda_model.launches import (
    ALPHABET,
    BYTES,
    DOCUMENT,
    MANY_ROWS,
    NO_LIMIT,
    Array,
    Case,
    Launch,
    blocks_at,
    boolean,
    ceil_div,
    data,
    f32,
    i32,
    i64,
    layout,
)


def logit_rows(rows: int) -> list:
    return [Array("logits", rows * ALPHABET * 2), i64(rows), i64(ALPHABET), i32(ALPHABET)]


def token_entropy_fwd(rows: int) -> Launch:
    outputs = [Array("entropy", rows * 4), Array("log_sum", rows * 4)]
    blocks = ceil_div(rows, 32)
    return Launch(
        "token_entropy", r"token_entropy_fwd_kernel<__nv_bfloat16>", (blocks, 1), [logit_rows(rows), *outputs],
        blocks_at(blocks // 2, 2),
    )  # fmt: skip


def entropy_patch_launches(rows: int) -> list[Launch]:
    """Entropies, then the layout, whose blocks find the counts of all chunks before theirs ready.

    The sample is of four chunks, of one that is empty as the last one may be, and of four blocks that fill offsets.
    """
    own, stem = layout(rows), "entropy_patch"
    starts = np.zeros(rows, np.float32)
    starts[own.offsets[1:-1] - 1] = 3.0
    chunks, fillers, blocks = rows // 2048 + 1, ceil_div(rows + 1, 2048), ceil_div(rows, 32)
    published = np.zeros((chunks + chunks // 32 + chunks // 1024 + 1, 8), np.uint32)
    published[:, 5] = 1  # ready
    ticket = data("ticket", np.array([chunks - 5], np.int32), True)  # of the sample's first block
    scratch = [[data("published", published, True), ticket, i32(chunks)], None, i32(0)]
    count = len(own.cu_seqlens) - 1
    documents = [None, i64(count), i32(rows), i32(DOCUMENT)]  # of one length
    entropies = [logit_rows(rows), documents, scratch, Array("entropy", rows * 4), Array("log_sum", rows * 4)]
    rule = [data("entropy", starts, True), f32(1.335), f32(0), i32(0)]
    outputs = [
        Array("patch_offsets", (rows + 1) * 4), Array("cu_patches", (count + 1) * 4),
        Array("patch_ids", rows * 4), Array("decode_ids", rows * 4), Array("decode_offsets", (rows + 1) * 4),
        Array("overflowed", 1), Array("cu_seqlens", (count + 1) * 4), i64(rows),
    ]  # fmt: skip
    return [
        Launch(stem, r"entropy_patch_fwd_kernel<__nv_bfloat16>", (blocks, 1), entropies, blocks_at(blocks // 2, 2)),
        Launch(stem, r"patch_layout_kernel<blt::EntropyRule<float>", (chunks + fillers, 1),
               [rule, documents, i32(NO_LIMIT), scratch, outputs], blocks_at(0, 9),
               shares=(*[(chunks - 1) / 4] * 4, 1.0, *[fillers / 4] * 4)),
    ]  # fmt: skip


def entropy_cases() -> Iterator[Case]:
    for rows in (BYTES, MANY_ROWS):
        read, written = rows * ALPHABET * 2, rows * 8
        shape, bench = f"[{rows}, {ALPHABET}]", f"[{rows // DOCUMENT}, {DOCUMENT}, {ALPHABET}]"
        yield Case("token_entropy fwd", shape, "bfloat16", [token_entropy_fwd(rows)], read + written, bench)
        slopes = [Array("grad_entropy", rows * 4), logit_rows(rows), Array("entropy", rows * 4),
                  Array("log_sum", rows * 4), Array("grad_logits", rows * ALPHABET * 2)]  # fmt: skip
        blocks = ceil_div(rows, 32)
        backward = Launch(
            "token_entropy", r"token_entropy_bwd_kernel<__nv_bfloat16, .*true", (blocks, 1), slopes,
            blocks_at(blocks // 2, 2),
        )  # fmt: skip
        yield Case("token_entropy bwd", shape, "bfloat16", [backward], 2 * read + 12 * rows, bench)
        launches, layouts = entropy_patch_launches(rows), 16 * rows
        yield Case("entropy_patch fwd", shape, "bfloat16", launches, read + written + layouts, bench)


HIDDEN, PANEL_ROWS, SPLIT_ROWS, TILE_ROWS, TILE_COLUMNS = 768, 16384, 512, 64, 88


def matrix(name: str, rows: int, depth: int, row_stride: int, depth_stride: int, size: int = 2) -> list:
    length = (rows - 1) * row_stride + (depth - 1) * depth_stride + 1
    resident = name != "hidden"
    return [Array(name, length * size, None, resident), i64(rows), i64(depth), i64(row_stride), i64(depth_stride)]


def linear_entropy_cases() -> Iterator[Case]:
    stem, shape = "linear_entropy", f"[{BYTES}, {HIDDEN}] x [{ALPHABET}, {HIDDEN}]"
    weight = matrix("weight", ALPHABET, HIDDEN, HIDDEN, 1)
    bias = Array("bias", ALPHABET * 2, None, True)
    entropy, log_sum = Array("entropy", BYTES * 4), Array("log_sum", BYTES * 4)
    forward = Launch(
        stem, r"linear_entropy_fwd_kernel<__nv_bfloat16, 8>", (BYTES // TILE_ROWS, 1),
        [matrix("hidden", BYTES, HIDDEN, HIDDEN, 1), weight, bias, entropy, log_sum], [(100, 0)],
    )  # fmt: skip
    flops, min_bytes = 2.0 * BYTES * HIDDEN * ALPHABET, BYTES * (HIDDEN * 2 + 8)
    yield Case("linear_entropy fwd", shape, "bfloat16", [forward], min_bytes, shape, flops)
    panels, splits, rows = BYTES // PANEL_ROWS, PANEL_ROWS // SPLIT_ROWS, PANEL_ROWS
    columns, size = ceil_div(HIDDEN, TILE_COLUMNS), ALPHABET * HIDDEN
    panel = matrix("hidden", rows, HIDDEN, HIDDEN, 1)
    grads = Array("grads", rows * ALPHABET * 2, None, True)
    parts = Array("parts", splits * size * 4, None, True)
    bias_parts = Array("bias_parts", splits * ALPHABET * 4, None, True)
    of_rows = [grads, i64(rows), i64(ALPHABET), i64(ALPHABET), i64(1)]
    of_columns = [grads, i64(ALPHABET), i64(rows), i64(1), i64(ALPHABET)]
    weight_columns = matrix("weight", HIDDEN, ALPHABET, 1, HIDDEN)
    hidden_columns = matrix("hidden", HIDDEN, rows, 1, HIDDEN)

    def add(name: str, count: int, source: Array) -> Launch:
        total, out = Array("total", count * 4, None, True), Array("out", count * 2, None, True)
        arguments = [source, i64(splits), i64(count), boolean(False), boolean(False), total, out]
        return Launch(
            stem, r"add_splits_kernel<__nv_bfloat16>", (ceil_div(count, 256), 1), arguments, [(0, 0)], 0, panels
        )

    launches = [
        Launch(stem, r"linear_entropy_logits_kernel<__nv_bfloat16, 8>", (rows // TILE_ROWS, 1),
               [panel, weight, bias, Array("grad_entropy", rows * 4), Array("entropy", rows * 4),
                Array("log_sum", rows * 4), Array("logits", rows * ALPHABET * 4, None, True), grads],
               [(100, 0)], 0, panels),
        Launch(stem, r"product_kernel<__nv_bfloat16, __nv_bfloat16>", (rows // TILE_ROWS * columns, 1),
               [of_rows, weight_columns, i64(ALPHABET), i64(0), Array("grad_hidden", rows * HIDDEN * 2)], [(100, 0)], 0,
               panels),
        Launch(stem, r"product_kernel<__nv_bfloat16, float>", (ceil_div(ALPHABET, TILE_ROWS) * columns, splits),
               [of_columns, hidden_columns, i64(SPLIT_ROWS), i64(size), parts], [(12, 3)], 0, panels),
        Launch(stem, r"column_sums_kernel<__nv_bfloat16>", (ceil_div(ALPHABET, 256), splits),
               [grads, i64(rows), i64(ALPHABET), bias_parts], [(0, 3)], 0, panels),
        add("weight", size, parts),
        add("bias", ALPHABET, bias_parts),
    ]  # fmt: skip
    min_bytes = BYTES * (2 * HIDDEN * 2 + 12) + 2 * size * 2
    yield Case("linear_entropy bwd", shape, "bfloat16", launches, min_bytes, "", 3 * flops)
