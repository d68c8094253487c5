"""Reads files as documents of byte ids, and packs them into batches that are a pure function of (seed, step).

A document is BOS, the bytes of one file (id = byte + 4), EOS. Documents are cut into pieces of at most `context` ids,
of which the first repeats the last of the piece before: so every id but BOS is predicted once. A batch is the pieces of
a shuffled epoch end to end, cut every `batch_bytes` ids, with one row of `cu_seqlens` a piece. Files are read when a
batch needs them; only a table of pieces (40 bytes each) stays in memory.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blt_kernels._files import opened
from blt_kernels.ids import to_ids
from blt_kernels.train import checks

SKIPPED_DIRECTORIES = ("__pycache__", "site-packages", "node_modules", ".*")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file that holds documents: its path, its length in bytes, the SHA-256 of its content."""

    path: Path
    size: int
    digest: str


class Row(NamedTuple):
    """Ids ``[start, start + length)`` of a document."""

    source: Source
    start: int
    length: int


def find_sources(
    paths: Sequence[str | os.PathLike[str]], include: Sequence[str] = ("*",), left_out: Path | None = None
) -> list[Source]:
    """Return the files under `paths`, in the order of their content's digest.

    A file that is named is always taken. Directories are walked: names must match one of the `include` patterns, and
    binary files (a zero byte among the first 8192), hidden and `SKIPPED_DIRECTORIES` are left out, and so is
    the directory `left_out`. Empty files hold nothing to learn, and of identical files one is kept.

    Raises
    ------
    FileNotFoundError
        A path does not exist.
    ValueError
        Nothing is left.
    """
    found: dict[str, Source] = {}
    if list(include) != ["*"] and not any(Path(path).is_dir() for path in paths):
        raise ValueError(f"include: expected a directory among the paths, got {', '.join(map(str, paths))}")
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"paths: no such file or directory: {path}")
        if not path.is_file() and not path.is_dir():  # a pipe can be read only once, and /dev/zero has no end
            raise ValueError(f"paths: expected a file or a directory, got {path}")
        for file in [path] if path.is_file() else _walk(path, include, left_out):
            digest, size = file_digest(file)
            if size and (digest not in found or file < found[digest].path):
                found[digest] = Source(file, size, digest)
    if not found:
        raise ValueError(f"paths: no files to read in {', '.join(map(str, paths))} that match {', '.join(include)}")
    return [found[digest] for digest in sorted(found)]


def split_sources(sources: Sequence[Source], heldout: float, seed: int) -> tuple[list[Source], list[Source]]:
    """Split into training and held-out files: those are held out whose hash with `seed`, as a fraction, is < `heldout`.

    The content alone decides, so that the split is the same wherever the files lie, and for a file in any set of files.
    """
    checks.check_fraction("heldout", heldout)
    train: list[Source] = []
    held: list[Source] = []
    for source in sources:
        key = hashlib.sha256(f"{seed}:{source.digest}".encode()).digest()
        (held if int.from_bytes(key[:8], "big") / 2**64 < heldout else train).append(source)
    return train, held


class Pieces:
    """Lists the pieces of documents with `sizes` bytes: number of the document, first id and length of each piece."""

    def __init__(self, sizes: Sequence[int], context: int) -> None:
        ids = np.array(sizes, dtype=np.int64) + 2
        counts = num_pieces(ids - 2, context)
        self.first = counts.cumsum() - counts  # the first piece of each document
        self.source = np.repeat(np.arange(len(ids)), counts)
        self.start = (np.arange(len(self.source)) - self.first[self.source]) * (context - 1)
        self.length = np.minimum(context, ids[self.source] - self.start)

    def row(self, sources: Sequence[Source], number: int) -> Row:
        """Return a piece of the documents in `sources`."""
        return Row(sources[self.source[number]], int(self.start[number]), int(self.length[number]))


class PackedBatches(Pieces):
    """Yields shuffled batches of the documents in `sources` without end.

    Parameters
    ----------
    sources : sequence of Source
    batch_bytes : int
        T, ids in a batch. A smaller corpus gives batches of its own size.
    context : int
        The longest piece of a document, in ids, at least 2.
    seed : int
    """

    def __init__(self, sources: Sequence[Source], batch_bytes: int, context: int, seed: int) -> None:
        super().__init__([source.size for source in sources], context)
        self.sources, self.seed = sources, seed
        self.batch_bytes = int(min(batch_bytes, self.length.sum()))
        self.batches_per_epoch = int(self.length.sum()) // self.batch_bytes
        self._epoch = -1
        self._shared = (-1, 0)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Return batch number `step`: ids int32 ``[T]`` and offsets of its rows int32 ``[R+1]``.

        With `parts`, it has the rows that `share` gives to `part`, which may be none.
        """
        return read_rows(self.rows(step, part, parts))

    def rows(self, step: int, part: int = 0, parts: int = 1) -> list[Row]:
        """Return the rows of `batch`: pieces, or parts of pieces that the ends of batches cut."""
        if self._shared != (step, parts):  # all parts of a step share it
            self._shared, self._step_rows = (step, parts), self._rows(step)
            self._shares = share([row.length for row in self._step_rows], parts)
        return [self._step_rows[i] for i in self._shares[part]]

    def predicted(self, step: int) -> int:
        """Return how many ids of batch number `step` a model predicts: all but the first of each row."""
        return sum(row.length - 1 for row in self._rows(step))

    def _rows(self, step: int) -> list[Row]:
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.length))
            self._ends = self.length[self._order].cumsum()
        low, high = index * self.batch_bytes, (index + 1) * self.batch_bytes
        rows = []
        position, rank = low, int(np.searchsorted(self._ends, low, side="right"))
        while position < high:
            piece, end = self._order[rank], min(int(self._ends[rank]), high)
            start = int(self.start[piece]) + position - int(self._ends[rank] - self.length[piece])
            rows.append(Row(self.sources[self.source[piece]], start, end - position))
            position, rank = end, rank + 1
        return rows


def share(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Divide rows into parts of about the same length: the longest first, each to the part that is shortest so far.

    Returns the indices of each part's rows, in rising order. Where there are too few rows, a part has none.
    """
    totals = [(0, part) for part in range(parts)]  # is a heap
    shares: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, part = totals[0]
        heapq.heapreplace(totals, (total + lengths[i], part))
        shares[part].append(i)
    return [sorted(indices) for indices in shares]


