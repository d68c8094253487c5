"""Cross entropy of an output head in plain PyTorch: the specification of `ops.linear_cross_entropy`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.reference._ragged import accumulator


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100
) -> Tensor:
    """-log softmax(hidden @ weight.T + bias)[target] in nats, 0 where the target is `ignore_index`."""
    return linear_cross_entropy_fwd_reference(hidden, weight, targets, bias, ignore_index)[0]


def linear_cross_entropy_fwd_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss and ``log_sum = logsumexp(x - max x)``; log_sum is NaN for a target that is no column of the logits."""
    x = F.linear(hidden, weight, bias).to(accumulator(hidden))
    x = x - x.amax(-1, keepdim=True)
    ignored, column = targets == ignore_index, targets.long().clamp(0, weight.shape[0] - 1)
    log_sum = x.logsumexp(-1).masked_fill((targets != column) & ~ignored, torch.nan)
    loss = log_sum - x.gather(-1, column[..., None])[..., 0]
    return loss.masked_fill(ignored, 0), log_sum


def linear_cross_entropy_bwd_reference(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, from dloss/dx = softmax(x) - onehot(target)."""
    x = F.linear(hidden, weight, bias).to(log_sum.dtype)
    p = (x - x.amax(-1, keepdim=True) - log_sum[:, None]).exp()
    onehot = (targets[:, None] == torch.arange(weight.shape[0], device=targets.device)).to(p.dtype)
    grad = (grad_loss[:, None] * (p - onehot)).masked_fill((targets == ignore_index)[:, None], 0).to(hidden.dtype)
    return grad @ weight, grad.mT @ hidden, grad.sum(0)
