"""Peers of boundary_patch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def eager_patches(marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return patch_ids, patch_offsets and cu_patches of marks ``[B, S]`` at the starts of patches.

    Ids and cu_patches are counts, as in H-Net. There are as many offsets as patches, so that the host waits for the
    device.
    """
    rows, size = marks.shape
    starts = F.pad(marks[:, 1:], (1, 0), value=True).flatten()
    order = starts.cumsum(0)
    offsets = F.pad(starts.nonzero()[:, 0], (0, 1), value=rows * size)
    return order - 1, offsets, F.pad(order[size - 1 :: size], (1, 0))
