"""Launches of patch_cross_attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cuda_model.launches import (
    BYTES,
    HEAD,
    HEADS,
    PATCHES_A_PERIOD,
    QUERIES,
    WIDTH,
    Array,
    Case,
    Launch,
    Scalar,
    boolean,
    ceil_div,
    data,
    f32,
    i32,
    i64,
    layout,
)

RUN, PART = 4, 64  # a warp has RUN units, a part of a long patch PART bytes
THREADS, RING = 128, 8 << 10  # a block has so many threads; so many bytes of rows are on their way to a warp
NUMBERS = 32 * 4  # a row of one number a lane has so many bytes
SPLIT = r"blt::Split<__nv_bfloat16, 8, 1, 8>"
HEADS_A_WARP = 4


def head_rows(name: str, rows: int) -> list:
    return [Array(name, rows * WIDTH * 2), i64(HEAD), Scalar("I", WIDTH * 2)]


@dataclass(frozen=True)
class Direction:
    """Describes one direction at the shape of BASELINES.md."""

    encode: bool

    @property
    def parts(self) -> int:
        return BYTES // PART

    @property
    def queries(self) -> int:
        return layout().patches * QUERIES if self.encode else BYTES

    @property
    def keys(self) -> int:
        return BYTES if self.encode else layout().patches * QUERIES

    def problem(self) -> list:
        rows = [head_rows("q", self.queries), head_rows("k", self.keys), head_rows("v", self.keys)]
        return [*rows, i32(HEADS), i32(HEADS), i32(1), i32(HEAD), f32(HEAD**-0.5)]

    def readers(self) -> list:
        own = layout()
        offsets, ids = (own.offsets, own.patch_ids) if self.encode else (own.decode_offsets, own.decode_ids)
        arrays = [data("offsets", offsets), data("cu_patches", own.cu_patches, True), data("ids", ids)]
        sizes = [own.patches, len(own.cu_patches) - 1, BYTES, QUERIES, 1, self.parts, PART.bit_length() - 1]
        return [*arrays, *(i32(n) for n in sizes), boolean(self.encode)]

    def part_sums(self, needed: bool) -> list:
        """Return sums of units of divided patches, of which there are none here."""
        rows = 2 * self.parts * QUERIES * HEADS if needed else 0
        memory = [Array("part sums", rows * n * 4, None, True) if needed else None for n in (2, HEAD)]
        return [*memory, i32(1), i32(QUERIES), i32(HEADS)]

    def launch(self, kernel: str, ring: int, results: list) -> Launch:
        """A block has 4 units for each of its warps, in four heads: 32 patches are a period. Blocks of parts leave."""
        units, groups = layout().patches + self.parts, HEADS // HEADS_A_WARP
        own = THREADS // 32 * RUN
        blocks, first = ceil_div(units, own), layout().patches // 2 // PATCHES_A_PERIOD * PATCHES_A_PERIOD // own
        patches = PATCHES_A_PERIOD // own
        sample = [(n * groups, 0) for n in (*range(first, first + patches), blocks - 2)]
        shares = (*[layout().patches / own / patches] * patches, self.parts / own)
        arguments = [self.problem(), self.readers(), results]
        shared = THREADS // 32 * ring
        return Launch(
            "patch_cross_attention", kernel, (blocks * groups, 1), arguments, sample, shared, shares=shares,
            threads=THREADS,
        )  # fmt: skip

    def sums(self, softmax: bool) -> Launch:
        kernel = rf"patch_cross_attention_sum_kernel<__nv_bfloat16, (\(bool\))?{'(true|1)' if softmax else '(false|0)'}"
        to = [Array("to", self.queries * WIDTH * 2), Array("lse", self.queries * HEADS * 4), i32(HEAD)]
        blocks, arguments = ceil_div(self.parts, 32), [self.readers(), self.part_sums(True), *to]
        shared = 8 * 4 + 8 * 256 * 4
        return Launch("patch_cross_attention", kernel, (blocks, HEADS), arguments, [(blocks // 2, 3)], shared=shared)

    def forward(self) -> list[Launch]:
        output = [head_rows("out", self.queries), Array("lse", self.queries * HEADS * 4), self.part_sums(self.encode)]
        held = "queries" if self.encode else "keys"
        kernel = self.launch(rf"patch_cross_attention_fwd_{held}_kernel<{SPLIT}", RING + NUMBERS, output)
        return [kernel, self.sums(True)] if self.encode else [kernel]

    def backward(self) -> list[Launch]:
        inputs = [head_rows("grad_out", self.queries), head_rows("out", self.queries)]
        inputs += [Array("lse", self.queries * HEADS * 4), None]
        outputs = [head_rows("grad_q", self.queries), head_rows("grad_k", self.keys), head_rows("grad_v", self.keys)]
        sums = [self.part_sums(needed) for needed in (self.encode, not self.encode, not self.encode)]
        held = "queries" if self.encode else "keys"
        ring = 2 * RING + NUMBERS if self.encode else RING + 8 * NUMBERS
        kernel = self.launch(rf"patch_cross_attention_bwd_{held}_kernel<{SPLIT}", ring, [*inputs, *outputs, *sums])
        return [kernel, *[self.sums(False)] * (1 if self.encode else 2)]


def cross_cases() -> Iterator[Case]:
    shape = f"[{BYTES}, {HEADS}, {HEAD}], {QUERIES} vectors a patch of 4.5 bytes"
    for direction in (Direction(True), Direction(False)):
        name, row = "encode" if direction.encode else "decode", WIDTH * 2
        lse = direction.queries * HEADS * 4
        rows = 2 * (direction.queries + direction.keys)
        yield Case(f"patch_cross_attention {name} fwd", shape, "bfloat16", direction.forward(), rows * row + lse)
        rows = 3 * direction.queries + 4 * direction.keys
        yield Case(f"patch_cross_attention {name} bwd", shape, "bfloat16", direction.backward(), rows * row + lse)
