"""ema_scan is compared with these peers on rows: x ``[B, S, D]`` and weights p ``[B, S]`` below 1.

H-Net itself calls a kernel of Mamba-2, which runs on CUDA only. `chunked` is its algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import associative_scan

CHUNK = 64


def loop(x: Tensor, p: Tensor) -> Tensor:
    """Take one step after the other."""
    y = torch.zeros_like(x[:, 0])
    rows = []
    for row, weight in zip(x.unbind(1), p[..., None].unbind(1), strict=True):
        y = weight * row + (1 - weight) * y
        rows.append(y)
    return torch.stack(rows, 1)


def chunked(x: Tensor, p: Tensor) -> Tensor:
    """Multiply chunks of 64 rows by the matrix of their weights, and add what the chunks before leave (Mamba-2)."""
    rows, length, width = x.shape
    padding = -length % CHUNK
    x = torch.nn.functional.pad(x, (0, 0, 0, padding)).view(rows, -1, CHUNK, width)
    p = torch.nn.functional.pad(p, (0, padding)).view(rows, -1, CHUNK)
    log_kept = torch.log1p(-p).cumsum(-1)
    kept = (log_kept[..., :, None] - log_kept[..., None, :]).tril().exp().tril()
    y = (kept * p[..., None, :]).to(x.dtype) @ x
    decay = log_kept.exp()[..., None].to(x.dtype)
    before = torch.zeros_like(y[:, 0, -1])
    carries = []
    for chunk in range(y.shape[1]):
        carries.append(before)
        before = y[:, chunk, -1] + decay[:, chunk, -1] * before
    return (y + decay * torch.stack(carries, 1)[:, :, None]).flatten(1, 2)[:, :length]


def scanned(x: Tensor, p: Tensor) -> Tensor:
    """Scan with torch's associative_scan, in its generic mode."""

    def combine(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return a[0] * b[0], b[0] * a[1] + b[1]

    weight = p[..., None].to(x.dtype)
    kept = (1 - weight).expand(x.shape)
    return associative_scan(combine, (kept, weight * x), dim=1, combine_mode="generic")[1]
