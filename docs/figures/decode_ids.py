"""Arrows from patches down to bytes: a byte reads the patch before that of the next byte, so nothing of its future."""

from __future__ import annotations

from itertools import pairwise

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from figures._cells import arrow, canvas, cell, characters, fill_of, label

TEXT = "read bytes"
LENGTHS = torch.tensor([[1, 4, 3, 2]])
LEFT = 4.6


def draw(colors: Colors) -> Figure:
    """Draw an arrow for every decode id."""
    layout = bk.PatchLayout.from_lengths(LENGTHS).compact()
    ids, offsets = layout.patch_ids.tolist(), layout.patch_offsets.tolist()
    figure, axes = canvas(LEFT + len(TEXT) + 0.2, 6.4)
    label(axes, LEFT - 0.4, 0.5, "patches", colors, align="right")
    label(axes, LEFT - 0.4, 4.4, "byte that reads", colors, align="right")
    label(axes, LEFT - 0.4, 5.8, "byte it predicts", colors, align="right")
    for patch, (begin, end) in enumerate(pairwise(offsets)):
        cell(axes, LEFT + begin, 0, patch, colors, fill_of(colors, patch), width=end - begin)
    characters(axes, LEFT, 3.9, TEXT, ids, colors)
    for i, patch in enumerate(layout.decode_ids.tolist()):
        if patch >= 0:
            whole = (offsets[patch] + offsets[patch + 1]) / 2
            inside = min(max(i + 0.5, offsets[patch] + 0.3), offsets[patch + 1] - 0.3)
            arrow(axes, (LEFT + (whole + inside) / 2, 1.1), (LEFT + i + 0.5, 3.8), colors.text, 0.8)
    characters(axes, LEFT, 5.3, TEXT[1:], ids[1:], colors)
    cell(axes, LEFT + len(TEXT) - 1, 5.3, "?", colors, mono=True)
    return figure
