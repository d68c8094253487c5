"""Floating-point instructions, rounded by numpy: this is close enough, since few branches depend on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cuda_model.operands import (
    COMPARE,
    F32,
    I32,
    I64,
    LANES,
    U32,
    U64,
    Action,
    Builder,
    Getter,
    UnknownInstructionError,
    combine,
    float_bits,
    floats,
    full,
    is_predicate,
    number,
    pair,
    predicate,
    set_pair,
    set_predicate,
    setter,
)
from cuda_model.sass import Instruction, Operand

if TYPE_CHECKING:
    from cuda_model.simulate import Warp


def rounded(exact: np.ndarray, i: Instruction) -> np.ndarray:
    """Round fp64 as the modifiers say: RM down, RP up, RZ to zero, else to nearest; SAT clamps to [0, 1]."""
    value = exact.astype(F32)
    if i.has("RM") or i.has("RP") or i.has("RZ"):
        over, under = value > exact, value < exact
        down = over & (i.has("RM") | (i.has("RZ") & (exact > 0)))
        up = under & (i.has("RP") | (i.has("RZ") & (exact < 0)))
        value = np.where(down, np.nextafter(value, F32(-np.inf)), np.where(up, np.nextafter(value, F32(np.inf)), value))
    return np.where(value > 0, np.minimum(value, F32(1)), F32(0)) if i.has("SAT") else value


def _floating(function: Callable[..., np.ndarray]) -> Builder:
    def build(i: Instruction) -> Action:
        getters = [floats(o) for o in i.operands[1:] if not is_predicate(o)]
        write = setter(i.operands[0])
        if any(i.has(m) for m in ("RM", "RP", "RZ", "SAT")):
            return lambda w, m: write(w, m, rounded(function(*(g(w).astype(np.float64) for g in getters)), i).view(U32))
        return lambda w, m: write(w, m, np.asarray(function(*(g(w) for g in getters)), F32).view(U32))

    return build


_MUFU = {
    "EX2": np.exp2, "LG2": np.log2, "RCP": lambda x: F32(1) / x, "RSQ": lambda x: F32(1) / np.sqrt(x),
    "SQRT": np.sqrt, "SIN": np.sin, "COS": np.cos, "TANH": np.tanh,
}  # fmt: skip


def _mufu(i: Instruction) -> Action:
    if i.modifiers[0] not in _MUFU:
        raise UnknownInstructionError(i.name)
    return _floating(_MUFU[i.modifiers[0]])(i)


def _fsetp(i: Instruction) -> Action:
    outs = [set_predicate(o) for o in i.operands[:2]]
    compare, other = _float_compare(i, i.operands[2], i.operands[3]), predicate(i.operands[4])

    def run(w: Warp, m: np.ndarray) -> None:
        result, third = compare(w), other(w)
        outs[0](w, m, combine(i, result, third))
        outs[1](w, m, combine(i, ~result, third))

    return run


def _float_compare(i: Instruction, left: Operand, right: Operand) -> Getter:
    a, b = floats(left), floats(right)
    kind = next(m for m in i.modifiers if m not in ("BF", "FTZ"))
    if kind in ("NAN", "NUM"):
        return lambda w: (np.isnan(a(w)) | np.isnan(b(w))) == (kind == "NAN")
    unordered, kind = kind.endswith("U"), kind.removesuffix("U")

    def compare(w: Warp) -> np.ndarray:
        x, y = a(w), b(w)
        some = np.isnan(x) | np.isnan(y)
        result = COMPARE[kind](x, y)
        return result | some if unordered else result & ~some

    return compare


def _fset(i: Instruction) -> Action:
    compare, write = _float_compare(i, i.operands[1], i.operands[2]), setter(i.operands[0])
    return lambda w, m: write(w, m, np.where(compare(w), F32(1), F32(0)).view(U32))


def _fmnmx(i: Instruction) -> Action:
    a, b, smaller = floats(i.operands[1]), floats(i.operands[2]), predicate(i.operands[3])
    write = setter(i.operands[0])
    return lambda w, m: write(w, m, np.where(smaller(w), np.fmin(a(w), b(w)), np.fmax(a(w), b(w))).view(U32))


def _fsel(i: Instruction) -> Action:
    a, b, chosen = floats(i.operands[1]), floats(i.operands[2]), predicate(i.operands[3])
    write = setter(i.operands[0])
    return lambda w, m: write(w, m, np.where(chosen(w), a(w), b(w)).view(U32))


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16, to nearest even; bits in the low half."""
    bits = np.ascontiguousarray(x, F32).view(U32)
    rounded = bits + U32(0x7FFF) + (bits >> U32(16) & U32(1)) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded)


def _to_half(x: np.ndarray, bf16: bool) -> np.ndarray:
    return to_bf16(x) if bf16 else np.asarray(x, F32).astype(np.float16).view(np.uint16).astype(U32)


def _from_half(bits: np.ndarray, bf16: bool) -> np.ndarray:
    low = bits & U32(0xFFFF)
    return (low << U32(16)).view(F32) if bf16 else low.astype(np.uint16).view(np.float16).astype(F32)


def _f2fp(i: Instruction) -> Action:
    high, low, write = floats(i.operands[1]), floats(i.operands[2]), setter(i.operands[0])
    bf16 = i.has("BF16")
    return lambda w, m: write(w, m, _to_half(high(w), bf16) << U32(16) | _to_half(low(w), bf16))


def _f2f(i: Instruction) -> Action:
    if not (i.has("BF16") or i.has("F16")) or not i.has("F32"):
        raise UnknownInstructionError(i.name)
    x, write, bf16 = floats(i.operands[1]), setter(i.operands[0]), i.has("BF16")
    return lambda w, m: write(w, m, _to_half(x(w), bf16))


