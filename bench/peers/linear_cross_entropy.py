"""linear_cross_entropy is compared with these peers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def stored(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the losses of logits that are stored, in fp32 from the logits on."""
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, reduction="none")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 1024) -> Tensor:
    """Do the same for a chunk of rows at a time, with logits that backward computes anew."""
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(stored, x, weight, t, use_reentrant=False) for x, t in chunks])
