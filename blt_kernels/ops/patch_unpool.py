"""patch_unpool: every byte gets the vector of a patch, its own or the one it may read to predict the next byte."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blt_kernels import _checks
from blt_kernels.layout import PatchLayout
from blt_kernels.ops import _autograd, _common
from blt_kernels.ops._patch_layout import check_layout, check_readers
from blt_kernels.reference import patch_unpool as reference


def patch_unpool(y: Tensor, layout: PatchLayout, ids: str = "patch") -> Tensor:
    """Give every byte the vector of a patch.

    Parameters
    ----------
    y : fp32, bf16, fp16 or fp64 ``[C, D]``
        One vector a patch.
    layout : PatchLayout
        Of T bytes and C patches.
    ids : str
        "patch": byte i reads patch ``layout.patch_ids[i]``, its own. "decode": it reads ``layout.decode_ids[i]``, the
        last patch that is complete when byte i + 1 is predicted.

    Returns
    -------
    dtype of `y` ``[T, D]``
        0 where the id is -1, as beyond the last document. The gradient of y is the sum over the bytes that read a
        patch, in fp32 (fp64 for fp64 y). Patches that no byte reads may hold anything and get a gradient of 0.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device, shape or value; the message names it.

    Examples
    --------
    >>> layout = static_patch(torch.tensor([0, 5]), 2).compact()  # patches of 1, 2 and 2 bytes
    >>> y = torch.tensor([[1.0], [2.0], [3.0]])
    >>> patch_unpool(y, layout).flatten().tolist()
    [1.0, 2.0, 2.0, 3.0, 3.0]
    >>> patch_unpool(y, layout, ids="decode").flatten().tolist()  # byte i predicts byte i + 1
    [1.0, 1.0, 2.0, 2.0, 3.0]
    """
    _checks.check_tensor("y", y, 2, _checks.FLOATS)
    check_layout(layout, "y", y)
    _checks.check_choice("ids", ids, ("patch", "decode"))
    if y.shape[0] != layout.capacity:
        raise ValueError(f"y: expected the capacity of layout, {layout.capacity} patches, got shape {list(y.shape)}")
    if ids == "patch":
        return patch_unpool_fwd(y, layout.patch_offsets, layout.patch_ids)
    check_readers(layout)
    return patch_unpool_fwd(y, layout.decode_offsets, layout.decode_ids)


# --- schemas, references and fakes ------------------------------------------------------------------------------------
# The bytes whose id is p are the first ones of [offsets[p], offsets[p+1]); the others there have id -1, as have
# bytes in no such segment. Offsets never fall. A segment is summed in a fixed order.

patch_unpool_fwd = _common.define(
    "patch_unpool_fwd",
    "(Tensor y, Tensor offsets, Tensor ids) -> Tensor out",
    reference.patch_unpool_fwd_reference,
    lambda y, _offsets, ids: y.new_empty(ids.shape[0], y.shape[1]),
)
patch_unpool_bwd = _common.define(
    "patch_unpool_bwd",
    "(Tensor grad_out, Tensor offsets, Tensor ids) -> Tensor grad_y",
    reference.patch_unpool_bwd_reference,
    lambda grad, offsets, _ids: grad.new_empty(offsets.shape[0] - 1, grad.shape[1]),
)


# --- autograd ---------------------------------------------------------------------------------------------------------
# Like torch's own indexing, unpooling runs in the dtype of its input under autocast.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad_out: Tensor) -> Tensor:
    return patch_unpool_bwd(grad_out, *ctx.saved_tensors)


# The backward is linear in the gradient, and the forward is its derivative.
def _second_backward(ctx: Any, cotangent: Tensor) -> Tensor:
    return patch_unpool_fwd(cotangent, *ctx.saved_tensors)


_autograd.register_autograd("patch_unpool_fwd", _backward, setup_context=_save)
_autograd.register_autograd("patch_unpool_bwd", _second_backward, setup_context=_save)
