"""Entropy patches of the study: the entropies of all training text are computed once, and cut by every model's rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blt_kernels._files import whole_file
from blt_kernels.layout import PatchLayout
from blt_kernels.models import ByteLM
from blt_kernels.models.threshold import find_threshold
from blt_kernels.ops.entropy_patch import patch_starts
from blt_kernels.ops.token_entropy import token_entropy
from blt_kernels.train import data

_CALL_IDS = 1 << 15


class Entropies:
    """Holds the entropy in nats of every id of the training files, and computes those of other text.

    A file is read in pieces of `context` ids, as in training, so an id is predicted from those of its piece.
    """

    def __init__(self, patcher: ByteLM, sources: Sequence[data.Source], context: int, path: Path) -> None:
        self.patcher = patcher.eval()
        sizes = [source.size + 2 for source in sources]
        ends = np.cumsum([0, *sizes])
        self._start = {source.digest: int(start) for source, start in zip(sources, ends[:-1], strict=True)}
        if not path.exists():
            stored = np.zeros(int(ends[-1]), np.float32)
            for rows in data.heldout_rows(sources, _CALL_IDS, context):
                found = self.of(*data.read_rows(rows)).numpy()
                position = 0
                for row in rows:
                    # The first id of a piece is the last of the piece before, which knew what comes before it.
                    skipped = int(row.start > 0)
                    first = self._start[row.source.digest] + row.start + skipped
                    stored[first : first + row.length - skipped] = found[position + skipped : position + row.length]
                    position += row.length
            with whole_file(path) as part, part.open("wb") as file:
                np.save(file, stored)
        self._stored = np.load(path, mmap_mode="r")

    @torch.no_grad()
    def of(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return the entropies of text."""
        return token_entropy(self.patcher(ids, offsets))

    def of_rows(self, rows: Sequence[data.Row]) -> Tensor:
        """Return the entropies of rows of training files end to end."""
        firsts = [self._start[row.source.digest] + row.start for row in rows]
        parts = [self._stored[first : first + row.length] for first, row in zip(firsts, rows, strict=True)]
        return torch.from_numpy(np.concatenate(parts))


@dataclass(frozen=True)
class Patching:
    """Cuts text into the patches of one model."""

    entropies: Entropies
    threshold: float
    rule: dict[str, Any]

    def of_rows(self, rows: Sequence[data.Row], offsets: Tensor) -> PatchLayout:
        """Return the patches of rows of training files."""
        return self._cut(self.entropies.of_rows(rows), offsets)

    def of(self, ids: Tensor, offsets: Tensor) -> PatchLayout:
        """Return the patches of other text."""
        return self._cut(self.entropies.of(ids, offsets), offsets)

    def _cut(self, entropy: Tensor, offsets: Tensor) -> PatchLayout:
        return patch_starts(entropy, offsets, threshold=self.threshold, **self.rule).compact()


def choose_patching(
    entropies: Entropies, rule: dict[str, Any], patch_size: float, rows: Sequence[data.Row]
) -> Patching:
    """Return the patching whose patches have `patch_size` bytes on average on rows of training files."""
    entropy = entropies.of_rows(rows)
    offsets = torch.tensor(np.cumsum([0, *(row.length for row in rows)]), dtype=torch.int32)

    def mean_size(threshold: float) -> float:
        return len(entropy) / int(patch_starts(entropy, offsets, threshold=threshold, **rule).cu_patches[-1])

    return Patching(entropies, find_threshold(mean_size, entropy, patch_size), rule)
