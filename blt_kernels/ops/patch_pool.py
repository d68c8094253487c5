"""patch_pool: one vector for each patch, from the vectors of its bytes.

Forward reads x once and writes out. Backward reads x again only for max and min, to find the ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.layout import PatchLayout
from blt_kernels.ops import _autograd, _common
from blt_kernels.ops._patch_layout import check_layout
from blt_kernels.ops.patch_unpool import patch_unpool_fwd
from blt_kernels.reference import patch_pool as reference


def patch_pool(x: Tensor, layout: PatchLayout, reduce: str | Sequence[str] = "max") -> Tensor:
    """Reduce the bytes of each patch to one vector.

    Parameters
    ----------
    x : fp32, bf16, fp16 or fp64 ``[T, D]`` or ``[B, S, D]``
        One vector a byte; ``B * S`` is T.
    layout : PatchLayout
        Of T bytes and C patches.
    reduce : str or sequence of str
        "max", "min", "mean", "sum", "first" (the patch's first byte) or "last". Several are concatenated along D in the
        given order.

    Returns
    -------
    dtype of `x` ``[C, D]``, or ``[C, len(reduce) * D]``
        0 for an empty patch. A patch with a NaN has a NaN maximum, minimum, mean and sum. Accumulated in fp32 (fp64 for
        fp64 x). The gradient of a maximum or minimum is shared equally among the bytes that attain it; it is NaN where
        the patch has a NaN. Bytes beyond the last document are not read and get no gradient.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device, shape or value; the message names it.

    Notes
    -----
    The BLT paper (arXiv 2412.09871), section 3.2.2: patch representations start as pooled bytes.

    Examples
    --------
    >>> layout = static_patch(torch.tensor([0, 5]), 2)  # patches of 1, 2 and 2 bytes
    >>> x = torch.tensor([[1.0], [2.0], [4.0], [8.0], [6.0]])
    >>> patch_pool(x, layout.compact(), ["max", "mean"]).tolist()
    [[1.0, 1.0], [4.0, 3.0], [8.0, 7.0]]
    """
    _checks.check_tensor("x", x, (2, 3), _checks.FLOATS)
    check_layout(layout, "x", x)
    names = [reduce] if isinstance(reduce, str) else reduce
    if not isinstance(names, (list, tuple)) or not names:
        raise TypeError(f"reduce: expected a string or a sequence of at least one, got {reduce!r}")
    for name in names:
        _checks.check_choice("reduce", name, reference.REDUCTIONS)
    packed = x.flatten(0, 1) if x.dim() == 3 else x
    if packed.shape[0] != layout.num_bytes:
        raise ValueError(f"x: expected the {layout.num_bytes} bytes of layout, got shape {list(x.shape)}")
    return patch_pool_fwd(packed, layout.patch_offsets, layout.patch_ids, list(names))


# --- schemas, references and fakes ------------------------------------------------------------------------------------

patch_pool_fwd = _common.define(
    "patch_pool_fwd",
    "(Tensor x, Tensor patch_offsets, Tensor patch_ids, str[] reduce) -> Tensor out",
    reference.patch_pool_fwd_reference,
    lambda x, offsets, _ids, reduce: x.new_empty(offsets.shape[0] - 1, x.shape[1] * len(reduce)),
)
# x and out are given only if some reduction is max or min.
patch_pool_bwd = _common.define(
    "patch_pool_bwd",
    "(Tensor grad_out, Tensor? x, Tensor? out, Tensor patch_offsets, Tensor patch_ids, str[] reduce) -> Tensor grad_x",
    reference.patch_pool_bwd_reference,
    lambda grad, _x, _out, _offsets, ids, reduce: grad.new_empty(ids.shape[0], grad.shape[1] // len(reduce)),
)


# --- autograd ---------------------------------------------------------------------------------------------------------
# Like torch's own reductions and indexing, pooling runs in the dtype of its input under autocast.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, patch_offsets, patch_ids, reduce = inputs
    has_ties = "max" in reduce or "min" in reduce
    ctx.save_for_backward(x if has_ties else None, output if has_ties else None, patch_offsets, patch_ids)
    ctx.reduce = reduce


def _backward(ctx: Any, grad_out: Tensor) -> Tensor:
    return patch_pool_bwd(grad_out, *ctx.saved_tensors, ctx.reduce)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _grad_out, x, out, patch_offsets, patch_ids, reduce = inputs
    ctx.save_for_backward(x, out, patch_offsets, patch_ids)
    ctx.reduce = reduce


def _second_backward(ctx: Any, cotangent: Tensor) -> Tensor:
    """Pool the cotangent with the weights by which the backward shares the gradient: it is linear in the gradient.

    The weights of a maximum or minimum are 1 / ties where a byte attains it, the others those of the reduction itself.
    """
    x, out, patch_offsets, patch_ids = ctx.saved_tensors
    width, grads = cotangent.shape[1], []

    def pool(y: Tensor, name: str) -> Tensor:
        return patch_pool_fwd(y, patch_offsets, patch_ids, [name])

    def unpool(y: Tensor) -> Tensor:
        return patch_unpool_fwd(y, patch_offsets, patch_ids)

    for i, name in enumerate(ctx.reduce):
        if name in ("max", "min"):
            extreme = out.detach()[:, i * width : (i + 1) * width].contiguous()
            tie = (x == unpool(extreme)).to(torch.promote_types(cotangent.dtype, torch.float32))
            weight = tie / unpool(pool(tie, "sum"))  # NaN in a patch with a NaN
            grads.append(pool(cotangent * weight, "sum").to(cotangent.dtype))
        else:
            grads.append(pool(cotangent, name))
    return torch.cat(grads, -1)


_autograd.register_autograd("patch_pool_fwd", _backward, setup_context=_save)
_autograd.register_autograd("patch_pool_bwd", _second_backward, setup_context=_save_gradient)
