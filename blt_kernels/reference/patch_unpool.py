"""patch_unpool in plain PyTorch: the specification of `ops.patch_unpool`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from blt_kernels.layout import PatchLayout
from blt_kernels.reference._ragged import accumulator


def patch_unpool_reference(y: Tensor, layout: PatchLayout, ids: str = "patch") -> Tensor:
    """Give every byte the vector of a patch; see `ops.patch_unpool`."""
    if ids == "patch":
        return patch_unpool_fwd_reference(y, layout.patch_offsets, layout.patch_ids)
    return patch_unpool_fwd_reference(y, layout.decode_offsets, layout.decode_ids)


def patch_unpool_fwd_reference(y: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """out[i] = y[ids[i]], and 0 where the id is -1."""
    h = y.to(accumulator(y))  # so that autograd through this function sums in fp32 too
    return F.pad(h, (0, 0, 1, 0)).index_select(0, ids + 1).to(y.dtype)


def patch_unpool_bwd_reference(grad_out: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """grad_y[p] = sum of grad_out[i] over the bytes with ids[i] = p."""
    grad = grad_out.to(accumulator(grad_out))
    grad_y = grad.new_zeros(offsets.shape[0], grad.shape[1]).index_add(0, ids + 1, grad)
    return grad_y[1:].to(grad_out.dtype, copy=True)
