"""Memory of a device and of a block: arrays at addresses, and how instructions name and move what is there."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cuda_model.operands import LANES, U32, UNIFORM, number, row_of
from cuda_model.sass import Instruction

if TYPE_CHECKING:
    from cuda_model.simulate import Warp

# Memory without data holds different numbers near 1, in any type of 16 or 32 bits.
ANYTHING = (np.arange(80, dtype=np.uint16) * 37 % 120 + 0x3F00).view(np.uint8)


@dataclass
class Array:
    """Describes device memory that a kernel is given: its first `size` bytes, backed by `data` or holding anything.

    `resident` memory was written by an earlier kernel of the same op, or is read so often that it stays in L2. Other
    memory is read from the device at most `passes` times in a launch.
    """

    name: str
    size: int
    data: np.ndarray | None = None
    resident: bool = False
    passes: int = 1
    base: int = 0


@dataclass
class Memory:
    """Holds arrays at addresses."""

    arrays: list[Array] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)

    def place(self, array: Array) -> int:
        """Give an array an address, aligned to 512 bytes as torch's allocator does."""
        end = self.arrays[-1].base + self.arrays[-1].size if self.arrays else 1 << 32
        array.base = (end + (1 << 20)) >> 9 << 9
        self.arrays.append(array)
        self.bases.append(array.base)
        return array.base

    def find(self, address: int) -> Array:
        """Return the array that an address is in; raise IndexError beyond all arrays."""
        n = bisect_right(self.bases, address) - 1
        if n < 0 or address >= self.arrays[n].base + self.arrays[n].size:
            where = (
                "before all arrays" if n < 0 else f"{address - self.arrays[n].base} bytes into {self.arrays[n].name}"
            )
            raise IndexError(f"an access {where}, of {0 if n < 0 else self.arrays[n].size}")
        return self.arrays[n]


def access_bytes(i: Instruction) -> int:
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if i.has(name):
            return size
    return 4


def address_getter(text: str) -> Callable[[Warp], np.ndarray]:
    """Return a getter of each lane's address, from ``desc[UR4][R2.64+0x8]`` or ``[R3+UR4+0x400]``."""
    inside = text[text.rindex("[") + 1 : text.rindex("]")]
    offset, rows = 0, []
    for term in inside.replace("+-", "+~").split("+"):
        if term.startswith(("0x", "~0x")):
            offset += -int(term[1:], 16) if term[0] == "~" else int(term, 16)
            continue
        name, _, kind = term.partition(".")
        uniform = name.startswith("U")
        digits = name[2:] if uniform else name[1:]
        if digits != "Z":
            scale = int(kind[1:]) if kind.startswith("X") and kind[1:].isdigit() else 1
            wide = kind == "64" or (uniform and text.startswith("desc") and kind != "U32")
            rows.append((int(digits) + (UNIFORM if uniform else 0), wide, scale))

    def get(warp: Warp) -> np.ndarray:
        total = np.full(LANES, offset, np.int64)
        for row, wide, scale in rows:
            value = warp.regs[row].astype(np.int64)
            total += (value | warp.regs[row + 1].astype(np.int64) << 32 if wide else value) * scale
        return total

    return get


def write_registers(warp: Warp, i: Instruction, mask: np.ndarray, values: np.ndarray, size: int) -> None:
    target = i.operands[0]
    if target.index == 255:
        return
    if size < 4:
        kind = {1: np.uint8, 2: np.uint16}[size]
        word = values.view(kind)[:, 0]
        if i.has("S8") or i.has("S16"):
            word = word.view({1: np.int8, 2: np.int16}[size]).astype(np.int32)
        words = word.astype(np.int64).astype(U32)[:, None]
    else:
        words = np.ascontiguousarray(values).view(U32)
    for n in range(words.shape[1]):
        np.copyto(warp.regs[target.index + n], words[:, n], where=mask)


def register_bytes(warp: Warp, i: Instruction, size: int) -> np.ndarray:
    source = i.operands[-1]
    words = (
        [number(source)(warp)] if source.index == 255 else [warp.regs[row_of(source) + n] for n in range(-(-size // 4))]
    )
    if source.index == 255:
        words = words * -(-size // 4)
    return np.ascontiguousarray(np.stack(words, 1)).view(np.uint8)[:, :size]


def bank_conflicts(address: np.ndarray, size: int) -> int:
    """Return passes of a shared access: 32, 16 or 8 lanes at once, as many as the busiest bank has distinct words."""
    passes, lanes = 0, 32 // max(size // 4, 1)
    for begin in range(0, len(address), lanes):
        words = {int(a) // 4 + n for a in address[begin : begin + lanes] for n in range(max(size // 4, 1))}
        passes += max(Counter(w % 32 for w in words).values())
    return max(passes, 1)
