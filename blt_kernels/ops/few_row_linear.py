"""few_row_linear: a few rows times a weight matrix, which is read once; on CUDA the product is torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from blt_kernels import _checks
from blt_kernels.ops import _common
from blt_kernels.reference import few_row_linear as reference

MAX_ROWS = 16
# A product alone is faster than torch's from here on (bench/notes/generation.md).
MIN_ROWS, MIN_WEIGHTS = 4, 2**17

_DIMS = range(1, 65)
_STORED = (*_checks.FLOATS, torch.int8)
_PLAIN = (Tensor, nn.Parameter)

# --- public function --------------------------------------------------------------------------------------------------


def few_row_linear(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_factor: float = 1.0,
) -> Tensor:
    """Return ``norm(x) @ (scale weight).T + residual_factor residual``, faster for a few rows of fp32 on the CPU.

    ``norm(x) = x / sqrt(mean(x^2) + eps) * norm``. What is None is left out. The kernel multiplies up to 16 rows
    ``[M, K]`` where no gradient is recorded; a product alone 4 to 16 rows by at least 2^17 weights. There a row's
    result has the same bits for any number of rows and of threads. Everything else is computed by torch's functions.

    Parameters
    ----------
    x : fp32, bf16, fp16 or fp64 ``[..., K]``
    weight : dtype of `x`, bf16, or int8 ``[N, K]``
    scale : dtype of `x` ``[N]``, optional
        Multiplies the rows of int8 weights.
    norm : dtype of `x` ``[K]``, optional
        Weight of RMSNorm.
    eps : float
    residual : dtype of `x` ``[..., N]``, optional
    residual_factor : float

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
    >>> few_row_linear(torch.ones(1, 2), torch.tensor([[3, 4]], dtype=torch.int8), scale=torch.tensor([0.5])).tolist()
    [[3.5]]
    """
    _checks.check_tensor("x", x, _DIMS, _checks.FLOATS)
    check_weight("weight", weight, "scale", scale, x)
    _checks.check_shape("weight", weight, (None, x.shape[-1]), "[N, K of x]")
    outputs, *_ = weight.shape
    for name, value, shape, meaning in (
        ("norm", norm, x.shape[-1:], "[K of x]"),
        ("residual", residual, (*x.shape[:-1], outputs), "[..., N of weight]"),
    ):
        if value is not None:
            _checks.check_like(name, value, (len(shape),), "x", x)
            _checks.check_dense(name, value)
            _checks.check_shape(name, value, shape, meaning)
    _checks.check_number("eps", eps)
    _checks.check_number("residual_factor", residual_factor)
    return linear(x, weight, scale, norm, eps, residual, residual_factor)


def check_weight(name: str, weight: object, scale_name: str, scale: object, x: Tensor) -> None:
    """Raise unless `weight` is a matrix for `x`, with a factor for each row if it is int8."""
    _checks.check_tensor(name, weight, 2, _STORED)
    assert isinstance(weight, Tensor)
    stored = weight.dtype in (torch.bfloat16, torch.int8)
    if not stored and _common.autocast_enabled(x):
        _common.check_autocast("x", x, **{name: weight})
        stored = True
    _checks.check_same(name, weight, "x", x, dtype=not stored)
    if (scale is None) == (weight.dtype == torch.int8):
        found = "None" if scale is None else f"one for {weight.dtype}"
        raise TypeError(f"{scale_name}: expected a tensor for int8 weights and for no others, got {found}")
    if scale is not None:
        _checks.check_like(scale_name, scale, (1,), "x", x)
        _checks.check_dense(scale_name, scale)  # type: ignore[arg-type]
        _checks.check_shape(scale_name, scale, weight.shape[:1], "[N of the weight]")  # type: ignore[arg-type]


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_factor: float = 1.0,
) -> Tensor:
    """Do as `few_row_linear` does; the arguments are not checked."""
    alone = norm is None and residual is None and weight.dtype == x.dtype
    if takes(x, weight, scale, norm, residual) and not (
        alone and (x.shape[0] < MIN_ROWS or weight.numel() < MIN_WEIGHTS)
    ):
        return few_row_linear_fwd(x, weight, scale, norm, eps, residual, residual_factor)
    return reference.few_row_linear_reference(x, weight, scale, norm, eps, residual, residual_factor)


def takes(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernel computes this product, since no feature of torch's is needed."""
    if torch.compiler.is_compiling() or x.dim() != 2 or x.shape[0] > MAX_ROWS:
        return False  # without a guard on the number of rows in a compiled graph
    return (
        x.dtype == torch.float32
        and type(x) is Tensor
        and x.is_cpu
        and stores(weight)
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, *others)))
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def stores(weight: Tensor) -> bool:
    """Return whether the kernel reads this weight matrix."""
    return (
        weight.dtype in (torch.float32, torch.bfloat16, torch.int8)
        and type(weight) in _PLAIN  # a subclass may compute products by itself
        and weight.is_cpu
        and weight.stride(1) == 1
    )


# --- schema and fake --------------------------------------------------------------------------------------------------


def _empty(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


few_row_linear_fwd = _common.define(
    "few_row_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? scale=None, Tensor? norm=None, float eps=1e-5, Tensor? residual=None,"
    " float residual_factor=1.0) -> Tensor",
    reference.few_row_linear_reference,
    _empty,
)
