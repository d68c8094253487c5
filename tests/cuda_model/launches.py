"""Launches of the CUDA C++ kernels: their arguments as C++ lays them out, and ragged inputs."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from cuda_model.memory import Array

BYTES, WIDTH, ALPHABET, DOCUMENT = 65536, 1024, 260, 8192
MANY_ROWS = 1 << 20
HEADS, HEAD, QUERIES = 16, 64, 2
TABLES, VOCAB = 6, 500002
PATCHES_A_PERIOD, BYTES_A_PERIOD = 32, 144  # a patch has 4.5 bytes
NO_LIMIT = 0x7FFFFFFF


@dataclass(frozen=True)
class Scalar:
    """Describes a number of an argument list: a format of the struct module and a value."""

    format: str
    value: float


def i64(value: int) -> Scalar:
    return Scalar("q", value)


def i32(value: int) -> Scalar:
    return Scalar("i", value)


def f32(value: float) -> Scalar:
    return Scalar("f", value)


def boolean(value: bool) -> Scalar:
    return Scalar("?", value)


Argument = Scalar | Array | None | list  # a list is a struct, None a null pointer


def alignment(argument: Argument) -> int:
    if isinstance(argument, list):
        return max(alignment(a) for a in argument)
    return struct.calcsize(argument.format) if isinstance(argument, Scalar) else 8


def pack(arguments: list, place: Callable[[Array], int]) -> bytes:
    """Lay out arguments, or members of a struct, as C++ does."""
    data = b""
    for argument in arguments:
        data += bytes(-len(data) % alignment(argument))
        if isinstance(argument, list):
            data += pack(argument, place)
        elif isinstance(argument, Scalar):
            data += struct.pack("<" + argument.format, argument.value)
        else:
            data += struct.pack("<Q", 0 if argument is None else place(argument))
    return data + bytes(-len(data) % alignment(arguments))


@dataclass
class Launch:
    """Describes one launch: a kernel of csrc/cuda/<stem>.cu by its demangled name, its grid and arguments.

    `sample` are the blocks that are executed, and `warps` those of their warps if others do the same on other columns;
    they stand for all. A block of the sample stands for a part of the grid in proportion to its share, by default for
    as much as any other. `times` says how often the launch is made. `threads`, where the grid depends on them, have to
    be those of the kernel's launch bounds.
    """

    stem: str
    kernel: str
    grid: tuple[int, int]
    arguments: list
    sample: list[tuple[int, int]]
    shared: int = 0
    times: int = 1
    warps: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None
    threads: int | None = None


@dataclass
class Library:
    """Describes a launch of the driver or of torch by its work: bytes to and from memory, bytes of L2, and flops."""

    name: str
    moved: float
    l2: float = 0.0
    flops: float = 0.0
    times: int = 1


def product(name: str, m: int, n: int, k: int, moved: float, times: int = 1) -> Library:
    """Return a bf16 product of torch's in tiles of 128 x 128; what is not `moved` comes from L2 and stays there."""
    tiles = ceil_div(m, 128) * ceil_div(n, 128)
    return Library(f"{name} [{m}, {n}, {k}]", moved, 2.0 * (m * k + n * k + m * n), 2.0 * 128 * 128 * tiles * k, times)


@dataclass
class Case:
    """Describes one pass of an op at one shape: its launches, its work, and a part of what bench/ calls the shape."""

    op: str
    shape: str
    dtype: str
    launches: list[Launch | Library]
    min_bytes: float
    bench: str = ""
    flops: float = 0.0

    @property
    def stems(self) -> set[str]:
        """Return the launchers that it needs."""
        return {launch.stem for launch in self.launches if isinstance(launch, Launch)}


def data(name: str, values: np.ndarray, resident: bool = False) -> Array:
    """Return an array with contents."""
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    return Array(name, raw.size, raw, resident)


def blocks_at(first: int, count: int, y: int = 0) -> list[tuple[int, int]]:
    return [(n, y) for n in range(first, first + count)]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# --- ragged inputs ----------------------------------------------------------------------------------------------------


@cache
def period() -> tuple[int, ...]:
    """Return lengths of 32 patches that add up to 144, shuffled: geometric with mean 4.5, as in ragged_layout."""
    quantiles = (np.arange(PATCHES_A_PERIOD) + 0.5) / PATCHES_A_PERIOD
    lengths = np.ceil(np.log(1 - quantiles) / math.log(1 - 1 / 4.5)).astype(int).clip(1)
    lengths[-1] += BYTES_A_PERIOD - lengths.sum()
    return tuple(np.random.default_rng(0).permutation(lengths).tolist())


@dataclass(frozen=True)
class Layout:
    """Has the arrays of a PatchLayout, for documents of `DOCUMENT` bytes."""

    offsets: np.ndarray
    cu_patches: np.ndarray
    patch_ids: np.ndarray
    decode_ids: np.ndarray
    decode_offsets: np.ndarray
    cu_seqlens: np.ndarray

    @property
    def patches(self) -> int:
        return len(self.offsets) - 1


@cache
def layout(num_bytes: int = BYTES) -> Layout:
    """Return ragged patches over documents."""
    documents = num_bytes // DOCUMENT
    own: list[int] = []
    while sum(own) < DOCUMENT:
        own.append(min(period()[len(own) % PATCHES_A_PERIOD], DOCUMENT - sum(own)))
    lengths = np.array(own * documents)
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    patch_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    first = np.repeat(np.arange(documents, dtype=np.int32) * len(own), DOCUMENT)
    following = np.append(patch_ids[1:], len(lengths)).astype(np.int32)  # a start behind the last byte is added
    decode_ids = np.where(following - 1 >= first, following - 1, -1).astype(np.int32)
    cu_patches = (np.arange(documents + 1) * len(own)).astype(np.int32)
    # Bytes that read patch p: the first one where it is the first to read p or a later patch of its document.
    decode_offsets = np.searchsorted(np.where(decode_ids < 0, first - 1, decode_ids), np.arange(len(lengths) + 1))
    cu_seqlens = (np.arange(documents + 1) * DOCUMENT).astype(np.int32)
    return Layout(offsets, cu_patches, patch_ids, decode_ids, decode_offsets.astype(np.int32), cu_seqlens)
