"""Models the Triton kernels of block_causal_attention from their loops: products, the rest, and how they overlap.

A tile of a kernel is one iteration of its main loop, which is a loop with tensor core instructions whose loads are
asynchronous (the other loops are for scores that overflow, and never run here). Instructions on every path through the
loop are counted for every tile, the others for tiles that are masked; where tiles at edges have loops of their own, the
shortest loop is that of full tiles. Trip counts follow from documents, window and tile sizes.

Assumptions
- A product takes its flops at the measured rate of the tensor cores, or the time to read its operands from shared
  memory, 128 bytes a cycle. A wait behind each product costs `DRAIN_CYCLES`, in which its warpgroup does nothing.
- Of the shorter of products and everything else, `OVERLAP` is hidden: a quarter where two warpgroups share a program,
  whose barriers keep them together, half where programs share a multiprocessor. Triton's own attention, which is built
  alike, reaches some 450 to 500 TFLOP/s on an H100 so.
- K and V come from L2, once for each program; programs are spread evenly, the longest first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cuda_model.gpus import Gpu, pipe_cycles, resident_blocks, together
from cuda_model.run import ModelError
from cuda_model.sass import Instruction, Loop, every_loop, loops, straight, unconditional

DRAIN_CYCLES = 32
OVERLAP = {"warpgroups": 0.25, "programs": 0.5, "none": 0.0}
TENSOR = ("HGMMA", "HMMA")
HMMA_FLOPS = 2 * 16 * 8 * 16
EDIT = "edit main_loops in tests/cuda_model/attention.py"


@dataclass
class TritonKernel:
    """Describes a compiled kernel: its instructions and what a program takes."""

    name: str
    instructions: list[Instruction]
    registers: int
    shared: int
    warps: int
    block_m: int
    block_n: int
    stages: int

    @property
    def of_keys(self) -> bool:
        """Return whether a program owns keys and streams queries, as in bwd_dkdv only."""
        return self.name == "bwd_dkdv"

    @property
    def owned(self) -> int:
        """Return the number of queries or keys that a program owns."""
        return self.block_n if self.of_keys else self.block_m

    @property
    def streamed(self) -> int:
        """Return the number of queries or keys of the other side in a tile."""
        return self.block_m if self.of_keys else self.block_n


@dataclass(frozen=True)
class Documents:
    """Describes documents by their lengths, and a window or none."""

    lengths: Sequence[int]
    window: int | None = None

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        """Return the number of (query, key) pairs."""
        return sum(sum(min(i + 1, self.window or n) for i in range(n)) for n in self.lengths)

    def ranges(self, of_keys: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows [first, last) of the other side for every row."""
        first, last, begin = [], [], 0
        for n in self.lengths:
            row, reach = np.arange(n), self.window or n
            if of_keys:
                first.append(begin + row)
                last.append(begin + np.minimum(n, row + reach))
            else:
                first.append(begin + np.maximum(0, row + 1 - reach))
                last.append(begin + row + 1)
            begin += n
        return np.concatenate(first), np.concatenate(last)


def tiles(documents: Documents, of_keys: bool, block_m: int, block_n: int) -> tuple[list[int], int]:
    """Return the tiles of BLOCK_N rows that each program of BLOCK_M rows streams, and how many have no masked pair."""
    first, last = documents.ranges(of_keys)
    counts, full = [], 0
    for start in range(0, len(first), block_m):
        low, high = first[start : start + block_m], last[start : start + block_m]
        begin, count = int(low.min()), math.ceil((int(high.max()) - int(low.min())) / block_n)
        counts.append(count)
        at = begin + np.arange(count) * block_n
        full += int(((at >= low.max()) & (at + block_n <= high.min())).sum())
    return counts, full


