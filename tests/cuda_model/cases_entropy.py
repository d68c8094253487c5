"""Launches of token_entropy, entropy_patch, linear_entropy and linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    Library,
    blocks_at,
    ceil_div,
    data,
    f32,
    i32,
    i64,
    layout,
    product,
)


def logit_rows(rows: int, stride: int = ALPHABET, resident: bool = False) -> list:
    return [Array("logits", rows * stride * 2, None, resident), i64(rows), i64(stride), i32(ALPHABET)]


def token_entropy_fwd(rows: int, logits: list, times: int = 1) -> Launch:
    outputs = [Array("entropy", rows * 4), Array("log_sum", rows * 4)]
    blocks = ceil_div(rows, 32)
    return Launch(
        "token_entropy", r"token_entropy_fwd_kernel<__nv_bfloat16>", (blocks, 1), [logits, *outputs],
        blocks_at(blocks // 2, 2), 0, times,
    )  # fmt: skip


def token_entropy_bwd(rows: int, logits: list, grad_logits: Array, stride: int, times: int = 1) -> Launch:
    slopes = [Array("grad_entropy", rows * 4), logits, Array("entropy", rows * 4), Array("log_sum", rows * 4),
              grad_logits, i64(stride)]  # fmt: skip
    blocks = ceil_div(rows, 32)
    return Launch(
        "token_entropy", r"token_entropy_bwd_kernel<__nv_bfloat16, .*true", (blocks, 1), slopes,
        blocks_at(blocks // 2, 2), 0, times,
    )  # fmt: skip


def targets_of(rows: int) -> list:
    return [data("targets", np.arange(rows) % ALPHABET), i64(-100)]


def linear_cross_entropy_fwd(rows: int, logits: list, times: int = 1) -> Launch:
    arguments = [logits, *targets_of(rows), Array("loss", rows * 4), Array("log_sum", rows * 4)]
    blocks = ceil_div(rows, 32)
    return Launch(
        "linear_cross_entropy", r"linear_cross_entropy_fwd_kernel<__nv_bfloat16>", (blocks, 1), arguments,
        blocks_at(blocks // 2, 2), 0, times,
    )  # fmt: skip


def linear_cross_entropy_bwd(rows: int, logits: list, grad_logits: Array, _stride: int, times: int = 1) -> Launch:
    arguments = [
        Array("grad_loss", rows * 4), logits, *targets_of(rows), Array("log_sum", rows * 4), grad_logits
    ]  # fmt: skip
    blocks = ceil_div(rows, 32)
    return Launch(
        "linear_cross_entropy", r"linear_cross_entropy_bwd_kernel<__nv_bfloat16>", (blocks, 1), arguments,
        blocks_at(blocks // 2, 2), 0, times,
    )  # fmt: skip


def entropy_patch_launches(rows: int) -> list[Launch]:
    """Return entropies, then the layout, whose blocks find the counts of all chunks before theirs ready.

    The sample is of four chunks, of one that is empty as the last one may be, and of four blocks that fill offsets.
    """
    own, stem = layout(rows), "entropy_patch"
    starts = np.zeros(rows, np.float32)
    starts[own.offsets[1:-1] - 1] = 3.0
    chunks, fillers, blocks = rows // 2048 + 1, ceil_div(rows + 1, 2048), ceil_div(rows, 32)
    published = np.zeros((chunks + chunks // 32 + chunks // 1024 + 1, 8), np.uint32)
    published[:, 5] = 1  # they are ready
    ticket = data("ticket", np.array([chunks - 5], np.int32), True)  # the sample's first block takes it
    scratch = [[data("published", published, True), ticket, i32(chunks)], None, i32(0)]
    count = len(own.cu_seqlens) - 1
    documents = [None, i64(count), i32(rows), i32(DOCUMENT)]  # they have one length
    entropies = [logit_rows(rows), documents, scratch, Array("entropy", rows * 4), Array("log_sum", rows * 4)]
    rule = [data("entropy", starts, True), f32(1.335), f32(0), i32(0), i32(0)]
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
        forward = token_entropy_fwd(rows, logit_rows(rows))
        yield Case("token_entropy fwd", shape, "bfloat16", [forward], read + written, bench)
        backward = token_entropy_bwd(rows, logit_rows(rows), Array("grad_logits", read), ALPHABET)
        yield Case("token_entropy bwd", shape, "bfloat16", [backward], 2 * read + 12 * rows, bench)
        launches, layouts = entropy_patch_launches(rows), 16 * rows
        yield Case("entropy_patch fwd", shape, "bfloat16", launches, read + written + layouts, bench)


HIDDEN, PANEL_ROWS, PANEL_STRIDE = 768, 15872, 264


def head_cases() -> Iterator[Case]:
    """Yield the ops of an output head, and the bytes of its targets and values that they read and write a row."""
    yield from cases_of_head("linear_entropy", token_entropy_fwd, token_entropy_bwd, 8, 12)
    yield from cases_of_head("linear_cross_entropy", linear_cross_entropy_fwd, linear_cross_entropy_bwd, 16, 16)


def cases_of_head(
    op: str, fwd: Callable[..., Launch], bwd: Callable[..., Launch], fwd_bytes: int, bwd_bytes: int
) -> Iterator[Case]:
    """Yield panels of logits in L2, which torch's products write and read."""
    shape = f"[{BYTES}, {HIDDEN}] x [{ALPHABET}, {HIDDEN}]"
    flops, weight = 2.0 * BYTES * HIDDEN * ALPHABET, 2 * ALPHABET * HIDDEN
    forward: list[Launch | Library] = []
    backward: list[Launch | Library] = []
    for rows, times in ((PANEL_ROWS, BYTES // PANEL_ROWS), (BYTES % PANEL_ROWS, 1)):
        logits, hidden = logit_rows(rows, PANEL_STRIDE, resident=True), 2.0 * rows * HIDDEN
        head = product("linear", rows, ALPHABET, HIDDEN, hidden, times)
        forward += [head, fwd(rows, logits, times)]
        backward += [
            head,
            bwd(rows, logits, logits[0], PANEL_STRIDE, times),
            product("mm", rows, HIDDEN, ALPHABET, hidden, times),
            product("mm", ALPHABET, HIDDEN, rows, hidden, times),
            Library(f"sum [{rows}, {ALPHABET}]", 0.0, 2.0 * rows * ALPHABET, times=times),
        ]
    panels = ceil_div(BYTES, PANEL_ROWS)
    backward += [Library(f"subtract [{n}]", 0.0, 10.0 * n, times=panels) for n in (ALPHABET * HIDDEN, ALPHABET)]
    yield Case(f"{op} fwd", shape, "bfloat16", forward, BYTES * (HIDDEN * 2 + fwd_bytes), shape, flops)
    min_bytes = BYTES * (2 * HIDDEN * 2 + bwd_bytes) + 2 * weight
    yield Case(f"{op} bwd", shape, "bfloat16", backward, min_bytes, "", 3 * flops)
