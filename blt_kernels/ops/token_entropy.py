"""token_entropy: entropies of next-byte logits, and those from the inputs of the output head (`linear_entropy`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.ops import _autograd, _common
from blt_kernels.reference import token_entropy as reference
from blt_kernels.reference._ragged import accumulator

_DIMS = range(1, 65)
_MAX_ALPHABET = 2**30

# --- public functions -------------------------------------------------------------------------------------------------


def token_entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of ``softmax(logits)`` over the last dimension.

    ``H = logsumexp(x) - sum softmax(x) x``, computed around the row's maximum. Entries of -inf have probability 0 and
    add nothing; a row with NaN or +inf, or with nothing but -inf, gives NaN. The gradient is ``-p (log p + H)``.

    Parameters
    ----------
    logits : fp32, bf16, fp16 or fp64 ``[..., A]``

    Returns
    -------
    fp32 (fp64 for fp64 logits) ``logits.shape[:-1]``

    Raises
    ------
    TypeError, ValueError
        `logits` is not a floating tensor with a last dimension of at least 1.

    Examples
    --------
    >>> token_entropy(torch.zeros(2, 256)).exp().round().tolist()  # uniform over 256 bytes: ln 256 nats
    [256.0, 256.0]
    """
    _checks.check_tensor("logits", logits, _DIMS, _checks.FLOATS)
    check_alphabet("logits", logits.shape[-1])
    if logits.dim() == 2:
        return token_entropy_fwd(logits)[0]
    return token_entropy_fwd(_rows(logits))[0].view(logits.shape[:-1])


def linear_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the entropy in nats of ``softmax(hidden @ weight.T + bias)``, without storing all logits.

    Parameters
    ----------
    hidden : fp32, bf16, fp16 or fp64 ``[..., D]``
    weight : same dtype ``[A, D]``
    bias : same dtype ``[A]``, optional

    Returns
    -------
    fp32 (fp64 for fp64 inputs) ``hidden.shape[:-1]``
        Differentiable in all three inputs. Under autocast the product runs in the autocast dtype, as in `F.linear`.

    Raises
    ------
    TypeError, ValueError
        Dtypes, devices or shapes do not match; the message names the argument.

    Notes
    -----
    Logits are computed and reduced a panel of rows at a time, so that they stay in a cache. The products are torch's:
    as in `F.linear`, logits are rounded to the dtype of the inputs, and settings such as
    ``torch.backends.cuda.matmul.allow_tf32`` apply. The sums over rows in the gradients of `weight` and `bias` are in
    fp32 (fp64 for fp64) from panel to panel.

    Examples
    --------
    >>> hidden, weight = torch.randn(5, 16), torch.randn(260, 16)
    >>> torch.allclose(linear_entropy(hidden, weight), token_entropy(hidden @ weight.T), atol=1e-5)
    True
    """
    rows, *head = checked_head(hidden, weight, bias)
    entropy, _log_sum = linear_entropy_fwd(rows, *head)
    return entropy if hidden.dim() == 2 else entropy.view(hidden.shape[:-1])


def checked_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the inputs of an output head and return rows, weight and bias, in the autocast dtype if autocast is on."""
    _checks.check_tensor("hidden", hidden, _DIMS, _checks.FLOATS)
    autocast = _common.autocast_enabled(hidden)
    _checks.check_like("weight", weight, (2,), "hidden", hidden, dtype=not autocast)
    _checks.check_shape("weight", weight, (None, hidden.shape[-1]), "[A, D of hidden]")
    check_alphabet("weight", weight.shape[0])
    if bias is not None:
        _checks.check_like("bias", bias, (1,), "hidden", hidden, dtype=not autocast)
        _checks.check_shape("bias", bias, (weight.shape[0],), "[A of weight]")
    rows = _rows(hidden)
    if not autocast:
        return rows, weight, bias
    head = {"hidden": rows, "weight": weight} | ({} if bias is None else {"bias": bias})
    cast = _common.autocast(**head)
    return cast[0], cast[1], cast[2] if bias is not None else None


