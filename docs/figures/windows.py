"""Attention masks of three packed documents: triangles on the diagonal, and bands of four with a window."""

from __future__ import annotations

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure
from torch import Tensor

import blt_kernels as bk
from figures._cells import canvas, cell, fill_of, label

CU_SEQLENS = (0, 7, 11, 20)
WINDOW = 4


def weights(window: int | None) -> Tensor:
    """Return the weights of attention, [queries, keys], from one-hot values."""
    total = CU_SEQLENS[-1]
    zeros, ones = torch.zeros(total, 1, 32), torch.eye(total, 32)[:, None]
    out = bk.block_causal_attention(zeros, zeros, ones, torch.tensor(CU_SEQLENS), window=window)
    return out[:, 0, :total]


def draw(colors: Colors) -> Figure:
    """Draw which byte attends to which, without and with a window."""
    total = CU_SEQLENS[-1]
    figure, axes = canvas(2 * total + 3.6, total + 2.4, 0.15)
    for left, window in ((0.2, None), (total + 3.2, WINDOW)):
        label(axes, left, 0.8, f"window={window}", colors, align="left", mono=True, size=9)
        found = weights(window)
        for query in range(total):
            document = sum(query >= end for end in CU_SEQLENS[1:])
            for key in range(total):
                fill = fill_of(colors, document) if found[query, key] > 0 else "none"
                cell(axes, left + key, 2 + query, "", colors, fill)
    return figure
