"""Integer and logic instructions do exactly what a GPU does, carries and predicates included."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cuda_model.operands import (
    COMPARE,
    I32,
    I64,
    LANES,
    MASK32,
    U32,
    U64,
    Action,
    Builder,
    UnknownInstructionError,
    combine,
    full,
    is_predicate,
    number,
    pair,
    predicate,
    set_pair,
    set_predicate,
    setter,
    split,
)
from cuda_model.sass import Instruction, Operand

if TYPE_CHECKING:
    from cuda_model.simulate import Warp


def _sum(i: Instruction) -> Action:
    """Execute IADD3 and its kin: the sum of up to three, with carries. What is negated is its complement plus one."""
    written, sources, read = split(i)
    extended = "X" in i.modifiers
    terms = [
        number(Operand(o.text, o.kind, o.index, o.offset, inverted=o.negative or o.inverted, half=o.half))
        for o in sources
    ]
    ones = 0 if extended else sum(o.negative for o in sources)
    carries = [predicate(p) for p in read] if extended else []
    write, outs = setter(i.operands[0]), [set_predicate(p) for p in written]

    def run(w: Warp, m: np.ndarray) -> None:
        total = terms[0](w).astype(U64)
        for term in terms[1:]:
            total = total + term(w)
        if ones:
            total = total + U64(ones)
        for carry in carries:
            total = total + carry(w)
        write(w, m, total.astype(U32))
        for n, out in enumerate(outs):
            out(w, m, total >> U64(32) > n)

    return run


def _imad(i: Instruction) -> Action:
    written, sources, read = split(i)
    a, b = (number(o) for o in sources[:2])
    signed = not i.has("U32")
    carry = predicate(read[0]) if "X" in i.modifiers and read else None
    outs = [set_predicate(p) for p in written]
    if i.has("MOV"):
        c, write = number(sources[2]), setter(i.operands[0])
        return lambda w, m: write(w, m, c(w))
    if i.has("WIDE") or i.has("HI"):
        c = pair(sources[2])
        write = set_pair(i.operands[0]) if i.has("WIDE") else setter(i.operands[0])

        def wide(w: Warp, m: np.ndarray) -> None:
            x, y = a(w), b(w)
            product = (x.view(I32).astype(I64) * y.view(I32).astype(I64)).view(U64) if signed else x.astype(U64) * y
            addend = c(w)
            total = product + addend
            over = total < product
            if carry is not None:
                more = carry(w)
                total = total + more
                over |= more & (total == 0)
            write(w, m, total if i.has("WIDE") else (total >> U64(32)).astype(U32))
            for out in outs:
                out(w, m, over)

        return wide
    c, write = number(sources[2]), setter(i.operands[0])
    if carry is None:
        return lambda w, m: write(w, m, a(w) * b(w) + c(w))
    return lambda w, m: write(w, m, a(w) * b(w) + c(w) + carry(w))


def _lea(i: Instruction) -> Action:
    written, sources, read = split(i)
    carry = predicate(read[0]) if "X" in i.modifiers else None
    write, outs = setter(i.operands[0]), [set_predicate(p) for p in written]
    a, b, shift = number(sources[0]), number(sources[1]), U64(sources[-1].offset)
    if i.has("HI") and i.has("SX32"):
        high = lambda w: (a(w).view(I32) >> I32(31)).view(U32)  # noqa: E731
    else:
        high = number(sources[2]) if i.has("HI") else None

    def run(w: Warp, m: np.ndarray) -> None:
        x = a(w).astype(U64)
        x = x << shift & MASK32 if high is None else (x | high(w).astype(U64) << U64(32)) << shift >> U64(32)
        total = x + b(w)
        if carry is not None:
            total = total + carry(w)
        write(w, m, total.astype(U32))
        for out in outs:
            out(w, m, total >> U64(32) > 0)

    return run


def _lop3(i: Instruction) -> Action:
    operands = list(i.operands)
    out = set_predicate(operands.pop(0)) if is_predicate(operands[0]) else None
    write = setter(operands[0])
    a, b, c = (number(o) for o in operands[1:4])
    table = operands[4].offset

    def run(w: Warp, m: np.ndarray) -> None:
        value = truth_table(table, a(w), b(w), c(w))
        write(w, m, value)
        if out is not None:
            out(w, m, value != 0)

    return run


def truth_table(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Apply a bitwise function of three: the result is bit 4 a + 2 b + c of the table."""
    known = {0xC0: lambda: a & b, 0xFC: lambda: a | b, 0x3C: lambda: a ^ b, 0x80: lambda: a & b & c}
    known |= {0xFE: lambda: a | b | c, 0x33: lambda: ~b, 0x0F: lambda: ~a, 0x30: lambda: a & ~b}
    if table in known:
        return known[table]()
    value = np.zeros_like(a)
    for n in range(8):
        if table >> n & 1:
            value |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return value


