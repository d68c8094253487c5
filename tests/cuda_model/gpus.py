"""Estimate the time of a kernel from its counts and from the rates of a GPU.

Where the numbers are from

- copy, flops: measured on an H200 by others, 4.3 TB/s and 790 TFLOP/s (BASELINES.md); on an H100 3.0 and 798.
- 132 multiprocessors, 4 schedulers each that issue one warp instruction a cycle; 64 warps, 32 blocks, 65536 registers
  and 228 KB of shared memory, 1 KB a block for the system: CUDA programming guide, compute capability 9.0.
- lanes a cycle and multiprocessor: the guide's table of arithmetic throughput. fp32 128; 32-bit integers, shifts,
  logic, comparisons and conversions 64; special functions and population count 16; shuffles and shared memory 32.
- clock: 1.755 GHz, what an H100 SXM holds under a load that is not the tensor cores'.
- L2: 5.5 TB/s; latency of device memory 700 ns, of L2 270 ns, both under load.
- launch: 1.5 us from the end of a kernel to the first instruction of the next one, in a CUDA graph.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cuda_model.simulate import Counts

REGISTERS, WARPS, BLOCKS, SCHEDULERS = 65536, 64, 32, 4
SHARED, SYSTEM_SHARED = 228 << 10, 1 << 10
POWER = 4.0
"""Terms are combined to (sum of term^4)^(1/4). Two equal ones cost 1.19 times as much as one."""


@dataclass(frozen=True)
class Gpu:
    """Describes a GPU in bytes/s, flop/s, Hz and seconds."""

    name: str
    copy: float
    flops: float
    processors: int = 132
    clock: float = 1.755e9
    l2: float = 5.5e12
    dram_seconds: float = 700e-9
    l2_seconds: float = 270e-9
    launch_seconds: float = 1.5e-6


GPUS = (Gpu("H100", copy=3.0e12, flops=798e12), Gpu("H200", copy=4.3e12, flops=790e12))

# A pipe issues so many warp instructions a cycle and multiprocessor. Unlisted opcodes go to the integer pipe.
PIPES = {"fp32": 4.0, "multiply": 2.0, "integer": 2.0, "special": 0.5, "load/store": 1.0, "uniform": 4.0,
         "none": 1e9}  # fmt: skip
_PIPE = (
    dict.fromkeys(("FFMA", "FADD", "FMUL", "HADD2", "HMUL2", "HFMA2"), "fp32")
    | dict.fromkeys(("IMAD",), "multiply")
    | dict.fromkeys(("MUFU", "POPC", "FLO", "BREV", "I2F", "F2I", "F2F", "FCHK", "MATCH", "S2R"), "special")
    | dict.fromkeys(("LDG", "STG", "LDS", "STS", "ATOMS", "SHFL", "LDSM", "LDGSTS", "STSM", "LDC"), "load/store")
    | dict.fromkeys(
        ("BRA", "BSSY", "BSYNC", "EXIT", "NOP", "CALL", "RET", "BAR", "WARPSYNC", "BREAK", "DEPBAR", "LDGDEPBAR"),
        "none",
    )
)


def pipe_of(opcode: str) -> str:
    """Return the pipe that executes an opcode."""
    uniform = (opcode.startswith("U") and opcode not in ("UNDEF",)) or opcode in ("S2UR", "R2UR")
    return _PIPE.get(opcode, "uniform" if uniform else "integer")


def pipe_cycles(issued: Counter) -> dict[str, float]:
    """Return cycles of a multiprocessor that each pipe is busy with warp instructions."""
    cycles: dict[str, float] = {}
    for opcode, count in issued.items():
        pipe = pipe_of(opcode)
        cycles[pipe] = cycles.get(pipe, 0.0) + count / PIPES[pipe]
    return cycles


def resident_blocks(threads: int, registers: int, shared: int) -> int:
    """Return blocks that a multiprocessor holds at a time; `shared` is static and dynamic together."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32) // warps
    by_shared = SHARED // (-(-(shared + SYSTEM_SHARED) // 128) * 128)
    return min(by_registers, WARPS // warps, BLOCKS, by_shared)


def bytes_needed(gpu: Gpu) -> float:
    """Return the bytes in flight that keep memory busy on a multiprocessor, by Little's law."""
    return gpu.copy * gpu.dram_seconds / gpu.processors


def bytes_in_flight(loaded: float, cycles: float, resident: int, gpu: Gpu) -> float:
    """Return bytes in flight: each is for the latency of memory, and a block of `loaded` bytes takes `cycles`."""
    return resident * loaded * gpu.dram_seconds * gpu.clock / cycles


def together(terms: dict[str, float]) -> float:
    """Return the time that overlapping terms take, see `POWER`."""
    return sum(t**POWER for t in terms.values()) ** (1 / POWER)


@dataclass
class Estimate:
    """Describes a launch on a GPU: seconds in terms, and what they are from."""

    terms: dict[str, float]
    moved: float
    instructions: float
    resident_warps: int
    in_flight: float
    trips: float

    @property
    def seconds(self) -> float:
        """Return the time without the launch."""
        return together(self.terms)

    @property
    def limit(self) -> str:
        """Return the term that takes longest."""
        return max(self.terms, key=self.terms.__getitem__)


def estimate(
    gpu: Gpu, counts: Counts, blocks: int, threads: int, registers: int, shared: int, sizes: dict[str, int],
    resident_arrays: set[str],
) -> Estimate:  # fmt: skip
    """Estimate a launch of `blocks` blocks from the counts of some of them.

    `sizes` are the most bytes of each array that come from memory, however its sectors are shared among blocks.
    """
    scale = blocks / counts.blocks
    resident = resident_blocks(threads, registers, shared)
    if resident < 1:
        raise ValueError(f"a block of {threads} threads, {registers} registers, {shared} bytes does not fit")

    def moved_of(of: Counter) -> float:
        return sum(min(n * scale, sizes[name] + 32) for name, n in of.items() if name not in resident_arrays)

    loaded, moved = moved_of(counts.loaded), moved_of(counts.loaded) + moved_of(counts.stored)
    cycles = counts.block_cycles / counts.blocks
    per_second = gpu.processors * gpu.clock
    terms = {
        "memory": moved / gpu.copy,
        "L2": counts.l2_bytes * scale / gpu.l2,
        "issue": counts.instructions * scale / SCHEDULERS / per_second,
        "latency": max(blocks / (gpu.processors * resident), 1.0) * cycles / gpu.clock,
    }
    busy = pipe_cycles(counts.issued)
    # Memory accesses take the passes that they are made of.
    accesses = sum(n for o, n in counts.issued.items() if o in ("LDG", "LDGSTS", "STG", "LDS", "STS", "ATOMS"))
    busy["load/store"] = busy.get("load/store", 0.0) - accesses + counts.wavefronts
    terms |= {name: n * scale / per_second for name, n in busy.items() if name != "none"}
    return Estimate(
        terms,
        moved,
        counts.instructions * scale,
        resident * -(-threads // 32),
        bytes_in_flight(loaded / blocks, cycles, min(resident, -(-blocks // gpu.processors)), gpu),
        counts.trips / counts.warps,
    )
