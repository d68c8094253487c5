"""H-Net's chunking and dechunking in plain PyTorch: its own smoothing is a kernel of Mamba-2 for CUDA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peers import ema_scan


def chunk(x: Tensor, marks: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vectors at boundaries ``[P, D]`` and the documents of them."""
    return x[marks], F.pad(marks.cumsum(0)[cu_seqlens[1:] - 1], (1, 0))


def dechunk(chunks: Tensor, cu_chunks: Tensor, marks: Tensor, p: Tensor) -> Tensor:
    """Smooth the chunks of each document, and give each byte the average of its chunk."""
    weights = p.clamp(1e-4, 1 - 1e-4)[marks]
    lengths = cu_chunks.diff().tolist()
    documents = zip(chunks.split(lengths), weights.split(lengths), strict=True)
    smooth = torch.cat([ema_scan.chunked(x[None], w[None])[0] for x, w in documents])
    return smooth.gather(0, (marks.cumsum(0) - 1)[:, None].expand(-1, chunks.shape[1]))