def main_loops(kernel: TritonKernel) -> list[Loop]:
    """Return the loops that tiles pass through, the shortest first."""

    def has(loop: Loop, *opcodes: str) -> bool:
        return any(kernel.instructions[n].opcode in opcodes for n in loop.own())

    found = [loop for loop in every_loop(loops(kernel.instructions)) if has(loop, *TENSOR)]
    found = [loop for loop in found if not has(loop, "LDG")] or found
    if not found:
        raise ModelError(f"{kernel.name} has no loop with tensor core instructions: {EDIT}")
    return sorted(found, key=lambda loop: len(loop.own()))


@dataclass
class Body:
    """Counts the instructions of a warp in one iteration."""

    issued: Counter
    stalls: int
    flops: float  # counts those of its warpgroup, or of the warp where instructions are HMMA
    operand_bytes: float
    waits: int
    copied: int

    @classmethod
    def of(cls, instructions: Sequence[Instruction]) -> Body:
        products = [i for i in instructions if i.opcode in TENSOR]
        waits = sum(i.name.startswith("WARPGROUP.DEPBAR") for i in instructions)
        return cls(
            Counter(i.opcode for i in instructions if i.opcode != "HGMMA"),
            sum(max(i.stall, 1) for i in instructions if i.opcode != "HGMMA"),
            sum(product_flops(i) for i in products),
            sum(product_bytes(i) for i in products),
            waits,
            sum(16 for i in instructions if i.opcode == "LDGSTS") * 32,
        )


def _shape(i: Instruction) -> tuple[int, int, int]:
    m, n, k = (int(x) for x in i.modifiers[0].split("x"))
    return m, n, k


def product_flops(i: Instruction) -> float:
    """Return the flops of a product."""
    return 2 * math.prod(_shape(i)) if i.opcode == "HGMMA" else HMMA_FLOPS


def product_bytes(i: Instruction) -> float:
    """Return the bytes of shared memory that a product reads: B, and A unless it is in registers."""
    if i.opcode != "HGMMA":
        return 0
    m, n, k = _shape(i)
    in_registers = i.operands[1].kind == "reg"
    return 2 * k * (n + (0 if in_registers else m))


def iteration(kernel: TritonKernel, body: Body, resident: int, gpu: Gpu) -> dict[str, float]:
    """Return cycles of an iteration of all programs on a multiprocessor, by what they go to, and all together."""
    groups = kernel.warps / 4
    products = kernel.warps if "HMMA" in body.issued else groups
    peak = gpu.flops / gpu.processors / gpu.clock
    tensor = resident * products * max(body.flops / peak, body.operand_bytes / 128)
    warps = resident * kernel.warps
    issued = Counter({opcode: n * warps for opcode, n in body.issued.items()})
    busy = {name: n for name, n in pipe_cycles(issued).items() if name != "none"}
    serial = body.stalls + body.waits * DRAIN_CYCLES
    other = max(sum(issued.values()) / 4, serial, *busy.values())
    kind = "programs" if resident > 1 else "warpgroups" if groups > 1 else "none"
    return {
        "tensor": tensor, "other": other, "special": busy.get("special", 0.0),
        "both": max(tensor, other) + (1 - OVERLAP[kind]) * min(tensor, other),
    }  # fmt: skip


