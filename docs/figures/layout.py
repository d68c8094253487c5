"""The tensors of a PatchLayout for two documents, "a byte" and "model": ids under each byte, offsets at the edges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from extensions.figures import Colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import blt_kernels as bk
from figures._cells import canvas, cell, characters, fill_of, label

TEXTS = ("a byte", "model")
LENGTHS = torch.tensor([[1, 1, 4], [1, 2, 2]])
LEFT = 5.2


def draw(colors: Colors) -> Figure:
    """Draw every tensor on the scale of the bytes."""
    layout = bk.PatchLayout.from_lengths(LENGTHS).compact()
    text, ids = "".join(TEXTS), layout.patch_ids.tolist()
    figure, axes = canvas(LEFT + len(text) + 0.5, 9.6)
    name(axes, 0.5, "bytes", colors)
    characters(axes, LEFT, 0, text, ids, colors)
    cells(axes, 1.3, "patch_ids", ids, ids, colors)
    cells(axes, 2.6, "decode_ids", layout.decode_ids.tolist(), layout.decode_ids.tolist(), colors)
    edges(axes, 4.6, "patch_offsets", layout.patch_offsets.tolist(), layout.patch_offsets.tolist(), colors)
    edges(axes, 6.3, "cu_seqlens", layout.cu_seqlens.tolist(), layout.cu_seqlens.tolist(), colors)
    first_bytes = layout.patch_offsets[layout.cu_patches.long()].tolist()
    edges(axes, 8.0, "cu_patches", first_bytes, layout.cu_patches.tolist(), colors)
    return figure


def name(axes: Axes, y: float, text: str, colors: Colors) -> None:
    """Write the name of a tensor to the left of its row."""
    label(axes, LEFT - 0.4, y, text, colors, align="right", mono=True)


def cells(axes: Axes, y: float, title: str, values: Sequence[int], patches: Sequence[int], colors: Colors) -> None:
    """Draw one value a byte, in the colour of a patch."""
    name(axes, y + 0.5, title, colors)
    for i, (value, patch) in enumerate(zip(values, patches, strict=True)):
        cell(axes, LEFT + i, y, value, colors, fill_of(colors, patch))


def edges(axes: Axes, y: float, title: str, places: Sequence[int], values: Sequence[int], colors: Colors) -> None:
    """Draw values at edges between bytes."""
    name(axes, y + 0.45, title, colors)
    axes.plot([LEFT + places[0], LEFT + places[-1]], [y, y], color=colors.text, lw=1)
    for place, value in zip(places, values, strict=True):
        axes.plot([LEFT + place] * 2, [y - 0.2, y + 0.1], color=colors.text, lw=1)
        label(axes, LEFT + place, y + 0.6, value, colors)
