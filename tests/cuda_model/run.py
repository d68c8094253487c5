"""Estimate compiled kernels: find the kernel of a launch, execute its sample, add up an op's launches."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from cuda_model import gpus, launches
from cuda_model.memory import Array, Memory
from cuda_model.operands import UnknownInstructionError
from cuda_model.sass import parse_function
from cuda_model.simulate import Counts, Kernel, Run
from cuda_model.table import TABLE, WHOLE, Row, measured, measurements

EDIT = "edit its entry in tests/cuda_model/cases_*.py"


class ModelError(Exception):
    """The model does not fit the code any more; the message says what to edit."""


@dataclass
class Compiled:
    """Describes a kernel: name, code, registers, shared memory, threads of a block, sizes of parameters."""

    name: str
    code: str
    registers: int
    shared: int
    threads: int
    parameters: tuple[int, ...]


def find(kernels: list[Compiled], launch: launches.Launch) -> Compiled:
    """Return the kernel of a launch; ModelError unless there is exactly one of the name."""
    found = [k for k in kernels if re.match(launch.kernel, k.name)]
    if len(found) != 1:
        names = sorted(k.name for k in kernels)
        raise ModelError(f"{launch.stem}.cu has {len(found)} kernels {launch.kernel!r}: {EDIT}. It has {names}")
    return found[0]


def arrays_of(arguments: list) -> list[Array]:
    """Return all arrays among arguments, each once."""
    found: dict[int, Array] = {}
    for argument in arguments:
        inside = arrays_of(argument) if isinstance(argument, list) else [argument]
        found |= {id(a): a for a in inside if isinstance(a, Array)}
    return list(found.values())


def execute(kernels: list[Compiled], launch: launches.Launch) -> tuple[Compiled, Counts]:
    """Execute the sample of a launch. The counts serve every GPU: all have the same multiprocessors and clock."""
    gpu = gpus.GPUS[0]
    memory, placed = Memory(), set()

    def place(array: Array) -> int:
        if id(array) not in placed:
            placed.add(id(array))
            memory.place(array)
        return array.base

    own = find(kernels, launch)
    sizes = tuple(len(launches.pack([a], place)) for a in launch.arguments)
    if sizes != own.parameters:
        raise ModelError(f"{own.name} has parameters of {own.parameters} bytes, its entry of {sizes}: {EDIT}")
    if launch.threads not in (None, own.threads):
        raise ModelError(f"{own.name} has blocks of {own.threads} threads, its entry of {launch.threads}: {EDIT}")
    parameters = launches.pack(launch.arguments, place)
    kernel = Kernel(parse_function(own.code))
    run = Run(
        kernel, own.threads, launch.grid, parameters, memory, gpu.l2_seconds * gpu.clock, gpu.dram_seconds * gpu.clock,
        launch.warps,
    )  # fmt: skip
    try:
        return own, run.blocks(launch.sample, launch.shares)
    except UnknownInstructionError as error:
        raise ModelError(f"{own.name} has an instruction {error}: add it to tests/cuda_model") from error
    except (LookupError, RuntimeError, ValueError) as error:
        raise ModelError(f"{own.name} cannot be executed: {error}: {EDIT}") from error


@dataclass
class Modeled:
    """Describes a launch with what it is called, registers of a thread, and estimates for every GPU."""

    name: str
    times: int
    registers: int
    estimates: list[gpus.Estimate]


def modeled(kernels_of: Callable[[str], list[Compiled]], launch: launches.Launch | launches.Library) -> Modeled:
    """Estimate a launch on every GPU."""
    if isinstance(launch, launches.Library):
        found = []
        for gpu in gpus.GPUS:
            terms = {"memory": launch.moved / gpu.copy, "L2": launch.l2 / gpu.l2, "tensor": launch.flops / gpu.flops}
            found.append(gpus.Estimate(terms, launch.moved, 0.0, 0, 0.0, 0.0))
        return Modeled(launch.name, launch.times, 0, found)
    own, counts = execute(kernels_of(launch.stem), launch)
    arrays, sizes = arrays_of(launch.arguments), dict[str, int]()
    for array in arrays:
        sizes[array.name] = sizes.get(array.name, 0) + array.size * array.passes
    resident = {"module"} | {array.name for array in arrays if array.resident}
    blocks, shared = launch.grid[0] * launch.grid[1], own.shared + launch.shared
    found = [
        gpus.estimate(gpu, counts, blocks, own.threads, own.registers, shared, sizes, resident) for gpu in gpus.GPUS
    ]
    return Modeled(f"{own.name} {list(launch.grid)}", launch.times, own.registers, found)


def rows_of_case(case: launches.Case, kernels_of: Callable[[str], list[Compiled]], compiler: str) -> list[Row]:
    """Return a row for each kernel of a case and GPU, then one for all of them."""
    found = [modeled(kernels_of, launch) for launch in case.launches]
    rows = []
    for n, gpu in enumerate(gpus.GPUS):
        results = measurements(TABLE.parent, gpu.name)
        name, limit = (
            (case.op, case.shape, case.dtype, gpu.name),
            max(case.min_bytes / gpu.copy, case.flops / gpu.flops),
        )
        total, moved, instructions, longest = 0.0, 0.0, 0.0, ("", 0.0)
        for launch in found:
            e = launch.estimates[n]
            seconds = (e.seconds + gpu.launch_seconds) * launch.times
            total += seconds
            moved += e.moved * launch.times
            instructions += e.instructions * launch.times
            longest = max(longest, (e.limit, seconds), key=lambda pair: pair[1])
            rows.append(
                Row(
                    *name, launch.name, launch.times, seconds * 1e6,
                    e.moved * launch.times / gpu.copy / seconds, e.limit, case.min_bytes,
                    e.instructions * launch.times / case.min_bytes * 1e3, e.moved * launch.times / 1e6,
                    launch.registers, e.resident_warps, e.in_flight / 1e3, gpus.bytes_needed(gpu) / 1e3, e.trips,
                    None, None, compiler,
                )
            )  # fmt: skip
        rows.append(
            Row(
                *name, WHOLE, sum(launch.times for launch in case.launches), total * 1e6, limit / total, longest[0],
                case.min_bytes, instructions / case.min_bytes * 1e3, moved / 1e6, None, None, None, None, None,
                *measured(results, case.op, case.dtype, case.bench), compiler,
            )
        )  # fmt: skip
    return rows
