"""Rows keep entries in buffers of fixed shapes and addresses, so that a CUDA graph of a step can be replayed.

The lengths of rows are tensors on the device. A row appends one entry a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels._checks import Documents
from blt_kernels.nn.cache import CachedKeys, KeyCache, RowBuffer, runs

ROOM = 256  # entries that a row has room for at first, beyond those that it has
LARGE_WINDOW = 4096  # entries; memory for windows from this size on is taken as rows grow


def last_entries(buffer: RowBuffer, width: int) -> list[Tensor]:
    """Return the last entries of every row, ``[rows, width, *shape]``, at the end of the row and behind zeros."""
    rows = len(buffer.end)
    begin = [max(first, end - width) for first, end in zip(buffer.first, buffer.end, strict=True)]
    counts = [end - b for b, end in zip(begin, buffer.end, strict=True)]
    index = runs([(r + 1) * width - n for r, n in enumerate(counts)], counts, buffer.flat[0].device)
    return [
        x.new_zeros(rows * width, *x.shape[1:]).index_copy(0, index, x_read).unflatten(0, (rows, width))
        for x, x_read in zip(buffer.flat, buffer.read(begin, buffer.end), strict=True)
    ]


def slots_of(begin: Sequence[int], end: Sequence[int], period: int, stride: int, device: torch.device) -> Tensor:
    """Return slot ``r * stride + p % period`` of the positions p in ``[begin[r], end[r])`` of every row, int64."""
    numbers = [r * stride + p % period for r, (a, b) in enumerate(zip(begin, end, strict=True)) for p in range(a, b)]
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def right_aligned(counts: Tensor, width: int) -> Documents:
    """Return two documents for each row of `width` entries: the last ``counts[r]`` of them, and those before."""
    rows = counts.shape[0]
    ends = torch.arange(width, rows * width + 1, width, device=counts.device)
    offsets = F.pad(torch.stack([ends - counts, ends], 1).flatten(), (1, 0)).int()
    return Documents(offsets, rows * width, rows * width)


class FixedKeys:
    """Holds the keys and values of every layer of a stack: those that the window of the next entry of a row reaches.

    Position p of a row is in slot ``p % period``. With a window, which is the period then, the same keys are in as many
    slots behind these again, so that a window always lies end to end. Without one, or with a large one, `reserve` makes
    the period longer than all rows. The last slot of a row takes keys that nobody reads.

    Parameters
    ----------
    cache : KeyCache
        Its keys are copied.
    """

    def __init__(self, cache: KeyCache) -> None:
        self.rows, self.device = len(cache.end), cache.flat[0].device
        # Rows alternate with documents that have no queries: the keys between theirs.
        queries = torch.arange(2 * self.rows + 1, device=self.device) // 2
        self.queries = Documents(queries.int(), self.rows, self.rows)
        window, total = cache.window, max(cache.end) + ROOM
        if window is None or window >= max(total, LARGE_WINDOW):
            self.copies, period = 1, total
        else:
            self.copies, period = 2, window
        self._allocate(cache.flat, period)
        begin = [max(first, end - self.period) for first, end in zip(cache.first, cache.end, strict=True)]
        slots = slots_of(begin, cache.end, self.period, self.stride, self.device)
        self._fill(slots, cache.read(begin, cache.end))

    @torch.inference_mode(False)
    def reserve(self, total: int) -> bool:
        """Make room for rows of `total` entries. Return whether the addresses are others now."""
        if self.copies == 2 or total <= self.period:
            return False
        kept = [x.unflatten(0, (self.rows, -1))[:, : self.period].flatten(0, 1) for x in self.flat]
        positions = torch.arange(self.period, device=self.device)
        self._allocate(self.flat, max(total, 2 * self.period))
        self._fill((self.base[:, None] + positions).flatten(), kept)
        return True

    def _allocate(self, like: Sequence[Tensor], period: int) -> None:
        self.period, self.stride = period, self.copies * period + 1
        self.flat = [x.new_zeros(self.rows * self.stride, *x.shape[1:]) for x in like]
        self.base = torch.arange(self.rows, device=self.device) * self.stride

    def _fill(self, slots: Tensor, values: Sequence[Tensor]) -> None:
        for x, kept in zip(self.flat, values, strict=True):
            for copy in range(self.copies):
                x.index_copy_(0, slots + copy * self.period, kept)

    def extend(
        self, ops: SimpleNamespace, position: Tensor, start: Tensor, active: Tensor | None = None
    ) -> list[CachedKeys]:
        """Return for every layer where the next key of each row goes, and which keys the entry attends to.

        Parameters
        ----------
        ops : namespace
            Of `load_ops`.
        position, start : int64 ``[rows]``
            Of the new entries, and where their documents start.
        active : bool ``[rows]``, optional
            Rows that append an entry; the others attend to nothing. All rows if None.
        """
        slot = position % self.period + self.base
        index = torch.stack([slot + copy * self.period for copy in range(self.copies)])
        count = (position + 1 - start).clamp(max=self.period)
        if active is not None:
            index = torch.where(active, index, self.base + self.stride - 1)
            count = count * active
        end = slot + (self.copies - 1) * self.period + 1
        ends = F.pad(torch.stack([end - count, end], 1).flatten(), (1, 0)).int()
        documents = {
            "cu_seqlens_q": ops.offsets(self.queries),
            "cu_seqlens_k": ops.offsets(Documents(ends, self.flat[0].shape[0], None)),
        }
        return [RepeatedKeys(k, v, index, documents) for k, v in zip(self.flat[::2], self.flat[1::2], strict=True)]


class RepeatedKeys(CachedKeys):
    """Holds the keys and values of one layer of `FixedKeys`: ``index[:, r]`` has all slots of the new key of row r."""

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values, and return those of all rows."""
        self.keys[self.index], self.values[self.index] = k.to(self.keys.dtype), v.to(self.values.dtype)
        return self.keys, self.values
