"""Pooling: three numbers for each byte of "to pool them" in a table, and below each patch the largest of each row."""

from __future__ import annotations

from itertools import pairwise

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from figures._cells import arrow, canvas, cell, characters, fill_of, label

TEXT = "to pool them"
WIDTH = 3


def draw(colors: Colors) -> Figure:
    """Draw x over its maxima, which `patch_pool` computes."""
    layout = bk.space_patch(bk.to_ids(TEXT)).compact()
    x = torch.randint(0, 10, (len(TEXT), WIDTH), generator=torch.Generator().manual_seed(3)).float()
    pooled = bk.patch_pool(x, layout)
    ids, offsets = layout.patch_ids.tolist(), layout.patch_offsets.tolist()
    figure, axes = canvas(len(TEXT) + 4, 9)
    left = 4
    label(axes, left - 0.4, 0.5, "bytes", colors, align="right")
    characters(axes, left, 0, TEXT, ids, colors)
    label(axes, left - 0.4, 2.8, "x  [T, D]", colors, align="right")
    label(axes, left - 0.4, 7.2, "out  [P, D]", colors, align="right")
    for t, patch in enumerate(ids):
        for d in range(WIDTH):
            best = bool(x[t, d] == pooled[patch, d])
            fill = fill_of(colors, patch) if best else "none"
            cell(axes, left + t, 1.3 + d, int(x[t, d]), colors, fill, bold=best)
    for patch, (begin, end) in enumerate(pairwise(offsets)):
        middle = left + (begin + end) / 2
        arrow(axes, (middle, 4.45), (middle, 5.55), colors.text)
        for d in range(WIDTH):
            cell(axes, middle - 0.5, 5.7 + d, int(pooled[patch, d]), colors, fill_of(colors, patch), bold=True)
    return figure
