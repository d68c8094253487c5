"""These optimizers are for embedding tables of gigabytes: a step costs as much as its sparse gradient.

They take the gradients of ``ngram_hash_embed(..., grad="sparse")`` or of ``nn.Embedding(sparse=True)``, and touch no
row that has none. Other parameters of a model need an optimizer of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.ops.optim import rowwise_adagrad_step, sgd_step


class _SparseOptimizer(torch.optim.Optimizer):
    """Applies the rule of a subclass to the rows of each table that have a gradient."""

    def __init__(self, params: Iterable[Any], **defaults: float) -> None:
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add tables with options of their own, which are checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in self.defaults:
            _checks.check_number(name, group[name])
            if group[name] < 0:
                raise ValueError(f"{name}: expected a value >= 0, got {group[name]}")
        for table in group["params"]:
            _checks.check_tensor("params", table, 2, _checks.FLOATS)
            if table.is_neg():
                raise ValueError("params: expected tables whose memory has their values, got a negated view")
            if table.stride(1) != 1 and table.shape[1] != 1:
                raise ValueError(f"params: expected tables with unit stride in a row, got strides {table.stride()}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that have a gradient.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss anew, with gradients.

        Returns
        -------
        object
            What `closure` returned, None without one.

        Raises
        ------
        TypeError
            A gradient is dense.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                if table.grad.layout != torch.sparse_coo or table.grad.sparse_dim() != 1:
                    raise TypeError(
                        f"params: expected sparse gradients of rows, as of ngram_hash_embed(..., grad='sparse'), got "
                        f"one with layout {table.grad.layout} for a table of shape {list(table.shape)}"
                    )
                grad = table.grad.coalesce()
                self._update(table, grad.indices()[0], grad.values(), group)
        return loss

    def _update(self, table: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class SGD(_SparseOptimizer):
    """Applies stochastic gradient descent: ``table[r] -= lr * g`` for the rows r with a gradient g.

    Parameters
    ----------
    params : iterable of tensors or of dicts
        Tables ``[V, D]``; fp32, bf16, fp16 or fp64.
    lr : float
        Learning rate.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Examples
    --------
    >>> table = torch.nn.Parameter(torch.ones(3, 2))
    >>> torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    >>> SGD([table], lr=0.5).step()
    >>> table.tolist()
    [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]]
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)

    def _update(self, table: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        sgd_step(table, rows, values, group["lr"])


class RowwiseAdagrad(_SparseOptimizer):
    """Applies Adagrad with one number of state for each row, the sum of mean squared gradients.

    For the rows r with a gradient g of D values: ``sum[r] += mean(g**2)``, then
    ``table[r] -= lr * g / (sqrt(sum[r]) + eps)``.

    Parameters
    ----------
    params : iterable of tensors or of dicts
        Tables ``[V, D]``; fp32, bf16, fp16 or fp64.
    lr : float
        Learning rate.
    eps : float
        Added to the root.
    initial_accumulator_value : float
        Where the sums begin.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Notes
    -----
    The rule is FBGEMM's exact row-wise Adagrad (arXiv 2101.05615). State and arithmetic are fp32 (fp64 for fp64
    tables), and stay so when a state dict is loaded.

    Examples
    --------
    >>> table = torch.nn.Parameter(torch.ones(3, 2))
    >>> torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True).mul(4).sum().backward()
    >>> RowwiseAdagrad([table], lr=0.5, eps=0.0).step()  # the root of the mean of 4 ** 2 is 4
    >>> table.tolist()
    [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-8,
        initial_accumulator_value: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, eps=eps, initial_accumulator_value=initial_accumulator_value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. The sums keep their dtype, whatever that of the tables.

        Parameters
        ----------
        state_dict : dict
        """
        super().load_state_dict(state_dict)
        numbers = (i for group in state_dict["param_groups"] for i in group["params"])
        tables = (table for group in self.param_groups for table in group["params"])
        for number, table in zip(numbers, tables, strict=True):
            if number in state_dict["state"]:
                self.state[table]["sum"] = state_dict["state"][number]["sum"].to(table.device, copy=True)

    def _update(self, table: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
            start = group["initial_accumulator_value"]
            state["sum"] = torch.full((table.shape[0],), start, dtype=dtype, device=table.device)
        rowwise_adagrad_step(table, state["sum"], rows, values, group["lr"], group["eps"])
