"""Counts the patches of a whole file."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from blt_kernels.cli.patch.stream import Piece

BINS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 128)  # largest patch length of each bar of the histogram


class Statistics:
    """Counts over a whole stream. Entropies are in nats, lengths in bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        self.patches = 0
        self.lengths: Counter[int] = Counter()
        self.seconds = 0.0
        self._entropy_sum = 0.0
        self._entropy_count = 0
        self._patch_start = 0

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        self.bytes += len(piece.data)
        self.patches += piece.starts.shape[0]
        if piece.entropy is not None:
            self._entropy_sum += float(piece.entropy.double().sum())
            self._entropy_count += piece.entropy.shape[0]
        if piece.starts.shape[0]:
            bounds = torch.cat([torch.tensor([self._patch_start]), piece.starts])
            self._count(bounds.diff())
            self._patch_start = int(piece.starts[-1])

    def finish(self) -> None:
        """Count the last patch."""
        self._count(torch.tensor([self.bytes - self._patch_start]))

    def _count(self, lengths: Tensor) -> None:
        if int(lengths.max()) < 1 << 16:  # counting is many times faster than sorting
            counts = lengths.bincount()
            values = counts.nonzero()[:, 0]
            counts = counts[values]
        else:
            values, counts = lengths.unique(return_counts=True)
        self.lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        del self.lengths[0]  # no patch ends at the first start of a stream

    @property
    def mean(self) -> float | None:
        """Mean patch length; None without patches."""
        return self.bytes / self.patches if self.patches else None

    @property
    def median(self) -> float | None:
        """Median patch length; None without patches."""
        if not self.patches:
            return None
        lengths = sorted(self.lengths)
        ranks = list(accumulate(self.lengths[length] for length in lengths))  # patches up to each length
        low, high = (lengths[bisect_right(ranks, k)] for k in ((self.patches - 1) // 2, self.patches // 2))
        return (low + high) / 2

    @property
    def entropy(self) -> float | None:
        """Mean entropy of a byte; None where none was computed."""
        return self._entropy_sum / self._entropy_count if self._entropy_count else None

    def histogram(self) -> list[tuple[str, int]]:
        """Return bars (range of lengths, patches), without empty bars at the end."""
        bars, low = [], 1
        for high in (*BINS, None):
            inside = sum(n for length, n in self.lengths.items() if low <= length and (high is None or length <= high))
            label = f"> {low - 1}" if high is None else f"{low}" if low == high else f"{low}-{high}"
            bars.append((label, inside))
            low = (high or 0) + 1
        while bars and not bars[-1][1]:
            bars.pop()
        return bars

    def record(self) -> dict[str, Any]:
        """Return the counts as a JSON object."""
        return {
            "bytes": self.bytes,
            "patches": self.patches,
            "mean": self.mean,
            "median": self.median,
            "min": min(self.lengths, default=None),
            "max": max(self.lengths, default=None),
            "entropy_mean": self.entropy,
            "seconds": round(self.seconds, 6),
            "bytes_per_second": round(self.bytes / self.seconds) if self.seconds else None,
            "lengths": {str(length): self.lengths[length] for length in sorted(self.lengths)},
        }
