"""optim: the steps of `optim.SGD` and `optim.RowwiseAdagrad`, which update rows of a table in place.

A step reads and writes the rows that have a gradient, and no others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blt_kernels._namespace import NAMESPACE
from blt_kernels.ops import _common
from blt_kernels.reference import optim as reference


def sgd_step(table: Tensor, rows: Tensor, values: Tensor, lr: float) -> None:
    """Apply stochastic gradient descent in place: ``table[rows] -= lr * values``.

    Parameters
    ----------
    table : fp32, bf16, fp16 or fp64 ``[V, D]``
    rows : int64 ``[R]``
        Unique and in rising order.
    values : dtype of `table` ``[R, D]``
        Gradients of the rows.
    lr : float
        Learning rate.

    Raises
    ------
    RuntimeError
        Shapes, dtypes or devices do not fit.

    Examples
    --------
    >>> table = torch.ones(3, 2)
    >>> sgd_step(table, torch.tensor([1]), torch.ones(1, 2), lr=0.5)
    >>> table.tolist()
    [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]]
    """
    getattr(torch.ops, NAMESPACE).sgd_step(table, rows, values, lr)


def rowwise_adagrad_step(table: Tensor, sums: Tensor, rows: Tensor, values: Tensor, lr: float, eps: float) -> None:
    """Apply row-wise Adagrad in place: see `blt_kernels.optim.RowwiseAdagrad`.

    Parameters
    ----------
    table, rows, values, lr
        As in `sgd_step`.
    sums : fp32 (fp64 for an fp64 table) ``[V]``
        Sums of mean squared gradients. They are updated in place.
    eps : float
        Added to the root of the sum.

    Raises
    ------
    RuntimeError
        Shapes, dtypes or devices do not fit.

    Examples
    --------
    >>> table, sums = torch.ones(3, 2), torch.zeros(3)
    >>> rowwise_adagrad_step(table, sums, torch.tensor([1]), torch.full((1, 2), 4.0), lr=0.5, eps=0.0)
    >>> table.tolist(), sums.tolist()
    ([[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]], [0.0, 16.0, 0.0])
    """
    getattr(torch.ops, NAMESPACE).rowwise_adagrad_step(table, sums, rows, values, lr, eps)


# --- schemas and fakes ------------------------------------------------------------------------------------------------

_common.define(
    "sgd_step",
    "(Tensor(a!) table, Tensor rows, Tensor values, float lr) -> ()",
    reference.sgd_step_reference,
    lambda *_: None,
)
_common.define(
    "rowwise_adagrad_step",
    "(Tensor(a!) table, Tensor(b!) sums, Tensor rows, Tensor values, float lr, float eps) -> ()",
    reference.rowwise_adagrad_step_reference,
    lambda *_: None,
)
