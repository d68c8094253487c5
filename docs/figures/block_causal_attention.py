"""Three new bytes attend to a cache of eight keys and two free places: the last byte is aligned with the last key."""

from __future__ import annotations

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from figures._cells import canvas, cell, fill_of, label

QUERIES, USED, ROOM = 3, 8, 10


def draw(colors: Colors) -> Figure:
    """Draw which keys each query attends to, from one-hot values, without and with a window of four."""
    q, k, v = torch.zeros(QUERIES, 1, 32), torch.zeros(ROOM, 1, 32), torch.eye(ROOM, 32)[:, None]
    offsets = torch.tensor([0, QUERIES]), torch.tensor([0, ROOM])
    left = 4.4
    figure, axes = canvas(left + ROOM + 0.2, 2 * (QUERIES + 3), 0.34)
    for top, window in ((0.0, None), (QUERIES + 3.0, 4)):
        out = bk.block_causal_attention(q, k, v, *offsets, window=window, seqused_k=torch.tensor([USED]))
        label(axes, 0, top + 0.5, f"window={window}", colors, align="left", mono=True, size=9)
        for key in range(ROOM):
            label(axes, left + key + 0.5, top + 1.5, f"k{key}" if key < USED else "·", colors, size=9)
        for query in range(QUERIES):
            label(axes, left - 0.4, top + 2.5 + query, f"new byte {query}", colors, align="right", size=9)
            for key in range(ROOM):
                fill = fill_of(colors, 0) if out[query, 0, key] > 0 else "none"
                cell(axes, left + key, top + 2 + query, "", colors, fill)
    return figure