def _plop3(i: Instruction) -> Action:
    outs, read = [set_predicate(o) for o in i.operands[:2]], [predicate(o) for o in i.operands[2:5]]
    tables = [o.offset for o in i.operands[5:7]]

    def run(w: Warp, m: np.ndarray) -> None:
        values = [p(w) for p in read]
        results = [truth_table(table, *values) for table in tables]
        for out, result in zip(outs, results, strict=True):
            out(w, m, result)

    return run


def _isetp(i: Instruction) -> Action:
    outs = [set_predicate(o) for o in i.operands[:2]]
    a, b, other = number(i.operands[2]), number(i.operands[3]), predicate(i.operands[4])
    kind = i.modifiers[0]
    low = predicate(i.operands[5]) if i.has("EX") else None
    signed = not i.has("U32")

    def run(w: Warp, m: np.ndarray) -> None:
        x, y = a(w), b(w)
        if signed:
            x, y = x.view(I32), y.view(I32)
        if low is None:
            result = COMPARE[kind](x, y)
        elif kind == "NE":
            result = (x != y) | low(w)
        elif kind == "EQ":
            result = (x == y) & low(w)
        else:
            result = COMPARE[kind[0] + "T"](x, y) | ((x == y) & low(w))
        third = other(w)
        outs[0](w, m, combine(i, result, third))
        outs[1](w, m, combine(i, ~result, third))

    return run


def _shift(i: Instruction) -> Action:
    write = setter(i.operands[0])
    a, amount, c = (number(o) for o in i.operands[1:4])
    left, high, wraps = i.has("L"), i.has("HI"), i.has("W")
    wide = i.has("U64") or i.has("S64")
    arithmetic = i.has("S32") or i.has("S64")

    def run(w: Warp, m: np.ndarray) -> None:
        shift = amount(w).astype(U64)
        shift = shift & U64(63 if wide else 31) if wraps else np.minimum(shift, U64(64 if wide else 32))
        value = a(w).astype(U64) | c(w).astype(U64) << U64(32)
        capped = np.minimum(shift, U64(63))
        if left:
            value = np.where(shift > 63, U64(0), value << capped)
        elif arithmetic:
            value = (value.view(I64) >> capped.view(I64)).view(U64)
        else:
            value = np.where(shift > 63, U64(0), value >> capped)
        write(w, m, (value >> U64(32) if high else value & MASK32).astype(U32))

    return run


def _prmt(i: Instruction) -> Action:
    write = setter(i.operands[0])
    a, selector, c = (number(o) for o in i.operands[1:4])

    def run(w: Warp, m: np.ndarray) -> None:
        both = a(w).astype(U64) | c(w).astype(U64) << U64(32)
        select, value = selector(w), np.zeros(LANES, U32)
        for n in range(4):
            nibble = (select >> U32(4 * n) & U32(15)).astype(U64)
            byte = (both >> (nibble & U64(7)) * U64(8)).astype(U32) & U32(255)
            byte = np.where(nibble & U64(8), np.where(byte >> U32(7), U32(255), U32(0)), byte)
            value |= byte << U32(8 * n)
        write(w, m, value)

    return run


def _minmax(i: Instruction) -> Action:
    """Execute VIMNMX, VIMNMX3 and VIADDMNMX: the last predicate says minimum."""
    sources, smaller = [o for o in i.operands[1:] if not is_predicate(o)], predicate(i.operands[-1])
    getters, write = [number(o) for o in sources], setter(i.operands[0])
    unsigned = i.has("U32")

    def run(w: Warp, m: np.ndarray) -> None:
        values = [g(w) for g in getters]
        if i.opcode == "VIADDMNMX":
            values = [values[0] + values[1], values[2]]
        if not unsigned:
            values = [v.view(I32) for v in values]
        low, high = values[0], values[0]
        for value in values[1:]:
            low, high = np.minimum(low, value), np.maximum(high, value)
        result = np.where(smaller(w), low, high)
        result = np.maximum(result, 0) if i.has("RELU") else result
        write(w, m, result.view(U32))

    return run


def _one(function: Callable[[np.ndarray], np.ndarray]) -> Builder:
    def build(i: Instruction) -> Action:
        sources = [o for o in i.operands[1:] if not is_predicate(o)]
        a, write = number(sources[-1]), setter(i.operands[0])
        return lambda w, m: write(w, m, function(a(w)))

    return build


def highest_bit(x: np.ndarray) -> np.ndarray:
    """Return the position of the highest bit, all ones for 0."""
    result = np.full(LANES, 0xFFFFFFFF, U32)
    some = x != 0
    result[some] = np.floor(np.log2(x[some].astype(np.float64))).astype(U32)
    return result


