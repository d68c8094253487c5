"""An interpolated order-3 n-gram model over bytes, as a baseline.

A byte is predicted from the three bytes before it (BOS in place of bytes before the first), by Witten-Bell
interpolation of the orders 3, 2, 1, 0 with the uniform distribution over 256 bytes:

    P_k(b | c) = (count(c b) + distinct(c) P_{k-1}(b | c')) / (count(c) + distinct(c))

where c is the last k bytes, c' the last k - 1, count(c) the number of bytes after c in the training text and
distinct(c) the number of different ones. Contexts that are not in the text back off to P_{k-1}. (Witten and Bell 1991;
Chen and Goodman 1998, section 2.4.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from blt_kernels.ids import ALPHABET, BOS
from blt_kernels.train import data
from blt_kernels.train.data import Row, Source, read_ids

ORDER = 3
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class _Table:
    """Maps sorted keys to numbers."""

    keys: np.ndarray
    values: np.ndarray

    def __getitem__(self, keys: np.ndarray) -> np.ndarray:
        if not len(self.keys):
            return np.zeros(keys.shape)
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.values[at], 0)


class NgramModel:
    """Counts contexts and the bytes after them, for the orders 0 to 3."""

    def __init__(self, windows: _Table) -> None:
        self.followers, self.totals, self.distinct = [], [], []
        for order in range(ORDER + 1):
            followers = _sum_by_key(windows.keys % ALPHABET ** (order + 1), windows.values)
            contexts = followers.keys // ALPHABET
            self.followers.append(followers)
            self.totals.append(_sum_by_key(contexts, followers.values))
            self.distinct.append(_sum_by_key(contexts, np.ones_like(followers.values)))

    @staticmethod
    def train(sources: Sequence[Source]) -> NgramModel:
        """Count the bytes of files.

        Tables of equally many blocks are merged, as the digits of a binary counter are: a count is copied
        ``log2(blocks)`` times, however many different windows there are.
        """
        tables: list[tuple[int, _Table]] = []  # (number of blocks, their table)
        for rows in data.group_rows(_chunks(sources), _BLOCK_BYTES):
            windows = np.concatenate([_windows(row) for row in rows])
            blocks, table = 1, _sum_by_key(windows, np.ones(len(windows), dtype=np.int64))
            while tables and tables[-1][0] == blocks:
                table, blocks = _merge([tables.pop()[1], table]), 2 * blocks
            tables.append((blocks, table))
        return NgramModel(_merge([table for _, table in tables]))

    def probability(self, windows: np.ndarray) -> np.ndarray:
        """Return P(last byte | the three before it) of windows of four ids, each a number in base 260; fp64."""
        p = np.full(windows.shape, 1 / 256)
        for order in range(ORDER + 1):
            window = windows % ALPHABET ** (order + 1)
            total, distinct = self.totals[order][window // ALPHABET], self.distinct[order][window // ALPHABET]
            mixed = (self.followers[order][window] + distinct * p) / np.maximum(total + distinct, 1)
            p = np.where(total > 0, mixed, p)
        return p

    def measure(self, sources: Sequence[Source]) -> float:
        """Return bits per byte on files."""
        bits, size = 0.0, 0
        for row in _chunks(sources):
            bits -= float(np.log2(self.probability(_windows(row))).sum())
            size += row.length
        return bits / max(size, 1)


def _chunks(sources: Sequence[Source]) -> Iterator[Row]:
    """Yield the bytes of all files, without BOS and EOS, in rows of at most `_BLOCK_BYTES`."""
    for source in sources:
        for start in range(0, source.size, _BLOCK_BYTES):  # byte i of the file is id i + 1 of the document
            yield Row(source, start + 1, min(_BLOCK_BYTES, source.size - start))


def _windows(row: Row) -> np.ndarray:
    """Return every byte of a row with the three ids before it, oldest first, as a number in base 260: int64."""
    source, start, count = row
    first = max(start - ORDER, 0)
    ids = read_ids(source, first, start + count - first).astype(np.int64)
    ids = np.pad(ids, (count + ORDER - len(ids), 0), constant_values=BOS)
    return sum((ids[j : j + count] * ALPHABET ** (ORDER - j) for j in range(ORDER + 1)), np.zeros(count, np.int64))


def _merge(tables: Sequence[_Table]) -> _Table:
    empty = np.empty(0, dtype=np.int64)
    keys, values = ([empty, *(getattr(table, name) for table in tables)] for name in ("keys", "values"))
    return _sum_by_key(np.concatenate(keys), np.concatenate(values))


def _sum_by_key(keys: np.ndarray, values: np.ndarray) -> _Table:
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return _Table(keys[first], np.add.reduceat(values, first) if len(first) else values)
