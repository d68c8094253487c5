"""Peers of token_entropy and linear_entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def eager_entropy(logits: Tensor) -> Tensor:
    """The entropy of facebookresearch/blt, in the dtype of the logits."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p * log_p.exp()).sum(-1)
