"""Operands of instructions as functions of a warp: getters of 32 lanes, and setters for the lanes of a mask.

Registers are rows of 32 lanes of 32 bits, uniform ones too, from row `UNIFORM` on; predicates are rows of truth values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cuda_model.sass import Instruction, Operand

if TYPE_CHECKING:
    from cuda_model.simulate import Warp

LANES = 32
UNIFORM = 256  # 64 uniform registers begin at this row
U32, U64, I32, I64, F32 = np.uint32, np.uint64, np.int32, np.int64, np.float32
MASK32 = np.uint64(0xFFFFFFFF)
Getter = Callable[["Warp"], np.ndarray]
Setter = Callable[["Warp", np.ndarray, np.ndarray], None]
Action = Callable[["Warp", np.ndarray], None]  # takes a warp and the lanes that execute it


class UnknownInstructionError(Exception):
    """Raised for an instruction that the model does not know."""


def full(value: int) -> np.ndarray:
    """Return 32 lanes of a number."""
    return np.full(LANES, value & 0xFFFFFFFF, U32)


def row_of(operand: Operand) -> int:
    """Return the row of a register."""
    return operand.index + (UNIFORM if operand.kind == "ureg" else 0)


def float_bits(text: str) -> int:
    negative = text.startswith("-")
    body = text.lstrip("+-")
    if body == "INF":
        bits = 0x7F800000
    elif body in ("QNAN", "SNAN"):
        bits = 0x7FFFFFFF
    else:
        return int(np.array(float(text), F32).view(U32))
    return bits | (0x80000000 if negative else 0)


def number(operand: Operand) -> Getter:
    """Return a getter of an operand's 32 bits as integers: negated or inverted as the operand says."""
    if operand.kind in ("reg", "ureg"):
        row, zero = row_of(operand), operand.index == (63 if operand.kind == "ureg" else 255)
        if zero:
            value = full(-1 if operand.inverted else 0)
            return lambda w: value
        if operand.negative:
            return lambda w: (~w.regs[row]) + U32(1)
        if operand.inverted:
            return lambda w: ~w.regs[row]
        return lambda w: w.regs[row]
    if operand.kind == "const":
        bank, offset = operand.index, operand.offset
        if operand.negative:
            return lambda w: full(-w.constant(bank, offset))
        if operand.inverted:
            return lambda w: full(~w.constant(bank, offset))
        return lambda w: full(w.constant(bank, offset))
    value = full(operand.offset if operand.kind == "number" else float_bits(operand.text))
    return lambda w: value


def pair(operand: Operand) -> Getter:
    """Return a getter of 64 bits: of a register and the one behind it."""
    low = number(operand)
    if operand.kind in ("reg", "ureg") and operand.index != (63 if operand.kind == "ureg" else 255):
        row = row_of(operand)
        return lambda w: w.regs[row].astype(U64) | w.regs[row + 1].astype(U64) << U64(32)
    if operand.kind == "const":
        bank, offset = operand.index, operand.offset
        return lambda w: full(w.constant(bank, offset)).astype(U64) | U64(w.constant(bank, offset + 4)) << U64(32)
    return lambda w: low(w).astype(U64)


def floats(operand: Operand) -> Getter:
    """Return a getter of an operand as fp32."""
    plain = Operand(operand.text, operand.kind, operand.index, operand.offset)
    if operand.kind == "number":  # an integer such as 1 or -2000 stands for a float
        value = np.full(LANES, operand.offset, F32)
        return lambda w: value
    bits = number(plain)
    if operand.negative or operand.absolute:

        def signed(w: Warp) -> np.ndarray:
            x = bits(w).view(F32)
            x = np.abs(x) if operand.absolute else x
            return -x if operand.negative else x

        return signed
    return lambda w: bits(w).view(F32)


def predicate(operand: Operand) -> Getter:
    """Return a getter of a predicate as 32 truth values."""
    row = operand.index + (8 if operand.kind == "upred" else 0)
    if operand.inverted:
        return lambda w: ~w.preds[row]
    return lambda w: w.preds[row]


def setter(operand: Operand) -> Setter:
    """Return a function that writes 32 bits to the lanes of a mask; to all of a uniform register if there are any."""
    if operand.index == (63 if operand.kind == "ureg" else 255):
        return lambda w, m, value: None
    row = row_of(operand)
    if operand.kind == "ureg":

        def write_all(w: Warp, m: np.ndarray, value: np.ndarray) -> None:
            if m.any():
                w.regs[row] = value

        return write_all
    return lambda w, m, value: np.copyto(w.regs[row], value, where=m)


def set_predicate(operand: Operand) -> Setter:
    """Return a setter of a predicate."""
    row = operand.index + (8 if operand.kind == "upred" else 0)
    if operand.index == 7:
        return lambda w, m, value: None
    if operand.kind == "upred":

        def write_all(w: Warp, m: np.ndarray, value: np.ndarray) -> None:
            if m.any():
                w.preds[row] = value

        return write_all
    return lambda w, m, value: np.copyto(w.preds[row], value, where=m)


def set_pair(operand: Operand) -> Setter:
    """Return a setter of a pair of registers, 64 bits."""
    if operand.index == (63 if operand.kind == "ureg" else 255):
        return lambda w, m, value: None
    row = row_of(operand)
    where = (lambda m: m.any()) if operand.kind == "ureg" else (lambda m: m)

    def write(w: Warp, m: np.ndarray, value: np.ndarray) -> None:
        np.copyto(w.regs[row], (value & MASK32).astype(U32), where=where(m))
        np.copyto(w.regs[row + 1], (value >> U64(32)).astype(U32), where=where(m))

    return write


def is_predicate(operand: Operand) -> bool:
    return operand.kind in ("pred", "upred")


def split(i: Instruction) -> tuple[list[Operand], list[Operand], list[Operand]]:
    """Return written predicates, sources, and predicates read behind them; the first operand is left out."""
    rest = list(i.operands[1:])
    written = []
    while rest and is_predicate(rest[0]):
        written.append(rest.pop(0))
    read: list[Operand] = []
    while rest and is_predicate(rest[-1]):
        read.insert(0, rest.pop())
    return written, rest, read


Builder = Callable[[Instruction], Action]
COMPARE = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
}  # fmt: skip


def combine(i: Instruction, result: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Put a comparison together with a predicate, as the modifiers say."""
    if i.has("OR"):
        return result | other
    return result ^ other if i.has("XOR") else result & other
