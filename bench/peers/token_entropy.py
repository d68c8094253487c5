"""token_entropy and linear_entropy are compared with these peers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def eager_entropy(logits: Tensor) -> Tensor:
    """Return the entropy as facebookresearch/blt does, in the dtype of the logits."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p * log_p.exp()).sum(-1)
