"""Blocks of a kernel executed from SASS: what they issue, what they move, and how long a block takes if it is alone.

Every lane has a program counter; the lanes at the smallest one go on, and BSYNC, WARPSYNC and BAR wait as they do on a
GPU. The time of a warp follows the stall counts and scoreboards in the code: a load answers after the latency of where
its sectors are, so loads in flight together cost one trip to memory, dependent ones one each. What warps of an SM cost
each other is not simulated; gpus.py adds it up from the counts here.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cuda_model.memory import (
    ANYTHING,
    Array,
    Memory,
    access_bytes,
    address_getter,
    bank_conflicts,
    register_bytes,
    write_registers,
)
from cuda_model.operands import LANES, U32, UNIFORM, UnknownInstructionError, full, number, predicate, row_of
from cuda_model.sass import NO_SCOREBOARD, Instruction
from cuda_model.semantics import compile_instruction

PARAMETERS = 0x210  # parameters begin here in constant bank 0 of sm_90
ADDRESSES = 4  # the compiler puts addresses of a module's variables into this constant bank
SECTOR = 32
MAX_INSTRUCTIONS = 1_000_000  # a block may execute so many
SHARED_BASE = 0x400  # the system has the first KB of shared memory

# A result can be read after so many cycles. For L1 and shared memory microbenchmarks of Hopper give 30 (Luo et al.,
# arXiv 2402.13499, table 3); gpus.py has L2, about 270 cycles, and device memory, about 700 ns. The rest is what ptxas
# leaves between dependent instructions of fixed latency, rounded up.
LATENCY = {"LDS": 30, "SHFL": 24, "MUFU": 24, "ATOMS": 60, "LDC": 40, "S2R": 25, "S2UR": 25, "MATCH": 30}
OTHER_LATENCY = 18
TRIP_CYCLES = 100  # a wait for a load that is longer counts as a trip to memory
L1_CYCLES, BARRIER_CYCLES, READ_CYCLES, BRANCH_CYCLES = 35, 20, 12, 8


@dataclass
class Counts:
    """Counts what some blocks did."""

    blocks: float = 0
    warps: float = 0
    issued: Counter = field(default_factory=Counter)  # counts warp instructions by opcode
    wavefronts: float = 0  # are passes of the load/store unit, of 128 bytes
    l2_bytes: float = 0
    loaded: Counter = field(default_factory=Counter)  # counts bytes of sectors at their first access, by array
    stored: Counter = field(default_factory=Counter)
    block_cycles: float = 0  # is a sum over blocks
    trips: float = 0  # is how often a warp waited for memory beyond L1

    @property
    def instructions(self) -> float:
        """Return the number of warp instructions."""
        return sum(self.issued.values())

    def add(self, other: Counts, share: float, weight: float) -> None:
        """Add what some warps of a block did, `weight` times but for its cycles, as of `share` blocks."""
        self.blocks += share
        self.block_cycles += other.block_cycles * share
        weight *= share
        for mine, more in ((self.issued, other.issued), (self.loaded, other.loaded), (self.stored, other.stored)):
            for name, count in more.items():
                mine[name] += count * weight
        self.wavefronts += other.wavefronts * weight
        self.l2_bytes += other.l2_bytes * weight
        self.trips += other.trips * weight
        self.warps += other.warps * weight


@dataclass
class Step:
    """Describes an instruction, what kind it is of, and how its guard and its address are read."""

    instruction: Instruction
    kind: str  # is control, memory, nothing or action
    guard: Callable[[Warp], np.ndarray] | None
    address: Callable[[Warp], np.ndarray] | None
    shared: Callable[[Warp], np.ndarray] | None = None  # is the address to which LDGSTS copies


class Kernel:
    """Describes instructions of a kernel, ready to be executed."""

    def __init__(self, instructions: list[Instruction]) -> None:
        self.instructions = instructions
        self.index = {i.address: n for n, i in enumerate(instructions)}
        self.steps = [self._step(i) for i in instructions]
        self.actions: dict[int, Callable] = {}

    def _step(self, i: Instruction) -> Step:
        kinds = (("control", _CONTROL), ("memory", _MEMORY), ("nothing", _NOTHING))
        kind = next((kind for kind, opcodes in kinds if i.opcode in opcodes), "action")
        places = [address_getter(o.text) for o in i.operands if o.kind == "mem"] if kind == "memory" else []
        shared, address = places if len(places) == 2 else (None, places[0] if places else None)
        return Step(i, kind, None if i.guard is None else predicate(i.guard), address, shared)

    def action(self, n: int) -> Callable:
        """Return the action of instruction n, which is compiled when it is first executed."""
        if n not in self.actions:
            self.actions[n] = compile_instruction(self.instructions[n])
        return self.actions[n]


class Warp:
    """Holds the state of a warp."""

    def __init__(self, block: Block, number_: int) -> None:
        self.block, self.number = block, number_
        self.regs = np.zeros((UNIFORM + 64, LANES), U32)
        self.preds = np.zeros((16, LANES), bool)
        self.preds[7] = self.preds[15] = True
        thread = number_ * LANES + np.arange(LANES)
        self.alive = thread < block.threads
        self.pc = np.zeros(LANES, int)
        self.waiting = np.zeros(LANES, bool)
        self.joins: dict[int, np.ndarray] = {}  # maps a barrier to lanes, by lane
        self.time = 0.0
        self.scoreboards = [0.0] * 6
        self.from_memory = [False] * 6
        self.copying, self.copies = 0.0, list[float]()  # are when the open group of copies and the others arrive
        self.thread = thread

    def constant(self, bank: int, offset: int) -> int:
        """Return four bytes of a constant bank."""
        return self.block.constant(bank, offset)

    def special(self, name: str) -> np.ndarray:
        """Return a special register."""
        known = {"SR_TID.X": self.thread, "SR_LANEID": np.arange(LANES), "SR_CTAID.X": self.block.x}
        known |= {"SR_CTAID.Y": self.block.y, "SR_CgaCtaId": 0, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.Z": 0}
        known |= {"SRZ": 0, "SR_LTMASK": (1 << np.arange(LANES)) - 1, "SR_EQMASK": 1 << np.arange(LANES)}
        known |= {"SR_LEMASK": (2 << np.arange(LANES)) - 1, "SR_NCTAID.X": self.block.grid[0]}
        if name not in known:
            raise UnknownInstructionError(f"S2R {name}")
        return np.broadcast_to(np.asarray(known[name], np.int64).astype(U32), (LANES,)).copy()


class Block:
    """Describes one block: its warps, or some that stand for all, run one after the other from barrier to barrier."""

    def __init__(self, run: Run, x: int, y: int) -> None:
        self.run, self.x, self.y, self.threads, self.grid = run, x, y, run.threads, run.grid
        self.shared = np.zeros(232 << 10, np.uint8)
        self.arrivals: dict[int, float] = {}  # maps a sector to the time when it is in L1
        every = range(-(-run.threads // LANES))
        self.warps = [Warp(self, n) for n in run.warps or every]
        self.weight = len(every) / len(self.warps)

    def constant(self, bank: int, offset: int) -> int:
        if bank == 0 and offset >= PARAMETERS:
            at = offset - PARAMETERS
            if at + 4 > len(self.run.parameters):
                raise IndexError(f"parameter byte {at} of {len(self.run.parameters)}")
            return struct.unpack_from("<I", self.run.parameters, at)[0]
        if bank == ADDRESSES:
            address = self.run.module + offset // 8 * 256
            return address >> (32 if offset % 8 else 0) & 0xFFFFFFFF
        known = {0x0: self.threads, 0x4: 1, 0x8: 1, 0xC: self.grid[0], 0x10: self.grid[1], 0x14: 1}
        return known.get(offset, 0) if bank == 0 else 0

    def execute(self) -> float:
        """Run all warps to their end, and return the cycles that this takes."""
        alive = list(self.warps)
        while alive:
            waiting = [warp for warp in alive if self.run.to_barrier(warp)]
            if waiting and self.weight != 1:
                raise RuntimeError("a kernel whose warps wait for each other cannot be executed in part")
            if waiting:
                time = max(warp.time for warp in waiting) + BARRIER_CYCLES
                for warp in waiting:
                    warp.time = time
            alive = waiting
        return max(warp.time for warp in self.warps)


class Run:
    """Describes some blocks of a launch, executed one after the other."""

    def __init__(
        self, kernel: Kernel, threads: int, grid: tuple[int, int], parameters: bytes, memory: Memory,
        l2_cycles: float, dram_cycles: float, warps: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.kernel, self.threads, self.grid, self.memory, self.warps = kernel, threads, grid, memory, warps
        self.parameters = parameters + bytes(-len(parameters) % 4)
        self.l2_cycles, self.dram_cycles = l2_cycles, dram_cycles
        self.module = memory.place(Array("module", 1 << 17, None, resident=True))
        self.counts = Counts()
        self.seen_loads: set[int] = set()
        self.seen_stores: set[int] = set()

    def blocks(self, which: list[tuple[int, int]], shares: tuple[float, ...] | None = None) -> Counts:
        """Execute these blocks, and return what they did; each as often as its share says, by default once."""
        total = Counts()
        with np.errstate(all="ignore"):
            for (x, y), share in zip(which, shares or [1.0] * len(which), strict=True):
                block, self.steps_left = Block(self, x, y), MAX_INSTRUCTIONS
                self.counts = Counts()
                self.counts.block_cycles, self.counts.warps = block.execute(), len(block.warps)
                total.add(self.counts, share, block.weight)
        return total

    # --- control flow ---

    def to_barrier(self, warp: Warp) -> bool:
        """Run a warp until all its lanes are at a block barrier (True) or have ended (False)."""
        steps, issued = self.kernel.steps, self.counts.issued
        while True:
            ready = warp.alive & ~warp.waiting
            if not ready.any():
                if not warp.alive.any():
                    return False
                raise RuntimeError("lanes wait for each other for ever")
            places = warp.pc[ready]
            n = int(places.min())
            lanes = ready & (warp.pc == n)
            stop = int(places[places > n].min()) if (places > n).any() else len(steps)  # the lanes join others here
            while n < stop:
                step = steps[n]
                i = step.instruction
                self._issue(warp, i)
                issued[i.opcode] += 1
                mask = lanes if step.guard is None else lanes & step.guard(warp)
                if step.kind == "control":
                    break
                if step.kind == "memory":
                    if mask.any():
                        try:
                            self._access(warp, step, mask)
                        except IndexError as error:
                            raise IndexError(f"{i.name} at {i.address:#x} is {error}") from error
                elif i.opcode in ("LDGDEPBAR", "DEPBAR"):
                    self._groups(warp, i)
                elif step.kind == "action":
                    self.kernel.action(n)(warp, mask)
                    if i.sets != NO_SCOREBOARD:
                        self._set(warp, i.sets, warp.time + LATENCY.get(i.opcode, OTHER_LATENCY), False)
                n += 1
            else:
                warp.pc[lanes] = n
                continue
            if i.opcode == "BAR" and mask.any() and not i.has("ARV"):
                warp.pc[lanes] = n + 1
                return True
            self._branch(warp, i, lanes, mask, n + 1)

    def _branch(self, warp: Warp, i: Instruction, lanes: np.ndarray, mask: np.ndarray, following: int) -> None:
        index = self.kernel.index
        operand = next((o for o in i.operands if o.kind in ("pred", "upred")), None)
        taken = mask if operand is None else mask & predicate(operand)(warp)
        warp.pc[lanes] = following
        if i.opcode == "EXIT":
            warp.alive &= ~taken
            self._release(warp)
        elif i.opcode in ("BRA", "CALL"):
            if i.has("DIV"):  # it leads to a slow path for diverged lanes
                taken = taken & False
            if taken.any():
                warp.time += BRANCH_CYCLES
                warp.pc[taken] = index[i.target]
        elif i.opcode == "RET":
            address = number(i.operands[0])(warp)
            warp.pc[taken] = [index[int(a)] for a in address[taken]]
            warp.time += BRANCH_CYCLES
        elif i.opcode == "BSSY":
            joins = warp.joins.setdefault(i.operands[0].index, np.zeros(LANES, np.int64))
            joins[mask] = int((mask.astype(np.int64) << np.arange(LANES)).sum())
        elif i.opcode == "BREAK":
            barrier = next(o.index for o in i.operands if o.kind == "barrier")
            gone = int((taken.astype(np.int64) << np.arange(LANES)).sum())
            warp.joins[barrier] &= ~gone
            self._release(warp)
        elif i.opcode == "BSYNC":
            warp.waiting |= mask
            warp.pc[mask] = following - 1  # they stand here until they are released
            self._release(warp)
        elif i.opcode == "BMOV":
            raise UnknownInstructionError(i.name)

    def _release(self, warp: Warp) -> None:
        """Let lanes go on from a BSYNC where all that are to meet there, and live, do wait."""
        for n in set(warp.pc[warp.waiting & warp.alive].tolist()):
            i = self.kernel.instructions[n]
            here = warp.waiting & warp.alive & (warp.pc == n)
            wanted = warp.joins[i.operands[-1].index]
            bits = 1 << np.arange(LANES, dtype=np.int64)
            living, standing = int(bits[warp.alive].sum()), int(bits[here].sum())
            free = here & ((wanted & living & ~standing) == 0)
            warp.waiting[free] = False
            warp.pc[free] = n + 1

    # --- time ---

    def _issue(self, warp: Warp, i: Instruction) -> None:
        start = warp.time
        for n in i.waits:
            if warp.scoreboards[n] > warp.time:
                warp.time = warp.scoreboards[n]
                if warp.from_memory[n] and warp.time - start > TRIP_CYCLES:
                    self.counts.trips += 1
                    start = warp.time
        warp.time += i.stall or 1
        self.steps_left -= 1
        if self.steps_left < 0:
            raise RuntimeError(f"the sample does not end within {MAX_INSTRUCTIONS} instructions a block")
        if i.reads != NO_SCOREBOARD:
            self._set(warp, i.reads, warp.time + READ_CYCLES, False)

    def _groups(self, warp: Warp, i: Instruction) -> None:
        """LDGDEPBAR closes a group of copies, DEPBAR.LE waits until at most so many are under way."""
        if i.opcode == "LDGDEPBAR":
            warp.copies.append(max(warp.copying, *warp.copies[-1:], 0.0))
            warp.copying = 0.0
            return
        awaited = len(warp.copies) - next((o.offset for o in i.operands if o.kind == "number"), len(warp.copies))
        if awaited > 0:
            arrival = warp.copies[awaited - 1]
            del warp.copies[:awaited]
            self.counts.trips += arrival - warp.time > TRIP_CYCLES
            warp.time = max(warp.time, arrival)

    def _set(self, warp: Warp, scoreboard: int, time: float, memory: bool) -> None:
        if time >= warp.scoreboards[scoreboard]:
            warp.scoreboards[scoreboard], warp.from_memory[scoreboard] = time, memory

    # --- memory ---

    def _access(self, warp: Warp, step: Step, mask: np.ndarray) -> None:
        i = step.instruction
        size, address = access_bytes(i), step.address(warp)
        if i.opcode in ("LDG", "LD"):
            arrival = self._global(warp, address[mask], size, store=False)
            values = self._read_global(address, mask, size)
            write_registers(warp, i, mask, values, size)
            if i.sets != NO_SCOREBOARD:
                self._set(warp, i.sets, arrival, True)
        elif i.opcode == "LDGSTS":
            assert step.shared is not None
            warp.copying = max(warp.copying, self._global(warp, address[mask], size, store=False))
            values, at = self._read_global(address, mask, size), step.shared(warp) & 0xFFFFFF
            self.counts.wavefronts += bank_conflicts(at[mask], size)
            for lane in np.flatnonzero(mask):
                warp.block.shared[int(at[lane]) : int(at[lane]) + size] = values[lane]
        elif i.opcode in ("STG", "ST", "RED", "REDG", "ATOMG", "ATOM"):
            arrival = self._global(warp, address[mask], size, store=True)
            if i.opcode == "STG":
                self._write_global(warp, i, address, mask, size)
            elif i.opcode in ("ATOMG", "ATOM"):
                self._atomic(warp, i, address, mask)
                if i.sets != NO_SCOREBOARD:
                    self._set(warp, i.sets, warp.time + self.l2_cycles, True)
        else:
            self._shared(warp, i, address, mask, size)

    def _global(self, warp: Warp, address: np.ndarray, size: int, store: bool) -> float:
        sectors = np.unique(np.concatenate([address // SECTOR, (address + size - 1) // SECTOR])).tolist()
        lines = len({s >> 2 for s in sectors})
        self.counts.wavefronts += max(lines, -(-len(address) * size // 128))
        seen = self.seen_stores if store else self.seen_loads
        arrivals, latest = warp.block.arrivals, warp.time + L1_CYCLES
        for sector in sectors:
            if not store and sector in arrivals:
                latest = max(latest, arrivals[sector])
                continue
            array = self.memory.find(max(sector * SECTOR, int(address.min())))
            self.counts.l2_bytes += SECTOR
            if sector not in seen:
                seen.add(sector)
                (self.counts.stored if store else self.counts.loaded)[array.name] += SECTOR
                cycles = self.l2_cycles if array.resident else self.dram_cycles
            else:
                cycles = self.l2_cycles
            if not store:
                arrivals[sector] = warp.time + cycles
                latest = max(latest, arrivals[sector])
        return latest

    def _read_global(self, address: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        values = np.zeros((LANES, size), np.uint8)
        some = np.flatnonzero(mask)
        arrays = {}
        for lane in some:
            at = int(address[lane])
            array = arrays.get(at >> 9) or arrays.setdefault(at >> 9, self.memory.find(at))
            offset = at - array.base
            if offset + size > array.size:
                self.memory.find(at + size - 1)
            if array.data is None:
                values[lane] = ANYTHING[(at >> 1) % 64 * 2 : (at >> 1) % 64 * 2 + size]
            else:
                values[lane] = array.data[offset : offset + size]
        return values

    def _write_global(self, warp: Warp, i: Instruction, address: np.ndarray, mask: np.ndarray, size: int) -> None:
        values = register_bytes(warp, i, size)
        for lane in np.flatnonzero(mask):
            array = self.memory.find(int(address[lane]))
            if array.data is not None:
                offset = int(address[lane]) - array.base
                array.data[offset : offset + size] = values[lane]

    def _shared(self, warp: Warp, i: Instruction, address: np.ndarray, mask: np.ndarray, size: int) -> None:
        shared, some = warp.block.shared, np.flatnonzero(mask)
        at = address & 0xFFFFFF
        self.counts.wavefronts += bank_conflicts(at[mask], size)
        if i.opcode == "LDS":
            values = np.zeros((LANES, size), np.uint8)
            for lane in some:
                values[lane] = shared[int(at[lane]) : int(at[lane]) + size]
            write_registers(warp, i, mask, values, size)
        elif i.opcode == "STS":
            values = register_bytes(warp, i, size)
            for lane in some:
                shared[int(at[lane]) : int(at[lane]) + size] = values[lane]
        else:
            self._atomic(warp, i, at, mask)
        if i.sets != NO_SCOREBOARD:
            self._set(warp, i.sets, warp.time + LATENCY.get(i.opcode, LATENCY["LDS"]), False)

    def _atomic(self, warp: Warp, i: Instruction, at: np.ndarray, mask: np.ndarray) -> None:
        """Lanes one after the other, in shared memory or in an array; nothing is kept where an array has no data."""
        old = np.zeros(LANES, U32)
        operands = [o for o in i.operands if o.kind in ("reg", "ureg", "number")]
        value = full(1) if i.has("POPC") or len(operands) < 2 else number(operands[-1])(warp)
        function = next((f for name, f in _ATOMIC.items() if i.has(name)), None)
        if function is None:
            raise UnknownInstructionError(i.name)
        for lane in np.flatnonzero(mask):
            words, word = self._word(warp, i, int(at[lane]))
            if words is not None:
                old[lane] = words[word]
                words[word] = function(int(words[word]), int(value[lane])) & 0xFFFFFFFF
        target = next(o for o in i.operands if o.kind != "pred")  # it is memory if nothing is returned
        if target.kind == "reg" and target.index != 255:
            np.copyto(warp.regs[row_of(target)], old, where=mask)

    def _word(self, warp: Warp, i: Instruction, at: int) -> tuple[np.ndarray | None, int]:
        if i.opcode == "ATOMS":
            return warp.block.shared.view(U32), at // 4
        array = self.memory.find(at)
        return None if array.data is None else array.data.view(U32), (at - array.base) // 4


_ATOMIC: dict[str, Callable[[int, int], int]] = {
    "ADD": lambda a, b: a + b, "POPC": lambda a, _: a + 1, "OR": lambda a, b: a | b, "AND": lambda a, b: a & b,
    "MIN": min, "MAX": max, "EXCH": lambda _, b: b,
}  # fmt: skip
_CONTROL = ("BRA", "CALL", "RET", "EXIT", "BSYNC", "WARPSYNC", "BREAK", "BSSY", "BAR", "BMOV")
_NOTHING = ("DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "ENDCOLLECTIVE", "NANOSLEEP", "NOP",
            "YIELD")  # fmt: skip
_MEMORY = ("LDG", "LDGSTS", "STG", "LD", "ST", "LDS", "STS", "ATOMS", "RED", "REDG", "ATOMG", "ATOM")
