"""Patches read their own bytes, and with a window of two also those of the patch before, within documents."""

from __future__ import annotations

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from figures._cells import canvas, cell, characters, fill_of, label

TEXTS = ("one byte", "a patch")
LENGTHS = torch.tensor([[1, 3, 4], [1, 1, 5]])


def draw(colors: Colors) -> Figure:
    """Draw which bytes each patch reads, from one-hot values, without and with a window."""
    layout = bk.PatchLayout.from_lengths(LENGTHS).compact()
    text, patches = "".join(TEXTS), layout.capacity
    q, k, v = torch.zeros(patches, 1, 32), torch.zeros(len(text), 1, 32), torch.eye(len(text), 32)[:, None]
    left = 2.0
    figure, axes = canvas(left + len(text) + 0.2, 2 * (patches + 3.2), 0.3)
    for top, window in ((0.0, None), (patches + 3.2, 2)):
        out = bk.patch_cross_attention(q, k, v, layout, direction="encode", queries_per_patch=1, window=window)
        label(axes, 0, top + 0.5, f"window={window}", colors, align="left", mono=True, size=9)
        characters(axes, left, top + 1.2, text, layout.patch_ids.tolist(), colors, size=9)
        for patch in range(patches):
            label(axes, left - 0.8, top + 2.8 + patch, patch, colors, size=9)
            for byte in range(len(text)):
                fill = fill_of(colors, patch) if out[patch, 0, byte] > 0 else "none"
                cell(axes, left + byte, top + 2.3 + patch, "", colors, fill)
    return figure