def heldout_batches(sources: Sequence[Source], batch_bytes: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every document once, in order: whole pieces, packed into batches of at most `batch_bytes` ids."""
    return map(read_rows, heldout_rows(sources, batch_bytes, context))


def heldout_rows(sources: Sequence[Source], batch_bytes: int, context: int) -> Iterator[list[Row]]:
    """Yield the rows of `heldout_batches`."""
    pieces = (find_piece(source, i, context) for source in sources for i in range(num_pieces(source.size, context)))
    return group_rows(pieces, batch_bytes)


def group_rows(rows: Iterable[Row], limit: int) -> Iterator[list[Row]]:
    """Yield rows in groups of at most `limit` ids, or of one row."""
    group: list[Row] = []
    size = 0
    for row in rows:
        if group and size + row.length > limit:
            yield group
            group, size = [], 0
        group.append(row)
        size += row.length
    if group:
        yield group


def num_pieces(size: Any, context: int) -> Any:
    """Return into how many pieces a document with `size` bytes is cut, or documents with an array of sizes."""
    return -(-(size + 1) // (context - 1))


def num_ids(sources: Sequence[Source], context: int) -> int:
    """Return the number of ids in all pieces of documents; an id where two pieces meet is in both."""
    return sum(source.size + 1 + num_pieces(source.size, context) for source in sources)


def find_piece(source: Source, number: int, context: int) -> Row:
    """Return piece `number` of a document."""
    start = number * (context - 1)
    return Row(source, start, min(context, source.size + 2 - start))


def piece_of(row: Row, context: int) -> Row:
    """Return the piece that a row is, or is a part of.

    The first id of a piece is the last of the piece before. A row of that id alone is taken to begin its piece.
    """
    last = num_pieces(row.source.size, context) - 1
    return find_piece(row.source, min(row.start // (context - 1), last), context)


def read_rows(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Return rows of documents end to end: ids, int32 ``[T]``, and their offsets, int32 ``[R+1]``."""
    ids = [np.empty(0, np.int32), *(read_ids(*row) for row in rows)]
    offsets = np.cumsum([0, *(row.length for row in rows)], dtype=np.int32)
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(offsets)


def read_ids(source: Source, start: int, length: int) -> np.ndarray:
    """Return ids ``[start, start + length)`` of a document, int32: BOS at 0, then the bytes, EOS last.

    Raises
    ------
    ValueError
        The file has become shorter since it was found.
    """
    first, last = max(start, 1), min(start + length, source.size + 1)
    with opened(source.path) as file:
        file.seek(first - 1)
        data = file.read(last - first)
    if len(data) != last - first:
        raise ValueError(f"{source.path}: expected {source.size} bytes, the file has become shorter")
    return to_ids(data, bos=start < first, eos=last < start + length, dtype=torch.int32).numpy()


def check_patching(name: str, patching: str) -> None:
    """Raise ValueError, opening with `name`, for a scheme of BLT that finds nothing in files: "bpe"."""
    if patching == "bpe":
        message = "expected a rule for the bytes of files, got 'bpe', whose delimiters (id 3) none has"
        raise ValueError(f"{name}: {message}")


def _walk(root: Path, include: Sequence[str], left_out: Path | None) -> Iterator[Path]:
    own = left_out and os.path.realpath(left_out)
    for directory, subdirectories, names in os.walk(root):
        skipped = SKIPPED_DIRECTORIES
        subdirectories[:] = sorted(s for s in subdirectories if not any(fnmatch(s, pattern) for pattern in skipped))
        if own is not None:
            subdirectories[:] = [s for s in subdirectories if os.path.realpath(Path(directory, s)) != own]
        for name in sorted(names):
            file = Path(directory, name)
            if any(fnmatch(name, pattern) for pattern in include) and file.is_file() and not _is_binary(file):
                yield file


def _is_binary(file: Path) -> bool:
    with opened(file) as stream:
        return b"\0" in stream.read(8192)


def file_digest(file: Path) -> tuple[str, int]:
    """Return SHA-256 and size of a file."""
    digest, size = hashlib.sha256(), 0
    with opened(file) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size
