"""One vector for each of four patches, and what every byte of "to pool them" reads with patch ids and decode ids."""

from __future__ import annotations

from itertools import pairwise

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from figures._cells import canvas, cell, characters, fill_of, label

TEXT = "to pool them"
NAMES = "ABCD"


def draw(colors: Colors) -> Figure:
    """Draw patches A to D and which of them each byte gets."""
    layout = bk.space_patch(bk.to_ids(TEXT)).compact()
    y = torch.arange(1.0, len(NAMES) + 1)[:, None]
    left = 5.4
    figure, axes = canvas(left + len(TEXT) + 0.2, 5.6, 0.34)
    label(axes, left - 0.4, 0.5, "y", colors, align="right", mono=True)
    for patch, (begin, end) in enumerate(pairwise(layout.patch_offsets.tolist())):
        cell(axes, left + begin, 0, NAMES[patch], colors, fill_of(colors, patch), width=end - begin, bold=True)
    label(axes, left - 0.4, 1.9, "bytes", colors, align="right")
    characters(axes, left, 1.4, TEXT, layout.patch_ids.tolist(), colors)
    for row, (name, ids) in enumerate((("patch", layout.patch_ids), ("decode", layout.decode_ids))):
        top = 3 + 1.4 * row
        label(axes, left - 0.4, top + 0.5, f'ids="{name}"', colors, align="right", mono=True)
        read = bk.patch_unpool(y, layout, name)[:, 0].int().tolist()
        for i, (number, patch) in enumerate(zip(read, ids.tolist(), strict=True)):
            shown = NAMES[number - 1] if number else "0"
            cell(axes, left + i, top, shown, colors, fill_of(colors, patch))
    return figure
