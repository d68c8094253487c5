"""Launches of ngram_hash_embed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from cuda_model.launches import (
    ALPHABET,
    BYTES,
    TABLES,
    VOCAB,
    WIDTH,
    Array,
    Case,
    Launch,
    Library,
    Scalar,
    blocks_at,
    ceil_div,
    data,
    i32,
    i64,
    layout,
)

PRIMES = (1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133, 2860486313,
          5463458053, 3367900313)  # fmt: skip
LISTS = TABLES + 1
SORT_TILE, CHUNK, LEVELS = 2048, 64, 2


def modulus(divisor: int) -> list:
    bits = (divisor - 1).bit_length()
    quotient = (((1 << bits) - divisor) << 64) // divisor
    return [Scalar("Q", n) for n in (divisor, quotient + 1, (1 << 64) % divisor)] + [i32(bits)]


def ngrams() -> list:
    sizes = [*range(3, 9)] + [0] * 122
    rows, functions = [Scalar("I", 0)] * 128, [Scalar("B", 0)] * 128  # equal tables, of the first function
    primes = [Scalar("Q", p) for p in PRIMES]
    return [primes, [i64(n) for n in sizes], rows, functions, i32(TABLES), i32(1), modulus(VOCAB)]


@cache
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(4, ALPHABET, BYTES).astype(np.int64)


def text() -> list:
    own = layout()
    return [
        data("tokens", tokens(), True),
        data("cu_seqlens", own.cu_seqlens, True),
        i64(BYTES),
        i64(len(own.cu_seqlens) - 1),
        i32(0),  # documents without offsets have this length
    ]


def shard() -> list:
    return [Scalar("Q", 0), Scalar("Q", VOCAB), i64(ALPHABET)]


def table_rows(name: str) -> list:
    rows = [VOCAB] * TABLES + [ALPHABET]
    first: list = [Array(name if r == VOCAB else f"byte {name}", r * WIDTH * 2, resident=r == ALPHABET) for r in rows]
    first += [None] * (129 - len(first))
    return [first, [i64(WIDTH)] * LISTS + [i64(0)] * (129 - LISTS)]


@cache
def sorted_readers() -> np.ndarray:
    """Return readers[lists][bytes] of uniform rows, sorted: pairs of row and byte."""
    rows = np.random.default_rng(1).integers(0, VOCAB, (LISTS, BYTES)).astype(np.uint32)
    rows[-1] = tokens()
    order = np.argsort(rows, axis=1, kind="stable").astype(np.uint32)
    return np.stack([np.take_along_axis(rows, order.astype(np.int64), 1), order], 2)


def readers_array(name: str = "readers") -> Array:
    return data(name, sorted_readers(), True)


def sort_launches() -> list[Launch]:
    tiles, stem = BYTES // SORT_TILE, "ngram_hash_embed"
    grid, sample = (tiles, LISTS), [(8, 1), (24, 5)]
    counts = data("counts", np.full(LISTS * tiles * 256, 8, np.uint32), True)
    unsorted = np.stack([np.random.default_rng(2).integers(0, VOCAB, (LISTS, BYTES)), np.zeros((LISTS, BYTES))], 2)
    source = data("unsorted", unsorted.astype(np.uint32), True)
    to = Array("to", LISTS * BYTES * 8, resident=True)
    places = data("places", (np.arange(LISTS * tiles * 256) % 256 * 256).astype(np.uint32), True)
    return [
        Launch(stem, r"ngram_readers_kernel<long long>", grid,
               [text(), ngrams(), shard(), i32(VOCAB), Array("readers", LISTS * BYTES * 8, resident=True), counts],
               sample),
        Launch(stem, r"radix_count_kernel", grid, [source, i64(BYTES), i32(8), counts], sample, times=2),
        Launch(stem, r"radix_scan_kernel", (LISTS, 1), [counts, i64(tiles)], [(2, 0)], times=3),
        Launch(stem, r"radix_scatter_kernel", grid, [source, i64(BYTES), i32(8), places, to], sample, times=3),
    ]  # fmt: skip


def reader_struct() -> list:
    sums = Array("sums", LISTS * (BYTES // CHUNK + BYTES // CHUNK**2) * WIDTH * 4)
    rows = Array("grad_out", BYTES * WIDTH * 2, passes=LISTS)
    return [readers_array(), i64(BYTES), rows, i64(WIDTH), i64(WIDTH), sums, i32(LISTS), i32(LEVELS)]


@cache
def runs() -> np.ndarray:
    """Return for readers [lists][bytes] whether a run begins there."""
    return np.diff(sorted_readers()[:, :, 0].astype(np.int64), axis=1, prepend=-1) != 0


def run_struct(owned: int) -> list:
    """Return where runs begin, how many there are of each list, and how many a block owns."""
    starts, totals = np.zeros((LISTS, BYTES + 1), np.uint32), runs().sum(1).astype(np.int32)
    for n, own in enumerate(runs()):
        starts[n, : totals[n]], starts[n, totals[n]] = np.flatnonzero(own), BYTES
    return [data("starts", starts, True), data("totals", totals, True), i32(owned)]


def run_launches() -> list[Launch]:
    """Runs of sorted readers, and the sums of their chunks."""
    stem, tiles = "ngram_hash_embed", BYTES // SORT_TILE
    grid, sample = (tiles, LISTS), [(8, 1), (24, 5)]
    counts = data("run_counts", np.full(tiles * LISTS, 1800, np.uint32), True)
    starts, totals = Array("starts", LISTS * (BYTES + 1) * 4, None, True), Array("totals", LISTS * 4, None, True)
    sums = [
        Launch(stem, r"ngram_chunk_sums_kernel<__nv_bfloat16, 8>", (BYTES // CHUNK**level, LISTS),
               [reader_struct(), i32(level), i32(VOCAB)],
               [(x, y) for x in range(1, 1000, 250) for y in range(LISTS) if x < BYTES // CHUNK**level])
        for level in range(1, LEVELS + 1)
    ]  # fmt: skip
    return [
        Launch(stem, r"run_count_kernel", grid, [readers_array(), i64(BYTES), counts], sample),
        Launch(stem, r"run_scan_kernel", (LISTS, 1), [counts, i64(tiles)], [(2, 0)]),
        Launch(stem, r"run_starts_kernel", grid,
               [readers_array(), i64(BYTES), i32(VOCAB), counts, starts, totals], sample),
        *sums,
    ]  # fmt: skip


def owner_launches(kernel: str, max_runs: tuple[int, int], gradients: list) -> list[Launch]:
    """Return the launches for the hashed tables and for the byte table, which have at most this many runs."""
    launches = []
    for most, first, lists in ((max_runs[0], 0, TABLES), (max_runs[1], TABLES, 1)):
        owned = max(1, min(8, 8 * most // BYTES))
        blocks = ceil_div(most, owned)
        sample = [(blocks * n // 8, y) for n in range(8) for y in {n % lists}]
        arguments = [reader_struct(), run_struct(owned), i32(first), gradients]
        launches.append(Launch("ngram_hash_embed", kernel, (blocks, lists), arguments, sample))
    return launches


def dense_gradient() -> list[Launch | Library]:
    zeros = Library("memset", (TABLES * VOCAB + ALPHABET) * WIDTH * 2 / LISTS, times=LISTS)
    kernel = r"ngram_hash_embed_bwd_kernel<__nv_bfloat16, 8>"
    return [zeros, *sort_launches(), *run_launches(), *owner_launches(kernel, (BYTES, ALPHABET), table_rows("grad"))]


def sparse_gradient() -> list[Launch | Library]:
    found, pad = runs().sum(1).tolist(), [None] * (129 - LISTS)
    rows: list = [Array("rows" if n < TABLES else "byte rows", count * 8) for n, count in enumerate(found)]
    values: list = [Array("values" if n < TABLES else "byte values", c * WIDTH * 2) for n, c in enumerate(found)]
    first_rows = [i64(n * VOCAB) for n in range(TABLES)] + [i64(0)] * (129 - TABLES)
    gradients = [[*rows, *pad], [*values, *pad], first_rows]
    kernel = r"ngram_hash_embed_sparse_bwd_kernel<__nv_bfloat16, 8>"
    return [*sort_launches(), *run_launches(), *owner_launches(kernel, (max(found[:-1]), found[-1]), gradients)]


def ngram_cases() -> Iterator[Case]:
    row, shape = WIDTH * 2, f"{TABLES} x [{VOCAB}, {WIDTH}], {BYTES} bytes"
    blocks = ceil_div(BYTES, 16)
    forward = Launch(
        "ngram_hash_embed", r"ngram_hash_embed_fwd_kernel<__nv_bfloat16, long long, 8>", (blocks, 1),
        [text(), ngrams(), shard(), table_rows("table"), i64(WIDTH), Array("out", BYTES * row)],
        blocks_at(blocks // 2, 2), shared=16 * LISTS * 8,
    )  # fmt: skip
    yield Case("ngram_hash_embed fwd", shape, "bfloat16", [forward], (TABLES + 1) * BYTES * row)
    read = LISTS * BYTES * row
    dense = read + (TABLES * VOCAB + ALPHABET) * row
    written = int(runs().sum()) * row
    yield Case("ngram_hash_embed dense bwd", shape, "bfloat16", dense_gradient(), dense)
    yield Case("ngram_hash_embed sparse bwd", shape, "bfloat16", sparse_gradient(), read + written)