def _rows(x: Tensor) -> Tensor:
    """``[..., D]`` as ``[rows, D]``; a -1 in their place is refused where there are none."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_alphabet(name: str, alphabet: int) -> None:
    """Raise ValueError unless the number of logits a row is one that the kernels take."""
    if alphabet < 1:
        raise ValueError(f"{name}: expected an alphabet of at least 1, got {alphabet}")
    if alphabet > _MAX_ALPHABET:
        raise ValueError(f"{name}: expected an alphabet of at most {_MAX_ALPHABET}, got {alphabet}")


# --- schemas, references and fakes ------------------------------------------------------------------------------------


def empty_entropy(rows: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Allocate two numbers for each of `rows`, such as entropy and log_sum, uninitialised."""
    dtype = accumulator(rows)
    return rows.new_empty(rows.shape[0], dtype=dtype), rows.new_empty(rows.shape[0], dtype=dtype)


def empty_head_gradients(_grad: Tensor, hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """Allocate the gradients of an output head: of `hidden`, `weight` and the bias, uninitialised."""
    return *_common.empty_like(hidden, weight), weight.new_empty(weight.shape[0])


token_entropy_fwd = _common.define(
    "token_entropy_fwd",
    "(Tensor logits) -> (Tensor entropy, Tensor log_sum)",
    reference.token_entropy_fwd_reference,
    empty_entropy,
)
token_entropy_bwd = _common.define(
    "token_entropy_bwd",
    "(Tensor grad_entropy, Tensor logits, Tensor entropy, Tensor log_sum) -> Tensor",
    reference.token_entropy_bwd_reference,
    lambda _grad, logits, *_: logits.new_empty(logits.shape),
)
linear_entropy_fwd = _common.define(
    "linear_entropy_fwd",
    "(Tensor hidden, Tensor weight, Tensor? bias) -> (Tensor entropy, Tensor log_sum)",
    reference.linear_entropy_fwd_reference,
    empty_entropy,
)
linear_entropy_bwd = _common.define(
    "linear_entropy_bwd",
    "(Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor entropy, Tensor log_sum)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    reference.linear_entropy_bwd_reference,
    empty_head_gradients,
)


# --- autograd and autocast --------------------------------------------------------------------------------------------
# Entropies of bf16 or fp16 logits are computed in fp32 without a copy, so autocast has nothing to add to them.


def save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save logits, entropy and log_sum, which are the first input and the first two outputs, for `logits_grad`."""
    ctx.save_for_backward(inputs[0], output[0], output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def logits_grad(ctx: Any, grad_entropy: Tensor | None, *_: Any) -> Tensor | None:
    """Return the gradient of the logits that `save_logits` saved, or None where none is needed."""
    if grad_entropy is None or not ctx.needs_input_grad[0]:
        return None
    logits, entropy, log_sum = ctx.saved_tensors
    return token_entropy_bwd(grad_entropy, logits, entropy, log_sum)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _linear_entropy_backward(ctx: Any, grad_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_entropy is None:
        return ()
    hidden, weight, bias, entropy, log_sum = ctx.saved_tensors
    grad_hidden, grad_weight, grad_bias = linear_entropy_bwd(grad_entropy, hidden, weight, bias, entropy, log_sum)
    return grad_hidden, grad_weight, None if bias is None else grad_bias


def _save_entropy_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], inputs[3])


def _second_entropy_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad_entropy, logits, log_sum = ctx.saved_tensors
    unread = (log_sum == torch.inf)[:, None]

    def entropy(x: Tensor) -> Tensor:
        return reference.token_entropy_reference(x.masked_fill(unread, 0))

    # The gradient depends on entropy and log_sum through the logits alone.
    return _autograd.second_derivative(entropy, (logits,), grad_entropy, (cotangent,))


def _save_linear_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])


def _second_linear_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    grad_entropy, *head = ctx.saved_tensors
    present = tuple(x for x in head if x is not None)
    return _autograd.second_derivative(
        reference.linear_entropy_reference, present, grad_entropy, cotangents[: len(present)]
    )


_autograd.register_autograd("token_entropy_fwd", logits_grad, setup_context=save_logits)
_autograd.register_autograd("linear_entropy_fwd", _linear_entropy_backward, setup_context=_save_linear)
_autograd.register_autograd("token_entropy_bwd", _second_entropy_backward, setup_context=_save_entropy_gradient)
_autograd.register_autograd("linear_entropy_bwd", _second_linear_backward, setup_context=_save_linear_gradients)
