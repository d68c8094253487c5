"""ema_scan in plain PyTorch: the specification of `ops.ema_scan`.

A row and the rows before it are joined in log2(T) steps: after the step of ``distance`` rows, a row has the sum of the
last ``2 * distance`` rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.reference._ragged import accumulator, document_offsets, local_index


def ema_scan_reference(x: Tensor, p: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """y[t] = p[t] x[t] + (1 - p[t]) y[t-1] along each document, with y = 0 before it; see `ops.ema_scan`."""
    documents = x.shape[0] if x.dim() == 3 else 1
    packed, of_rows = (x.flatten(0, 1), p.flatten()) if x.dim() == 3 else (x, p)
    return ema_scan_fwd_reference(packed, of_rows.to(accumulator(x)), cu_seqlens, documents).view(x.shape)


def ema_scan_fwd_reference(x: Tensor, p: Tensor, cu_seqlens: Tensor | None, num_documents: int) -> Tensor:
    before = local_index(x.shape[0], document_offsets(x, cu_seqlens, num_documents))
    p = p.where(before >= 0, 0)
    # Rows beyond the last document are cut off here, so that no NaN of theirs gets into a gradient.
    return _scan(p[:, None] * x.to(p.dtype).where(before[:, None] >= 0, 0), 1 - p, before).to(x.dtype)


def ema_scan_bwd_reference(
    grad_out: Tensor, x: Tensor, p: Tensor, y: Tensor, cu_seqlens: Tensor | None, num_documents: int
) -> tuple[Tensor, Tensor]:
    """grad_x[t] = p[t] g[t] and grad_p[t] = sum_d (x - y[t-1]) g[t], with g[t] = grad_out[t] + (1 - p[t+1]) g[t+1]."""
    offsets = document_offsets(x, cu_seqlens, num_documents)
    before = local_index(x.shape[0], offsets)
    # A document of the reversed rows is one of these rows, and what follows offsets[-1] precedes it.
    total = x.shape[0] - offsets.flip(0)
    behind = local_index(x.shape[0], F.pad(total, (1, 0))).where(before.flip(0) >= 0, -1)
    keep = F.pad(1 - p[1:], (0, 1)) if x.shape[0] else p
    inside = before >= 0
    g = _scan(grad_out.to(p.dtype).where(inside[:, None], 0).flip(0), keep.flip(0), behind).flip(0)
    previous = _shifted(y.to(p.dtype), 1, before >= 1)
    grad_x = torch.where(inside[:, None], p[:, None] * g, 0).to(x.dtype)
    grad_p = torch.where(inside, ((x.to(p.dtype) - previous) * g).sum(-1), 0)
    return grad_x, grad_p


def _scan(values: Tensor, keep: Tensor, before: Tensor) -> Tensor:
    """Return s[t] = values[t] + keep[t] s[t-1], where a row has ``before[t]`` rows of its document before it.

    What is in another document takes no part, even a NaN.
    """
    sums, keep, distance = values, keep.where(before >= 1, 0), 1
    while distance < sums.shape[0]:
        inside = before >= distance
        sums = sums + keep[:, None] * _shifted(sums, distance, inside)
        keep = keep * _shifted(keep, distance, inside)
        distance *= 2
    return sums


def _shifted(x: Tensor, distance: int, inside: Tensor) -> Tensor:
    """Return row t - distance of x for row t, and 0 where not `inside`."""
    moved = x.roll(distance, 0)
    return moved.where(inside if x.dim() == 1 else inside[:, None], 0)
