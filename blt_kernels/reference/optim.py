"""The steps of `blt_kernels.optim` in plain PyTorch. They change the table in place."""

from __future__ import annotations

from torch import Tensor

from blt_kernels.reference._ragged import accumulator


def sgd_step_reference(table: Tensor, rows: Tensor, values: Tensor, lr: float) -> None:
    """table[rows] -= lr * values."""
    dtype = accumulator(table)
    table.index_copy_(0, rows, (table[rows].to(dtype) - lr * values.to(dtype)).to(table.dtype))


def rowwise_adagrad_step_reference(
    table: Tensor, sums: Tensor, rows: Tensor, values: Tensor, lr: float, eps: float
) -> None:
    """sums[rows] += mean(values**2); table[rows] -= lr * values / (sqrt(sums[rows]) + eps)."""
    dtype = accumulator(table)
    grad = values.to(dtype)
    sums.index_add_(0, rows, grad.square().mean(1))
    rate = lr / (sums[rows].sqrt() + eps)
    table.index_copy_(0, rows, (table[rows].to(dtype) - rate[:, None] * grad).to(table.dtype))
