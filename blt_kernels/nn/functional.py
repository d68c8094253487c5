"""Functions without weights are here: the ops of a model, embeddings of ids, the loss, and two derivatives.

`RMSNormFunction` and `SwiGLUFunction` are for the CPU. What torch composes takes more passes over memory or saves more
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels._extension import OPERATORS


@cache
def load_ops(kind: str) -> SimpleNamespace:
    """Return the functions that a model calls.

    Parameters
    ----------
    kind : "fused" or "reference"
        The public ops, or their plain PyTorch specification.

    Returns
    -------
    namespace
        Every op under its name, and `offsets`, which gives an op the documents in the form that it takes.

    Raises
    ------
    ValueError
        `kind` is neither.

    Examples
    --------
    >>> load_ops("fused").patch_pool is patch_pool, load_ops("reference").patch_pool.__name__
    (True, 'patch_pool_reference')
    """
    _checks.check_choice("ops", kind, ("fused", "reference"))
    functions = {}
    for op in dict.fromkeys(OPERATORS.values()):
        public, reference = (import_module(f"blt_kernels.{package}.{op}") for package in ("ops", "reference"))
        names = [name for name in vars(public) if name not in OPERATORS and hasattr(reference, f"{name}_reference")]
        for name in names:
            functions[name] = getattr(public, name) if kind == "fused" else getattr(reference, f"{name}_reference")
    functions["offsets"] = _checked if kind == "fused" else _offsets
    return SimpleNamespace(**functions)


# These are no lambdas, because a model is pickled with them.
def _checked(documents: Documents) -> Documents:
    return documents


def _offsets(documents: Documents) -> Tensor:
    return documents.offsets


def known_ids(ids: Tensor, rows: Documents, alphabet: int) -> Tensor | None:
    """Return which ids are in a row and in the alphabet. The others may hold any value.

    Parameters
    ----------
    ids : int32 or int64 ``[T]``
    rows : Documents
        Of `ByteModel.pack`.
    alphabet : int

    Returns
    -------
    bool ``[T]``, or None
        None if the host knows that all are.

    Examples
    --------
    >>> model = ByteLM.from_values({"dim": 8, "num_layers": 0, "num_heads": 1})
    >>> ids, rows = model.pack(torch.tensor([70, 71, -1]), torch.tensor([0, 2]))
    >>> known_ids(ids, rows, 260).tolist()
    [True, True, False]
    """
    if rows.full and rows.holds_ids_below(alphabet):
        return None
    known = (ids >= 0) & (ids < alphabet)
    return known if rows.full else known & (torch.arange(ids.shape[0], device=ids.device) < rows.offsets[-1])


def embed_ids(table: Callable[[Tensor], Tensor], ids: Tensor, known: Tensor | None) -> Tensor:
    """Return the rows of a table.

    Parameters
    ----------
    table : callable
        Returns rows of width D by ids, as `torch.nn.Embedding` does.
    ids : int32 or int64
    known : bool ``ids.shape``, optional
        Of `known_ids`. Ids that are not known give 0 and send no gradient.

    Returns
    -------
    dtype of the table ``[*ids.shape, D]``

    Examples
    --------
    >>> table = torch.nn.Embedding.from_pretrained(torch.tensor([[1.0], [2.0]]))
    >>> embed_ids(table, torch.tensor([1, -7]), torch.tensor([True, False])).tolist()
    [[2.0], [0.0]]
    """
    return table(ids) if known is None else table(ids.where(known, 0)).where(known[..., None], 0)


def next_byte_targets(tokens: Tensor, cu_seqlens: Tensor, alphabet: int | None = None) -> Tensor:
    """Return the id after each id in its row.

    Parameters
    ----------
    tokens : int32 or int64 ``[T]``
    cu_seqlens : int32 ``[R+1]``
    alphabet : int, optional
        Ids are below it, if given.

    Returns
    -------
    int64 ``[T]``
        -100 where no id follows, or one outside the alphabet.

    Examples
    --------
    >>> next_byte_targets(torch.tensor([70, 71, 72]), torch.tensor([0, 2, 3])).tolist()
    [71, -100, -100]
    """
    position = torch.arange(tokens.shape[0], device=tokens.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    end = F.pad(cu_seqlens[1:].long(), (0, 1))[row]
    following = tokens.long().roll(-1)
    there = (position + 1 < end) & (following >= 0)
    if alphabet is not None:
        there &= following < alphabet
    return torch.where(there, following, -100)


def next_byte_bits(logits: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """Return bits per byte: the mean of ``-log2 p(target)``.

    Parameters
    ----------
    logits : floating ``[T, A]``
    targets : int64 ``[T]``
        -100 is no target.
    count : int, optional
        Divide the sum by it; by the number of targets if None.

    Returns
    -------
    fp32 (fp64 for fp64 logits), a scalar

    Examples
    --------
    >>> next_byte_bits(torch.zeros(3, 256), torch.tensor([7, 9, -100]))  # uniform over 256 bytes
    tensor(8.)
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return _bits(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), targets, count)


def mean_bits(nats: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """Return bits per byte: the mean of nats of targets, over ``ln 2``.

    Parameters
    ----------
    nats : floating, any shape
        ``-ln p`` of the targets, as a model returns them; 0 where there is none.
    targets : int64 ``nats.shape``
        -100 is no target.
    count : int, optional
        Divide the sum by it; by the number of targets if None.

    Returns
    -------
    dtype of `nats`, a scalar

    Examples
    --------
    >>> mean_bits(torch.tensor([0.0, math.log(2), 0.0]), torch.tensor([7, 9, -100]))
    tensor(0.5000)
    """
    return _bits(nats.sum(), targets, count)


def _bits(nats: Tensor, targets: Tensor, count: int | None) -> Tensor:
    # An integer tensor times a float would be fp32.
    return nats / ((targets >= 0).sum().clamp(min=1) if count is None else count) / math.log(2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` on the CPU."""
    if needs_grad(x, weight):
        return RMSNormFunction.apply(x, weight, eps)
    return _scaled(x, weight, eps)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` on the CPU."""
    return SwiGLUFunction.apply(gate, up) if needs_grad(gate, up) else F.silu(gate).mul_(up)


def needs_grad(*tensors: Tensor) -> bool:
    """Return whether a function of these tensors is differentiated, in forward or in reverse mode."""
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _scaled(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of `x`, and ``(mean(x^2) + eps)^(-1/2)``."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


class RMSNormFunction(torch.autograd.Function):
    """Computes ``y = x r w`` with ``r = (mean(x^2) + eps)^(-1/2)`` over the last dimension; x, w and r are saved.

    With ``n = x r``: ``dw = sum_rows(dy n)`` and ``dx = r (dy w - n mean(dy w n))``. Forward and backward of fp32
    ``[8192, 256]`` take a third of the time of `F.rms_norm`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _scaled(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is differentiated again, through `scale` too
            return *torch.func.vjp(lambda x, w: F.rms_norm(x, w.shape, w, ctx.eps), x, weight)[1](grad), None
        normed = x * scale
        product = grad * normed
        rows = product.flatten(0, -2)
        # Autocast rounds products that are written with @ to bf16, but not mv.
        mean = torch.mv(rows, weight).view_as(scale).div_(x.shape[-1])
        return (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale), rows.sum(0), None


class SwiGLUFunction(torch.autograd.Function):
    """Computes ``silu(gate) up`` and saves only the arguments: the gradient of `up` computes ``silu(gate)`` again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is differentiated again
            return torch.func.vjp(lambda gate, up: F.silu(gate) * up, gate, up)[1](grad)
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
