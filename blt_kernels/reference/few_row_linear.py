"""few_row_linear in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def few_row_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_factor: float = 1.0,
) -> Tensor:
    """norm(x) @ weight.T + residual_factor * residual, in the dtype of x."""
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, eps)
    y = F.linear(x, dequantized(weight, scale, x))
    return y if residual is None else y + residual_factor * residual


def dequantized(weight: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    """weight * scale[:, None], in the dtype of x."""
    weight = weight.to(x.dtype) if weight.dtype in (torch.bfloat16, torch.int8) else weight
    return weight if scale is None else weight * scale[:, None]