def halves(operand: Operand, bf16: bool, second: Operand | None = None) -> Callable[[Warp], tuple[np.ndarray, ...]]:
    """Return a getter of the low and the high half as fp32. Numbers come in pairs, the high one first."""
    if operand.kind in ("number", "other"):
        numbers = tuple(np.full(LANES, _as_float(o), F32) for o in (second or operand, operand))
        return lambda w: numbers
    bits = number(Operand(operand.text, operand.kind, operand.index, operand.offset))
    sign = F32(-1) if operand.negative else F32(1)

    def get(w: Warp) -> tuple[np.ndarray, np.ndarray]:
        word = bits(w)
        low, high = _from_half(word, bf16), _from_half(word >> U32(16), bf16)
        if operand.half is not None:
            low = high = high if operand.half else low
        if operand.absolute:
            low, high = np.abs(low), np.abs(high)
        return sign * low, sign * high

    return get


def _as_float(operand: Operand) -> float:
    return float(operand.offset) if operand.kind == "number" else float(full(float_bits(operand.text)).view(F32)[0])


def _half_op(function: Callable[..., np.ndarray]) -> Builder:
    def build(i: Instruction) -> Action:
        bf16, write = any(m.startswith("BF16") for m in i.modifiers), setter(i.operands[0])
        sources = [o for o in i.operands[1:] if not is_predicate(o)]
        getters = []
        while sources:
            first = sources.pop(0)
            pair_of_numbers = first.kind in ("number", "other") and sources and sources[0].kind in ("number", "other")
            getters.append(halves(first, bf16, sources.pop(0) if pair_of_numbers else first))
        smaller = predicate(i.operands[-1]) if is_predicate(i.operands[-1]) else None

        def run(w: Warp, m: np.ndarray) -> None:
            values = [g(w) for g in getters]
            own = (smaller(w),) if smaller is not None else ()
            low, high = (function(*own, *(v[n] for v in values)) for n in (0, 1))
            if i.opcode == "HADD2" and i.has("F32"):
                write(w, m, np.asarray(low, F32).view(U32))
            else:
                write(w, m, _to_half(high, bf16) << U32(16) | _to_half(low, bf16))

        return run

    return build


def _extreme(smaller: np.ndarray, *values: np.ndarray) -> np.ndarray:
    low, high = values[0], values[0]
    for value in values[1:]:
        low, high = np.fmin(low, value), np.fmax(high, value)
    return np.where(smaller, low, high)


def _half_set(i: Instruction) -> Action:
    """Execute HSET2, which sets each half to 1 or 0 with BF, to all ones or 0 without, by comparison and predicate."""
    bf16, write = any(m.startswith("BF16") for m in i.modifiers), setter(i.operands[0])
    a, b = (halves(o, bf16) for o in i.operands[1:3])
    kind = next(m for m in i.modifiers if m.removesuffix("U") in COMPARE)
    other, one = predicate(i.operands[3]), (0x3F80 if bf16 else 0x3C00) if i.has("BF") else 0xFFFF

    def run(w: Warp, m: np.ndarray) -> None:
        word = full(0)
        for n, (x, y) in enumerate(zip(a(w), b(w), strict=True)):
            some = np.isnan(x) | np.isnan(y)
            result = COMPARE[kind.removesuffix("U")](x, y)
            result = combine(i, result | some if kind.endswith("U") else result & ~some, other(w))
            word = word | np.where(result, U32(one << 16 * n), U32(0))
        write(w, m, word)

    return run


def _int_to_float(i: Instruction) -> Action:
    write, wide = setter(i.operands[0]), i.has("S64") or i.has("U64")
    a = pair(i.operands[1]) if wide else number(i.operands[1])
    signed = not (i.has("U32") or i.has("U64"))
    kind = (I64 if signed else U64) if wide else (I32 if signed else U32)
    return lambda w, m: write(w, m, a(w).view(kind).astype(F32).view(U32))


def _float_to_int(i: Instruction) -> Action:
    a, wide = floats(i.operands[1]), i.has("U64") or i.has("S64")
    write = set_pair(i.operands[0]) if wide else setter(i.operands[0])
    signed = not (i.has("U32") or i.has("U64"))
    low, high = (-(2.0**31), 2.0**31 - 1) if signed else (0.0, 2.0**32 - 1)
    if wide:
        low, high = (-(2.0**63), 2.0**63 - 1024) if signed else (0.0, 2.0**64 - 2048)

    def run(w: Warp, m: np.ndarray) -> None:
        x = np.clip(np.nan_to_num(np.trunc(a(w).astype(np.float64))), low, high)
        whole = x.astype(I64) if signed else x.astype(U64)
        write(w, m, whole.view(U64) if wide else whole.astype(U32))

    return run


def _false(i: Instruction) -> Action:
    out = set_predicate(i.operands[0])
    return lambda w, m: out(w, m, np.zeros(LANES, bool))


FLOATING: dict[str, Builder] = {
    "FADD": _floating(np.add), "FMUL": _floating(np.multiply), "FFMA": _floating(lambda a, b, c: a * b + c),
    "MUFU": _mufu, "FSETP": _fsetp, "FSET": _fset, "FMNMX": _fmnmx, "FSEL": _fsel, "F2FP": _f2fp, "F2F": _f2f,
    "I2F": _int_to_float, "I2FP": _int_to_float, "F2I": _float_to_int, "FCHK": _false,
    "HADD2": _half_op(np.add), "HMUL2": _half_op(np.multiply), "HFMA2": _half_op(lambda a, b, c: a * b + c),
    "HSET2": _half_set, "HMNMX2": _half_op(_extreme), "VHMNMX": _half_op(_extreme),
}  # fmt: skip
