"""Matrices, tables and norms, of which models are built. A few rows without gradients run on the kernel of an op."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from blt_kernels import _checks
from blt_kernels.nn.functional import rms_norm
from blt_kernels.nn.recompute import in_blocks
from blt_kernels.ops.few_row_linear import few_row_linear_fwd, takes
from blt_kernels.ops.few_row_linear import linear as product
from blt_kernels.reference.few_row_linear import dequantized


def init_normal(weight: Tensor, std: float) -> None:
    """Draw a weight from a normal distribution, truncated at three deviations.

    Parameters
    ----------
    weight : floating, any shape
        Written in place. A fake tensor is left as it is.
    std : float

    Examples
    --------
    >>> weight = torch.empty(1000)
    >>> init_normal(weight, std=0.1)
    >>> bool(weight.abs().max() <= 0.3)
    True
    """
    if not isinstance(weight, FakeTensor):  # torch reads the values and draws again until all of them fit
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


class Linear(nn.Linear):
    """Multiplies by its weight, a few rows by the kernel of `few_row_linear`.

    It takes the arguments of `torch.nn.Linear`.

    Examples
    --------
    >>> layer = Linear(3, 2, bias=False)
    >>> layer(torch.zeros(4, 3)).tolist() == [[0.0, 0.0]] * 4
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last dimension.

        Parameters
        ----------
        x : floating ``[..., K]``

        Returns
        -------
        ``[..., N]``
        """
        return product(x, self.weight) if self.bias is None else super().forward(x)


class QuantizedLinear(nn.Module):
    """Multiplies by weights that are stored in bf16 or int8, as `few_row_linear` does. It has no gradient.

    A row of int8 weights has one factor, so that its largest weight is 127.

    Parameters
    ----------
    layer : torch.nn.Linear
        Without a bias.
    dtype : torch.bfloat16 or torch.int8

    Attributes
    ----------
    weight : `dtype` ``[N, K]``
    scale : dtype of the layer ``[N]``, or None
    error : float
        The root mean square of what rounding changed, as a share of that of the weights.

    Raises
    ------
    ValueError
        The layer has a bias, or `dtype` is another one.

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, -0.5]])
    >>> quantized = QuantizedLinear(layer, torch.int8)
    >>> quantized.weight.tolist(), round(quantized.error, 4)
    ([[127, -64]], 0.0035)
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        if "bias" in dict(layer.named_parameters()):
            raise ValueError(f"layer: expected one without a bias, got {layer}")
        if dtype not in (torch.bfloat16, torch.int8):
            raise ValueError(f"dtype: expected torch.bfloat16 or torch.int8, got {dtype}")
        exact, scale = layer.weight.detach(), None
        weight = exact.to(dtype)
        if dtype == torch.int8:
            wide = exact.to(torch.promote_types(exact.dtype, torch.float32))
            scale = wide.abs().amax(1).div_(127).clamp_(min=torch.finfo(exact.dtype).tiny).to(exact.dtype)
            # A scale that was rounded down must not lead beyond 127, which int8 would wrap around.
            weight = (wide / scale[:, None]).round_().clamp_(-127, 127).to(dtype)
        self.weight: Tensor
        self.scale: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        exact = exact.double()
        difference = dequantized(weight, scale, layer.weight.detach()).double() - exact
        self.error = float(difference.norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last dimension.

        Parameters
        ----------
        x : floating ``[..., K]``

        Returns
        -------
        ``[..., N]``
        """
        return product(x, self.weight, self.scale)

    def extra_repr(self) -> str:
        """Return sizes and dtype.

        Returns
        -------
        str
        """
        outputs, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, dtype={self.weight.dtype}"


def linear(in_features: int, out_features: int, gain: float = 1.0) -> Linear:
    """Return a layer without bias, drawn by `init_normal` with deviation ``gain * in_features^-0.5``.

    Parameters
    ----------
    in_features, out_features : int
    gain : float

    Returns
    -------
    Linear

    Examples
    --------
    >>> linear(4, 2)
    Linear(in_features=4, out_features=2, bias=False)
    """
    layer = Linear(in_features, out_features, bias=False)
    init_normal(layer.weight, gain * in_features**-0.5)
    return layer


def embedding(rows: int, dim: int, std: float = 0.5) -> nn.Embedding:
    """Return a table drawn by `init_normal`, by default with about the deviation of the update of a layer.

    Parameters
    ----------
    rows, dim : int
    std : float

    Returns
    -------
    torch.nn.Embedding

    Examples
    --------
    >>> embedding(260, 8)
    Embedding(260, 8)
    """
    table = nn.Embedding(rows, dim)
    init_normal(table.weight, std)
    return table


class RMSNorm(nn.RMSNorm):
    """Computes ``x / sqrt(mean(x^2) + eps) * weight`` in the dtype of the weight.

    It takes the arguments of `torch.nn.RMSNorm`.

    Examples
    --------
    >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, -3.0])).detach().round(decimals=3).tolist()
    [1.0, -1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension.

        Parameters
        ----------
        x : floating ``[..., D]``
            Converted to the dtype of the weight: autocast gives bf16.

        Returns
        -------
        dtype of the weight ``x.shape``
        """
        x = x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
        if not _checks.readable(x):
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps  # as torch does
        return rms_norm(x, self.weight, eps)


def multiply_normed(norm: nn.Module, x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return ``layer(norm(x))`` for every layer, of a few rows in one call each."""
    if is_plain(norm, *layers):
        eps = norm.eps
        (norm_weight, _), matrices = stored(norm), [stored(layer) for layer in layers]
        if isinstance(eps, float) and all(takes(x, weight, norm_weight) for weight, _ in matrices):
            return [few_row_linear_fwd(x, weight, scale, norm_weight, eps) for weight, scale in matrices]
    x = norm(x)
    return [layer(x) for layer in layers]


def add_product(layer: nn.Module, x: Tensor, residual: Tensor, factor: float) -> Tensor:
    """Return ``layer(x) + factor residual``, of a few rows in one call."""
    if is_plain(layer):
        weight, scale = stored(layer)
        if takes(x, weight, residual):
            return few_row_linear_fwd(x, weight, scale, None, 0.0, residual, factor)
    return layer(x) + factor * residual if factor else layer(x)


def target_nats(ops: SimpleNamespace, head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Return ``-ln p(target)`` of logits ``head(x)``, which are not all stored.

    Parameters
    ----------
    ops : namespace
        The functions of `load_ops`.
    head : torch.nn.Module
        Of a `Linear`, `linear_cross_entropy` computes the nats. Another head is called on blocks of rows.
    x : floating ``[T, D]``
    targets : int64 ``[T]``
        -100 is no target.

    Returns
    -------
    fp32 (fp64 for fp64 logits) ``[T]``
        0 where there is no target.

    Examples
    --------
    >>> target_nats(load_ops("fused"), torch.nn.Identity(), torch.zeros(2, 256), torch.tensor([7, -100]))
    tensor([5.5452, 0.0000])
    """
    if computes_product(head, types=(Linear,)) and not _has_any_global_hook():
        return ops.linear_cross_entropy(x, head.weight, targets)

    def nats(x: Tensor, targets: Tensor) -> Tensor:
        logits = head(x)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")

    return in_blocks(nats, x, targets)


def is_plain(*modules: Any, types: tuple[type, ...] = (Linear, QuantizedLinear, RMSNorm)) -> bool:
    """Return whether an op may compute what these modules compute, in eager code."""
    return not (torch.compiler.is_compiling() or _has_any_global_hook()) and computes_product(*modules, types=types)


def computes_product(*modules: Any, types: tuple[type, ...]) -> bool:
    """Return whether modules are of these types, without hooks, a bias or a `forward` of their own."""
    for module in modules:
        if type(module) not in types or module._forward_hooks or module._forward_pre_hooks:
            return False
        if "forward" in module.__dict__:
            return False
        if module._parameters.get("bias") is not None:
            return False
    return True


def stored(module: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the scale of a module that `is_plain`."""
    return (module._parameters or module._buffers)["weight"], module._buffers.get("scale")
