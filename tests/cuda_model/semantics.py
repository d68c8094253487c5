"""Instructions act on the registers of a warp here; simulate.py has memory, barriers and branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cuda_model.floats import FLOATING
from cuda_model.integers import INTEGER
from cuda_model.operands import (
    LANES,
    U32,
    Action,
    Builder,
    UnknownInstructionError,
    full,
    number,
    predicate,
    set_predicate,
    setter,
)
from cuda_model.sass import Instruction

if TYPE_CHECKING:
    from cuda_model.simulate import Warp


def _special(i: Instruction) -> Action:
    name, write = i.operands[1].text, setter(i.operands[0])
    return lambda w, m: write(w, m, w.special(name))


def _to_uniform(i: Instruction) -> Action:
    a, write = number(i.operands[1]), setter(i.operands[0])
    return lambda w, m: write(w, m, np.full(LANES, a(w)[int(np.argmax(m))], U32))


def _ballot(values: np.ndarray) -> int:
    return int(np.packbits(values, bitorder="little").view(U32)[0])


def _vote(i: Instruction) -> Action:
    operands = list(i.operands)
    write = setter(operands.pop(0)) if operands[0].kind in ("reg", "ureg") else None
    out, asked = set_predicate(operands[0]), predicate(operands[1])

    def run(w: Warp, m: np.ndarray) -> None:
        values = asked(w) & m
        if write is not None:
            write(w, m, full(_ballot(values)))
        result = values.any() if i.has("ANY") else (values == m).all()
        out(w, m, np.full(LANES, result))

    return run


def _match(i: Instruction) -> Action:
    a, write = number(i.operands[-1]), setter(i.operands[0])

    def run(w: Warp, m: np.ndarray) -> None:
        values = a(w)
        same = (values[:, None] == values[None, :]) & m[None, :]
        write(w, m, (same.astype(U32) << np.arange(LANES, dtype=U32)).sum(1, dtype=U32))

    return run


def _shuffle(i: Instruction) -> Action:
    out, write = set_predicate(i.operands[0]), setter(i.operands[1])
    a, b, c = (number(o) for o in i.operands[2:5])
    lane = np.arange(LANES)

    def run(w: Warp, m: np.ndarray) -> None:
        value, index, clamp = a(w), b(w).astype(int) & 31, c(w).astype(int)
        segment, bound = clamp >> 8 & 31, clamp & 31
        low, high = lane & segment, (lane & segment) | (bound & ~segment)
        if i.has("UP"):
            source = lane - index
            inside = source >= high
        elif i.has("DOWN"):
            source = lane + index
            inside = source <= high
        elif i.has("BFLY"):
            source = lane ^ index
            inside = source <= high
        else:
            source = low | (index & ~segment)
            inside = source <= high
        source = np.where(inside, source, lane)
        out(w, m, inside)
        write(w, m, value[source])

    return run


_LANES: dict[str, Builder] = {
    "S2R": _special, "S2UR": _special, "R2UR": _to_uniform, "VOTE": _vote, "VOTEU": _vote, "MATCH": _match,
    "SHFL": _shuffle,
}  # fmt: skip
_BUILDERS = INTEGER | FLOATING | _LANES


def compile_instruction(i: Instruction) -> Action:
    """Return what an instruction does; raise UnknownInstructionError if the model does not know it."""
    builder = _BUILDERS.get(i.opcode)
    if builder is None:
        raise UnknownInstructionError(i.name)
    return builder(i)
