"""ema_scan: an exponential moving average along each document, with a weight of its own for every row.

Forward reads x and writes y. Backward reads the gradient, x and y and writes the gradient of x.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blt_kernels import _checks
from blt_kernels.ops import _autograd, _common
from blt_kernels.reference import ema_scan as reference
from blt_kernels.reference._ragged import accumulator


def ema_scan(x: Tensor, p: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Average rows exponentially along each document.

    ``y[t] = p[t] x[t] + (1 - p[t]) y[t-1]``, where y before a document is 0: its first row is ``p[0] x[0]``. In H-Net
    the first p of a document is 1, so that the first row is x itself.

    Parameters
    ----------
    x : fp32, bf16, fp16 or fp64 ``[T, D]`` or ``[B, S, D]``
        Padded rows are B documents of length S.
    p : fp32, bf16, fp16 or fp64 ``[T]`` or ``[B, S]``
        Weight of each row, from 0 to 1; used in fp32 (fp64 for fp64 x). Others are not refused; with weights above
        2 or below 0 the sums grow, and may overflow.
    cu_seqlens : int32 or int64 ``[B+1]``, optional
        Documents of packed rows; one document if None. ``layout.cu_patches`` has those of the patches of a layout.

    Returns
    -------
    dtype and shape of `x`
        Accumulated in fp32 (fp64 for fp64 x). 0 for rows beyond the last document, which are not read and get no
        gradient. A NaN stays until the end of its document.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device, shape or value; the message names it.

    Notes
    -----
    The smoothing module of H-Net (arXiv 2507.07955), section 2.2.2. The gradient of `p` is computed from y as it is
    stored, rounded to the dtype of `x`.

    Examples
    --------
    >>> x = torch.tensor([[2.0], [4.0], [8.0]])
    >>> ema_scan(x, torch.tensor([1.0, 0.5, 0.5])).flatten().tolist()
    [2.0, 3.0, 5.5]
    >>> ema_scan(x, torch.tensor([1.0, 0.5, 0.5]), torch.tensor([0, 2, 3])).flatten().tolist()
    [2.0, 3.0, 4.0]
    """
    _checks.check_tensor("x", x, (2, 3), _checks.FLOATS)
    _checks.check_like("p", p, (1, 2), "x", x, dtype=False)
    _checks.check_shape("p", p, x.shape[:-1], "[T] of x" if x.dim() == 2 else "[B, S] of x")
    packed, offsets, documents = _checks.documents_of("x", x, cu_seqlens, trailing=1)
    weights = p.to(accumulator(x))
    if x.dim() == 2:
        return ema_scan_fwd(packed, weights, offsets, documents)
    return ema_scan_fwd(packed, weights.flatten(), offsets, documents).view(x.shape)


# --- schemas, references and fakes ------------------------------------------------------------------------------------
# p has the dtype of the accumulator. Without cu_seqlens there are num_documents documents of one length.

ema_scan_fwd = _common.define(
    "ema_scan_fwd",
    "(Tensor x, Tensor p, Tensor? cu_seqlens, SymInt num_documents) -> Tensor y",
    reference.ema_scan_fwd_reference,
    lambda x, *_: x.new_empty(x.shape),
)
ema_scan_bwd = _common.define(
    "ema_scan_bwd",
    "(Tensor grad_out, Tensor x, Tensor p, Tensor y, Tensor? cu_seqlens, SymInt num_documents)"
    " -> (Tensor grad_x, Tensor grad_p)",
    reference.ema_scan_bwd_reference,
    lambda _grad, x, p, *_: _common.empty_like(x, p),
)


# --- autograd ---------------------------------------------------------------------------------------------------------
# Like torch's own cumulative sums, the scan runs in the dtype of its input under autocast.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, p, cu_seqlens, num_documents = inputs
    ctx.save_for_backward(x, p, output, cu_seqlens)
    ctx.num_documents = num_documents


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    return ema_scan_bwd(grad_out, *ctx.saved_tensors, ctx.num_documents)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_out, x, p, _y, cu_seqlens, num_documents = inputs
    ctx.save_for_backward(grad_out, x, p, cu_seqlens)
    ctx.num_documents = num_documents


def _second_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
    grad_out, x, p, cu_seqlens = ctx.saved_tensors

    def scan(x: Tensor, p: Tensor) -> Tensor:
        return reference.ema_scan_fwd_reference(x, p, cu_seqlens, ctx.num_documents)

    # The gradients depend on y through x and p alone.
    return _autograd.second_derivative(scan, (x, p), grad_out, cotangents)


_autograd.register_autograd("ema_scan_fwd", _backward, setup_context=_save)
_autograd.register_autograd("ema_scan_bwd", _second_backward, setup_context=_save_gradients)