def estimate(
    kernel: TritonKernel, documents: Documents, heads: int, kv_heads: int, width: int, gpu: Gpu
) -> dict[str, float]:
    """Return the seconds of a kernel in terms, with `seconds`, and what they are from.

    A program of bwd_dkdv owns keys of one key head, and takes the tiles of all query heads that read it.
    """
    resident = resident_blocks(kernel.warps * 32, kernel.registers, kernel.shared)
    if resident < 1:
        raise ModelError(f"{kernel.name} does not fit on a multiprocessor")
    own = main_loops(kernel)
    certain = [unconditional(kernel.instructions, loop) for loop in own]
    full_body = Body.of([kernel.instructions[n] for n in sorted(certain[0])])
    edge_loops = own[1:] or own
    counts, full = tiles(documents, kernel.of_keys, kernel.owned, kernel.streamed)
    programs, total = len(counts) * (kv_heads if kernel.of_keys else heads), sum(counts) * heads
    full_share = full * heads / total
    edges = [Body.of([kernel.instructions[n] for n in sorted(loop.own())]) for loop in edge_loops]

    def mean_cycles(programs_beside: int) -> dict[str, float]:
        """Return the mean cycles of a tile, for so many programs on a multiprocessor."""
        of_full = iteration(kernel, full_body, programs_beside, gpu)
        of_edges = [iteration(kernel, body, programs_beside, gpu) for body in edges]
        edge = {name: sum(c[name] for c in of_edges) / len(of_edges) for name in of_full}
        return {name: full_share * of_full[name] + (1 - full_share) * edge[name] for name in edge}

    cycles, alone = mean_cycles(resident), mean_cycles(1)["both"]
    slots = gpu.processors * resident
    # Around the loop a program waits for the range of keys, then for its rows, then for the first tile.
    # So a multiprocessor needs the time of its tiles, or that of one program after the other in each of its places.
    outside = sum(max(kernel.instructions[n].stall, 1) for n in straight(kernel.instructions))
    around = 3 * gpu.dram_seconds * gpu.clock + outside
    work = total * cycles["both"] / resident / gpu.processors
    chain = (total * alone + programs * around) / slots
    # The longest programs come first, so the last to end are short, and at most half a program's length is idle.
    longest = max(counts) * total / sum(counts) * len(counts) / programs
    busy = max(work, chain) + (0.5 * longest * cycles["both"] / resident if programs > slots else 0.0)
    shared = 2 * kernel.streamed * width * 2
    terms = {"loop": busy / gpu.clock, "L2": total * shared / gpu.l2}
    own_flops = full_body.flops * (kernel.warps if "HMMA" in full_body.issued else kernel.warps / 4)
    return {
        **terms,
        "seconds": together(terms),
        "tensor": cycles["tensor"] / cycles["both"],
        "other": cycles["other"] / cycles["both"],
        "tile_flops": own_flops,
        "instructions": sum(full_body.issued.values()) * kernel.warps,
        "resident_warps": resident * kernel.warps,
        "waits": full_body.waits,
        "tiles": total,
        "full": full_share,
    }


def estimate_decode(
    kernel: TritonKernel, used: Sequence[int], kv_heads: int, splits: int, moved: float, gpu: Gpu
) -> dict[str, float]:
    """Do so for decode: a program owns one query, a key head and a part of the keys, and waits for memory."""
    resident = resident_blocks(kernel.warps * 32, kernel.registers, kernel.shared)
    loop = main_loops(kernel)[0]
    body = Body.of([kernel.instructions[n] for n in sorted(unconditional(kernel.instructions, loop))])
    counts = [math.ceil(n / splits / kernel.block_n) for n in used]
    programs, total = len(counts) * kv_heads * splits, sum(counts) * kv_heads * splits
    slots = gpu.processors * resident
    latency = gpu.dram_seconds * gpu.clock
    own = max(body.stalls, latency / max(kernel.stages - 1, 1))  # a tile takes so many cycles on an idle multiprocessor
    around = 3 * latency  # it waits for ranges, then for q, then for the first tiles
    terms = {
        "memory": moved / gpu.copy,
        "latency": max(max(counts) * own + around, (total * own + programs * around) / slots) / gpu.clock,
        "issue": total * iteration(kernel, body, 1, gpu)["other"] / gpu.processors / gpu.clock,
    }
    return {
        **terms,
        "seconds": together(terms),
        "instructions": sum(body.issued.values()) * kernel.warps * total,
        "resident_warps": resident * kernel.warps,
        "in_flight": min(resident, programs / gpu.processors) * moved / total * latency / own,
    }


def streaming(moved: float, trips: int, gpu: Gpu) -> float:
    """Return seconds of a small kernel that moves `moved` bytes and makes `trips` dependent trips to memory."""
    return together({"memory": moved / gpu.copy, "latency": trips * gpu.dram_seconds})