def _flo(i: Instruction) -> Action:
    a, write = number(i.operands[-1]), setter(i.operands[0])

    def run(w: Warp, m: np.ndarray) -> None:
        bit = highest_bit(a(w))
        write(w, m, np.where(bit == 0xFFFFFFFF, bit, U32(31) - bit) if i.has("SH") else bit)

    return run


def _reverse(x: np.ndarray) -> np.ndarray:
    return np.array([int(f"{int(v):032b}"[::-1], 2) for v in x], U32)


def _sel(i: Instruction) -> Action:
    a, b, chosen = number(i.operands[1]), number(i.operands[2]), predicate(i.operands[3])
    write = setter(i.operands[0])
    return lambda w, m: write(w, m, np.where(chosen(w), a(w), b(w)))


def _preds_to_reg(i: Instruction) -> Action:
    write, mask = setter(i.operands[0]), i.operands[-1].offset
    return lambda w, m: write(w, m, sum((w.preds[n].astype(U32) << U32(n) for n in range(7)), full(0)) & U32(mask))


def _reg_to_preds(i: Instruction) -> Action:
    a, mask = number(i.operands[1]), i.operands[-1].offset

    def run(w: Warp, m: np.ndarray) -> None:
        for n in range(7):
            if mask >> n & 1:
                np.copyto(w.preds[n], a(w) >> U32(n) & U32(1) != 0, where=m)

    return run


def _copy(i: Instruction) -> Action:
    a, write = number(i.operands[1]), setter(i.operands[0])
    return lambda w, m: write(w, m, a(w))


def _load_constant(i: Instruction) -> Action:
    source = i.operands[1]
    if source.kind != "const":  # it is indexed, as in LDC R2, c[0x0][R4+0x210]
        match = re.fullmatch(r"c\[0x([0-9a-f]+)\]\[(U?R\w+)(?:\.\w+)?(?:\+(-?0x[0-9a-f]+))?\]", source.text)
        if match is None:
            raise UnknownInstructionError(f"{i.name} {source.text}")
        bank, offset = int(match[1], 16), int(match[3] or "0", 16)
        at = match[2]
        index = Operand(at, "ureg" if at[0] == "U" else "reg", int(re.sub(r"\D", "", at) or 255))
        base = number(index)

        def get(w: Warp, m: np.ndarray, more: int) -> np.ndarray:
            return np.array(
                [
                    w.constant(bank, int(v) + offset + more) if inside else 0
                    for v, inside in zip(base(w).view(I32), m, strict=True)
                ],
                U32,
            )
    else:
        bank, offset = source.index, source.offset

        def get(w: Warp, m: np.ndarray, more: int) -> np.ndarray:
            return full(w.constant(bank, offset + more))

    if i.has("64"):
        write = set_pair(i.operands[0])
        return lambda w, m: write(w, m, get(w, m, 0).astype(U64) | get(w, m, 4).astype(U64) << U64(32))
    write = setter(i.operands[0])
    narrow = next((m for m in i.modifiers if m in ("U8", "S8", "U16", "S16")), None)
    if narrow is None:
        return lambda w, m: write(w, m, get(w, m, 0))
    bits, sign = int(narrow[1:]), narrow[0] == "S"
    shift = U32(32 - bits)
    if sign:
        return lambda w, m: write(w, m, ((get(w, m, 0) << shift).view(I32) >> I32(32 - bits)).view(U32))
    return lambda w, m: write(w, m, get(w, m, 0) << shift >> shift)


def _zero_pair(i: Instruction) -> Action:
    write = setter(i.operands[0]) if i.has("32") else set_pair(i.operands[0])
    return lambda w, m: write(w, m, np.zeros(LANES, U32 if i.has("32") else U64))


INTEGER: dict[str, Builder] = {
    "IADD3": _sum, "UIADD3": _sum, "VIADD": _sum, "IMAD": _imad, "UIMAD": _imad, "LEA": _lea, "ULEA": _lea,
    "LOP3": _lop3, "ULOP3": _lop3, "PLOP3": _plop3, "UPLOP3": _plop3, "ISETP": _isetp, "UISETP": _isetp,
    "SHF": _shift, "USHF": _shift, "PRMT": _prmt, "UPRMT": _prmt, "SEL": _sel, "USEL": _sel, "MOV": _copy,
    "UMOV": _copy, "VIMNMX": _minmax, "VIMNMX3": _minmax, "VIADDMNMX": _minmax, "P2R": _preds_to_reg,
    "R2P": _reg_to_preds, "FLO": _flo, "UFLO": _flo, "CS2R": _zero_pair, "LDC": _load_constant,
    "ULDC": _load_constant,
    "IABS": _one(lambda x: np.abs(x.view(I32)).view(U32)),
    "POPC": _one(lambda x: np.array([int(v).bit_count() for v in x], U32)),
    "UPOPC": _one(lambda x: np.array([int(v).bit_count() for v in x], U32)),
    "BREV": _one(_reverse), "UBREV": _one(_reverse),
}  # fmt: skip
