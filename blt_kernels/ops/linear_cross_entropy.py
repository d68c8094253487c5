"""linear_cross_entropy: the cross entropy of an output head's logits, which are never stored all at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blt_kernels import _checks
from blt_kernels.ops import _autograd, _common
from blt_kernels.ops.token_entropy import checked_head, empty_entropy, empty_head_gradients
from blt_kernels.reference import linear_cross_entropy as reference

# --- public function --------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100
) -> Tensor:
    """Return ``-log softmax(hidden @ weight.T + bias)[target]`` of each row in nats, without storing all logits.

    ``F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none", ignore_index=ignore_index)``, summed in
    fp32 (fp64 for fp64 inputs).

    Parameters
    ----------
    hidden : fp32, bf16, fp16 or fp64 ``[..., D]``
    weight : same dtype ``[A, D]``
    targets : int32 or int64 ``hidden.shape[:-1]``
        From 0 to A - 1, or `ignore_index`.
    bias : same dtype ``[A]``, optional
    ignore_index : int
        The loss of a row with this target is 0, and the row sends no gradient.

    Returns
    -------
    fp32 (fp64 for fp64 inputs) ``hidden.shape[:-1]``
        Differentiable in `hidden`, `weight` and `bias`. Under autocast the product runs in the autocast dtype, as in
        `F.linear`.

    Raises
    ------
    TypeError, ValueError
        Dtypes, devices or shapes do not match; the message names the argument. Another target is found where looking
        costs nothing, in eager code on the CPU; elsewhere the loss and the gradients of such a row are NaN.

    Notes
    -----
    Logits are computed and reduced a panel of rows at a time, so that they stay in a cache; backward computes them
    anew. The products are torch's: as in `F.linear`, logits are rounded to the dtype of the inputs, and settings such
    as ``torch.backends.cuda.matmul.allow_tf32`` apply. The sums over rows in the gradients of `weight` and `bias` are
    in fp32 (fp64 for fp64) from panel to panel.

    Examples
    --------
    >>> hidden, weight, targets = torch.randn(5, 16), torch.randn(260, 16), torch.tensor([7, 0, 259, -100, 30])
    >>> loss = linear_cross_entropy(hidden, weight, targets)
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none"), atol=1e-5)
    True
    """
    rows, weight, bias = checked_head(hidden, weight, bias)
    _checks.check_tensor("targets", targets, hidden.dim() - 1, _checks.INTS)
    _checks.check_shape("targets", targets, hidden.shape[:-1], "[... of hidden]")
    _checks.check_same("targets", targets, "hidden", hidden, dtype=False)
    _checks.check_is_int("ignore_index", ignore_index)
    if abs(ignore_index) > _checks.INT64_MAX:
        raise ValueError(f"ignore_index: expected a value that an int64 holds, got {ignore_index}")
    _check_values(targets, weight.shape[0], ignore_index)
    loss, _log_sum = linear_cross_entropy_fwd(rows, weight, targets.reshape(rows.shape[0]), bias, ignore_index)
    return loss if hidden.dim() == 2 else loss.view(hidden.shape[:-1])


def _check_values(targets: Tensor, alphabet: int, ignore_index: int) -> None:
    """Raise ValueError unless all targets are below `alphabet` or are `ignore_index`, where they are readable."""
    if not _checks.readable(targets) or not targets.numel():
        return
    low, high = (int(x) for x in targets.aminmax())
    if low >= 0 and high < alphabet:
        return
    outside = targets[((targets < 0) | (targets >= alphabet)) & (targets != ignore_index)]
    if outside.numel():
        expected = f"ids from 0 to {alphabet - 1}, the rows of weight, or ignore_index = {ignore_index}"
        raise ValueError(f"targets: expected {expected}, got {int(outside[0])}")


# --- schemas, references and fakes ------------------------------------------------------------------------------------

linear_cross_entropy_fwd = _common.define(
    "linear_cross_entropy_fwd",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, int ignore_index) -> (Tensor loss, Tensor log_sum)",
    reference.linear_cross_entropy_fwd_reference,
    empty_entropy,
)
linear_cross_entropy_bwd = _common.define(
    "linear_cross_entropy_bwd",
    "(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, int ignore_index, Tensor log_sum)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    reference.linear_cross_entropy_bwd_reference,
    empty_head_gradients,
)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _autograd.save_arguments(ctx, (*inputs, output[1]))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return ()
    arguments = _autograd.saved_arguments(ctx)
    grad_hidden, grad_weight, grad_bias = linear_cross_entropy_bwd(grad_loss, *arguments)
    return grad_hidden, grad_weight, None, None if arguments[3] is None else grad_bias


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _autograd.save_arguments(ctx, inputs[:6])


def _second_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    grad_loss, hidden, weight, targets, bias, ignore_index = _autograd.saved_arguments(ctx)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.linear_cross_entropy_reference(hidden, weight, targets, bias, ignore_index=ignore_index)

    head = tuple(x for x in (hidden, weight, bias) if x is not None)
    # The gradients depend on log_sum through the logits alone.
    of_loss, of_hidden, of_weight, *of_bias = _autograd.second_derivative(
        loss, head, grad_loss, cotangents[: len(head)]
    )
    return of_loss, of_hidden, of_weight, None, *of_bias


_autograd.register_autograd("linear_cross_entropy_fwd", _backward, setup_context=_save)
_autograd.register_autograd("linear_cross_entropy_bwd", _second_backward, setup_context=_save_gradients)
