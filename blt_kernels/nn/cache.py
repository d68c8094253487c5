"""Rows keep entries from call to call in buffers that grow, keys and values of self-attention among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blt_kernels._checks import Documents
from blt_kernels.nn.config import TransformerConfig

_BLOCK = 64  # entries by which a buffer grows at least
_FEW = 256  # numbers that are faster to list in Python than to make by a call of torch for each row
_SHARED = 64  # tensors of up to this many numbers are shared


def numbers(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of these numbers. It is read-only, since several parts of a step may share it."""
    if len(values) > _SHARED or device.type != "cpu":
        return torch.tensor(values, dtype=dtype, device=device)
    return _shared_numbers(tuple(values), dtype)


@lru_cache(maxsize=32)  # enough for a step or two
def _shared_numbers(values: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device="cpu")  # whatever the default device is


def runs(start: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """Return ``start[r], start[r] + 1, ...`` of ``counts[r]`` numbers for every r, end to end, int64, as `numbers`."""
    if sum(counts) <= _FEW:
        values = [x for s, n in zip(start, counts, strict=True) for x in range(s, s + n)]
        return numbers(values, torch.int64, device)
    parts = [torch.arange(s, s + n, device=device) for s, n in zip(start, counts, strict=True)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Slots(NamedTuple):
    """Lists entries of a `RowBuffer`: ``counts[r]`` of row r from slot ``begin[r]`` on, which may be none."""

    begin: list[int]
    counts: list[int]

    def run(self) -> tuple[int, int] | None:
        """Return the first slot and the count if all entries are of one row, else None."""
        rows = [r for r, n in enumerate(self.counts) if n]
        return (self.begin[rows[0]], self.counts[rows[0]]) if len(rows) == 1 else None

    def tensor(self, device: torch.device) -> Tensor:
        """Return all slots, int64 ``[T]``."""
        return runs(self.begin, self.counts, device)


class RowBuffer:
    """Holds the last entries of every row, in one or several tensors of the same positions.

    Parameters
    ----------
    rows : int
    shapes : sequence of tuple
        Shape of an entry in each tensor.
    keep : int, optional
        How many of its last entries a row keeps at least; all of them if None.
    dtype, device

    Attributes
    ----------
    flat : list of ``[rows * capacity, *shape]``
        Entry ``r * capacity + j`` belongs to position ``first[r] + j`` of row r.
    capacity : int
        The entries that a row has room for.
    first, end : list of int
        Row r holds positions ``[first[r], end[r])``.
    needed : list of int, optional
        The first position that row r has to keep; those of `keep` if None. The owner of the buffer sets it.
    """

    def __init__(
        self, rows: int, shapes: Sequence[tuple[int, ...]], keep: int | None, *, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            self.flat = [torch.zeros(0, *shape, dtype=dtype, device=device) for shape in shapes]
        self.capacity = 0
        self.first, self.end, self.keep = [0] * rows, [0] * rows, keep
        self.needed: list[int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(x.nbytes for x in self.flat)

    def append(self, counts: Sequence[int]) -> Slots:
        """Make room for `counts` new entries a row. Return where they go in the flattened tensors."""
        if max((e - f + n for e, f, n in zip(self.end, self.first, counts, strict=True)), default=0) > self.capacity:
            self._resize(counts)
        old = self.end
        self.end = [e + n for e, n in zip(old, counts, strict=True)]
        return self.slots(old, self.end)

    def slots(self, start: Sequence[int], stop: Sequence[int]) -> Slots:
        """Return where positions ``[start[r], stop[r])`` of every row are in the flattened tensors."""
        begin = [r * self.capacity + s - f for r, (s, f) in enumerate(zip(start, self.first, strict=True))]
        return Slots(begin, [b - a for a, b in zip(start, stop, strict=True)])

    def write(self, slots: Slots, *values: Tensor) -> None:
        """Write packed entries ``[T, *shape]`` of each tensor where `append` said."""
        run = slots.run()
        if run:
            for flat, value in zip(self.flat, values, strict=True):
                flat.narrow(0, *run).copy_(value)
            return
        index = slots.tensor(self.flat[0].device)
        for flat, value in zip(self.flat, values, strict=True):
            flat.index_copy_(0, index, value.to(flat.dtype))

    def read(self, start: Sequence[int], stop: Sequence[int]) -> list[Tensor]:
        """Return positions ``[start[r], stop[r])`` of every row, packed; maybe as views, which later calls change."""
        slots = self.slots(start, stop)
        run = slots.run()
        if run:
            return [x.narrow(0, *run) for x in self.flat]
        index = slots.tensor(self.flat[0].device)
        return [x.index_select(0, index) for x in self.flat]

    def holds(self, position: Sequence[int]) -> list[bool]:
        """Return for every row whether nothing is missing from ``position[r]`` on."""
        return [f <= max(0, p) for f, p in zip(self.first, position, strict=True)]

    def trim(self) -> None:
        """Give back memory, if rows have room for many times what they have to keep."""
        if self.capacity > 8 * _BLOCK:
            kept = max((e - f for e, f in zip(self.end, self._first_needed(), strict=True)), default=0)
            if self.capacity > 4 * (kept + _BLOCK):
                self._resize([0] * len(self.end))

    def truncate(self, end: Sequence[int]) -> None:
        """Forget the entries from position ``end[r]`` on."""
        self.end = [min(old, new) for old, new in zip(self.end, end, strict=True)]
        self.first = [min(f, e) for f, e in zip(self.first, self.end, strict=True)]

    @torch.inference_mode(False)
    def select(self, rows: Sequence[int]) -> None:
        """Keep the rows of these numbers, in this order; a number may come several times, or be -1 for an empty row."""
        index = torch.tensor([max(r, 0) for r in rows], dtype=torch.int64, device=self.flat[0].device)
        old, count = len(self.end), len(rows) * self.capacity
        self.flat = [
            x.view(old, self.capacity, *x.shape[1:]).index_select(0, index).flatten(0, 1)
            if old
            else x.new_zeros(count, *x.shape[1:])
            for x in self.flat
        ]
        self.first, self.end = ([0 if r < 0 else n[r] for r in rows] for n in (self.first, self.end))
        self.needed = None if self.needed is None else [0 if r < 0 else self.needed[r] for r in rows]

    def _first_needed(self) -> list[int]:
        if self.needed is not None:
            return [max(f, n) for f, n in zip(self.first, self.needed, strict=True)]
        if self.keep is None:
            return self.first
        return [max(f, e - self.keep) for f, e in zip(self.first, self.end, strict=True)]

    @torch.inference_mode(False)
    def _resize(self, counts: Sequence[int]) -> None:
        """Drop the entries that need not be kept, and leave room for `counts` new ones and some more."""
        first = self._first_needed()
        width = max((e - f + n for e, f, n in zip(self.end, first, counts, strict=True)), default=0)
        capacity = -(-(width + max(_BLOCK, width // 4)) // _BLOCK) * _BLOCK
        kept = [e - f for e, f in zip(self.end, first, strict=True)]
        source = self.slots(first, self.end).tensor(self.flat[0].device)
        target = runs(range(0, len(kept) * capacity, capacity), kept, source.device)
        flat = [
            x.new_zeros(len(kept) * capacity, *x.shape[1:]).index_copy_(0, target, x.index_select(0, source))
            for x in self.flat
        ]
        self.first, self.capacity, self.flat = first, capacity, flat  # all at once: an interruption changes nothing


def of_layers(documents: Any, num_layers: int) -> list[Any]:
    """Return what each layer is given: its own `CachedKeys`, or the same documents as all others."""
    return documents if isinstance(documents, list) else [documents] * num_layers


@dataclass
class CachedKeys:
    """The keys and values of one layer: `SelfAttention` takes them in the place of documents.

    Attributes
    ----------
    keys, values : ``[rows * capacity, G, E]``
    index : int64 ``[T]``
        Where the new keys go.
    documents : dict
        ``cu_seqlens_q`` and ``cu_seqlens_k`` of the attention op.
    offsets : (int32 ``[B+1]``, int32 ``[B+1]``), optional
        The same as tensors; None where the ops are the reference.
    """

    keys: Tensor
    values: Tensor
    index: Tensor
    documents: dict[str, Any]
    offsets: tuple[Tensor, ...] | None = None

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values, and return those of all rows."""
        self.keys.index_copy_(0, self.index, k.to(self.keys.dtype))  # autocast computes keys in another dtype
        self.values.index_copy_(0, self.index, v.to(self.values.dtype))
        return self.keys, self.values


class KeyCache(RowBuffer):
    """Holds the keys and values of every layer of a stack.

    Parameters
    ----------
    rows : int
    config : TransformerConfig
    undo : int
        How many entries `truncate` can take back without an entry missing in the window of those before.
    dtype, device
    """

    def __init__(
        self, rows: int, config: TransformerConfig, undo: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = [(config.kv_heads, config.head_dim)] * (2 * config.num_layers)
        self.window = config.window
        keep = None if config.window is None else config.window - 1 + undo
        super().__init__(rows, shapes, keep, dtype=dtype, device=device)

    def holds_windows(self, lengths: Sequence[int]) -> list[bool]:
        """Return for every row whether all keys that its entries from ``lengths[r]`` on attend to are still there."""
        return self.holds([0 if self.window is None else n - self.window + 1 for n in lengths])

    def extend(self, ops: SimpleNamespace, counts: Sequence[int], starts: Sequence[Sequence[int]]) -> list[CachedKeys]:
        """Make room for new entries; return for every layer where they go and what they attend to.

        Parameters
        ----------
        ops : namespace
            Of `load_ops`.
        counts : sequence of int
            New entries of each row.
        starts : sequence of sequence of int
            Where documents start in each row, in rising order: the document of the first new entry, and those after it.
        """
        old = self.end
        index = self.append(counts).tensor(self.flat[0].device)
        documents = self._documents(ops, old, counts, starts)
        checked = [d.offsets for d in documents.values() if isinstance(d, Documents)]
        return [
            CachedKeys(k, v, index, documents, tuple(checked) or None)
            for k, v in zip(self.flat[::2], self.flat[1::2], strict=True)
        ]

    def _documents(
        self, ops: SimpleNamespace, old: Sequence[int], counts: Sequence[int], starts: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Return the offsets of documents of queries and keys.

        What lies between the documents with queries is a document without them.
        """
        queries, ends = [0], [0]  # as offsets
        for r, (before, count, first) in enumerate(zip(old, counts, self.first, strict=True)):
            if not count:
                continue
            base, end = r * self.capacity - first, before + count
            begin = max(starts[r][0], first)
            if base + begin > ends[-1]:
                queries.append(queries[-1])
                ends.append(base + begin)
            for start, stop in pairwise((begin, *(s for s in starts[r][1:] if s < end), end)):
                queries.append(queries[-1] + stop - max(start, before))
                ends.append(base + stop)

        def documents(offsets: list[int], total: int) -> Tensor:
            values = numbers(offsets, torch.int32, self.flat[0].device)
            return ops.offsets(Documents(values, total, offsets[-1]))

        slots = len(counts) * self.capacity
        return {"cu_seqlens_q": documents(queries, sum(counts)), "cu_seqlens_k": documents(ends, slots)}
