"""patch_pool in plain PyTorch: the specification of `ops.patch_pool`.

Bytes beyond the last document have patch id -1. They go to an extra row C, which reads zeros and is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.layout import PatchLayout
from blt_kernels.reference._ragged import accumulator

REDUCTIONS = ("max", "min", "mean", "sum", "first", "last")


def patch_pool_reference(x: Tensor, layout: PatchLayout, reduce: str | Sequence[str] = "max") -> Tensor:
    """Reduce the bytes of each patch to one vector; see `ops.patch_pool`."""
    reduce = [reduce] if isinstance(reduce, str) else list(reduce)
    packed = x.flatten(0, 1) if x.dim() == 3 else x
    return patch_pool_fwd_reference(packed, layout.patch_offsets, layout.patch_ids, reduce)


def patch_pool_fwd_reference(x: Tensor, patch_offsets: Tensor, patch_ids: Tensor, reduce: Sequence[str]) -> Tensor:
    h = x.to(accumulator(x))  # [T, D]
    row = _row(patch_offsets, patch_ids)  # [T]
    lengths = patch_offsets.diff()[:, None]  # [C, 1]
    pooled = []
    for name in reduce:
        if name in ("max", "min"):
            # A NaN never equals the maximum, so the buffer takes no part in a tie.
            buffer = h.new_full((lengths.shape[0] + 1, h.shape[1]), torch.nan)
            y = buffer.scatter_reduce(0, row[:, None].expand_as(h), h, f"a{name}", include_self=False)[:-1]
            pooled.append(y.where(lengths > 0, 0))
        elif name in ("sum", "mean"):
            y = h.new_zeros(lengths.shape[0] + 1, h.shape[1]).index_add(0, row, h)[:-1]
            pooled.append(y if name == "sum" else y / lengths.clamp(min=1))
        else:
            byte = patch_offsets[:-1] if name == "first" else patch_offsets[1:] - 1
            byte = byte.where(lengths[:, 0] > 0, h.shape[0])
            pooled.append(_with_zero_row(h).index_select(0, byte))
    return torch.cat(pooled, -1).to(x.dtype)


def patch_pool_bwd_reference(
    grad_out: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    patch_offsets: Tensor,
    patch_ids: Tensor,
    reduce: Sequence[str],
) -> Tensor:
    """Return each byte's share of its patch's gradient: all (sum), 1/length (mean), 1/ties at a maximum or minimum."""
    grads = grad_out.to(accumulator(grad_out)).chunk(len(reduce), -1)  # [C, D] each
    row = _row(patch_offsets, patch_ids)
    position = torch.arange(row.shape[0], device=row.device)
    grad_x = grads[0].new_zeros(row.shape[0], grads[0].shape[1])
    for i, (name, grad) in enumerate(zip(reduce, grads, strict=True)):
        if name in ("max", "min"):
            assert x is not None
            assert out is not None
            tie = (x == _read(out.chunk(len(reduce), -1)[i], row)).to(grad.dtype)  # [T, D]
            ties = grad.new_zeros(grad.shape[0] + 1, grad.shape[1]).index_add(0, row, tie)[:-1]
            grad_x += tie * _read(grad / ties, row)
        elif name in ("sum", "mean"):
            lengths = patch_offsets.diff()[:, None] if name == "mean" else 1
            grad_x += _read(grad / lengths, row)
        else:
            byte = patch_offsets if name == "first" else F.pad(patch_offsets[1:] - 1, (0, 1))
            chosen = position == byte.index_select(0, row)
            grad_x += _read(grad, row).where(chosen[:, None], 0)
    return grad_x.to(grad_out.dtype)


def _row(patch_offsets: Tensor, patch_ids: Tensor) -> Tensor:
    """Return the patch of each byte, or C beyond the last document: int64 ``[T]``."""
    return patch_ids.long().where(patch_ids >= 0, patch_offsets.shape[0] - 1)


def _with_zero_row(y: Tensor) -> Tensor:
    return F.pad(y, (0, 0, 0, 1))


def _read(y: Tensor, row: Tensor) -> Tensor:
    """Return row `row` of y ``[C, D]`` for each byte, ``[T, D]``."""
    return _with_zero_row(y).index_select(0, row)
