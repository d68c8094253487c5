"""Entropies of logits in plain PyTorch: the specification of `ops.token_entropy`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.reference._ragged import accumulator


def token_entropy_reference(logits: Tensor) -> Tensor:
    """H = -sum p log p in nats over the last dimension, with 0 log 0 = 0; fp32, or fp64 for fp64 logits."""
    return token_entropy_fwd_reference(logits)[0]


def token_entropy_fwd_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and ``log_sum = logsumexp(x - max x)``, which keeps the digits that the gradient needs."""
    x = logits.to(accumulator(logits))
    log_p = x.log_softmax(-1)
    p = log_p.exp()
    log_sum = (x - x.amax(-1, keepdim=True)).logsumexp(-1)
    return -(p * log_p.masked_fill(p == 0, 0)).sum(-1), log_sum


def token_entropy_bwd_reference(grad_entropy: Tensor, logits: Tensor, entropy: Tensor, log_sum: Tensor) -> Tensor:
    """dH/dx = -p (log p + H); 0 for rows whose log_sum is infinite, which `entropy_patch` has not read."""
    x = logits.to(entropy.dtype)
    log_p = x - x.amax(-1, keepdim=True) - log_sum[..., None]
    p = log_p.exp()
    slope = -p * (log_p.masked_fill(p == 0, 0) + entropy[..., None])
    grad = grad_entropy[..., None] * slope
    return grad.masked_fill(log_sum[..., None] == torch.inf, 0).to(logits.dtype).contiguous()


def linear_entropy_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the entropy of the output head's distribution."""
    return token_entropy_reference(F.linear(hidden, weight, bias))


def linear_entropy_fwd_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return token_entropy_fwd_reference(F.linear(hidden, weight, bias))


def linear_entropy_bwd_reference(
    grad_entropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, entropy: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    grad = token_entropy_bwd_reference(grad_entropy, logits, entropy, log_sum)
    return grad @ weight, grad.mT @ hidden, grad.sum(0)
