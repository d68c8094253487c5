"""few_row_linear multiplies a few rows by a weight matrix, which is read once; on CUDA the product is torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from blt_kernels import _checks
from blt_kernels.ops import _common
from blt_kernels.reference import few_row_linear as reference

# The kernel is faster than torch's product here (bench/notes/generation.md).
MIN_ROWS, MAX_ROWS = 4, 16
MIN_WEIGHTS = 2**17

_DIMS = range(1, 65)

# --- public function --------------------------------------------------------------------------------------------------


def few_row_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``, as `torch.nn.functional.linear` does, faster for a few rows of fp32 on the CPU.

    The kernel multiplies 4 to 16 rows ``[M, K]`` by at least 2^17 weights where no gradient is recorded. There a row's
    result has the same bits for any number of rows and of threads. Everything else is torch's product.

    Parameters
    ----------
    x : fp32, bf16, fp16 or fp64 ``[..., K]``
    weight : same dtype ``[N, K]``

    Returns
    -------
    dtype of `x` ``[..., N]``

    Raises
    ------
    TypeError, ValueError
        Dtypes, devices or shapes do not match; the message names the argument.

    Examples
    --------
    >>> few_row_linear(torch.ones(4, 3), torch.arange(6.0).view(2, 3))[0].tolist()
    [3.0, 12.0]
    """
    _checks.check_tensor("x", x, _DIMS, _checks.FLOATS)
    _checks.check_like("weight", weight, (2,), "x", x, dtype=not _common.autocast_enabled(x))
    _checks.check_shape("weight", weight, (None, x.shape[-1]), "[N, K of x]")
    return linear(x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``; the arguments are not checked."""
    return few_row_linear_fwd(x, weight) if _has_kernel(x, weight) else F.linear(x, weight)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernel is the faster one and no feature of torch's product is needed."""
    if torch.compiler.is_compiling() or x.dim() != 2 or not MIN_ROWS <= x.shape[0] <= MAX_ROWS:
        return False  # without a guard on the number of rows in a compiled graph
    return (
        weight.numel() >= MIN_WEIGHTS
        and x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and x.is_cpu
        and weight.is_cpu
        and weight.stride(1) == 1
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


# --- schema and fake --------------------------------------------------------------------------------------------------


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


few_row_linear_fwd = _common.define(
    "few_row_linear_fwd", "(Tensor x, Tensor weight) -> Tensor", reference.few_row_linear_reference, _empty
)
