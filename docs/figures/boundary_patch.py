"""Marked bytes, and the patches that follow if a mark ends a patch, if it starts one, and if the first has one byte."""

from __future__ import annotations

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from figures._cells import canvas, cell, characters, label

TEXT = "HelloPatchWorld"


def draw(colors: Colors) -> Figure:
    """Draw marks on capital letters and three layouts."""
    marks = torch.tensor([character.isupper() for character in TEXT])
    left = 6
    figure, axes = canvas(left + len(TEXT) + 0.2, 5.4, 0.32)
    label(axes, left - 0.4, 0.5, "marks", colors, align="right", mono=True, size=9)
    for i, mark in enumerate(marks.tolist()):
        cell(axes, left + i, 0, "●" if mark else "", colors)
    rows = {
        'at="end"': bk.boundary_patch(marks),
        'at="start"': bk.boundary_patch(marks, at="start"),
        "  first=1": bk.boundary_patch(marks, at="start", first=1),
    }
    for row, (name, layout) in enumerate(rows.items()):
        y = 1.5 + 1.3 * row
        label(axes, left - 0.4, y + 0.5, name, colors, align="right", mono=True, size=9)
        characters(axes, left, y, TEXT, layout.patch_ids.tolist(), colors)
    return figure
