"""Cross attention as masks of bytes and patches: of each row or column only one segment is unmasked."""

from __future__ import annotations

import torch
from extensions.figures import Colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import blt_kernels as bk
from figures._cells import canvas, cell, characters, fill_of, label

TEXT = "one byte, one patch"
LENGTHS = torch.tensor([[1, 3, 6, 4, 5]])
LEFT = 1.6


def weights(layout: bk.PatchLayout, direction: str) -> Tensor:
    """Return the weights of attention, [queries, keys], from one-hot values."""
    bytes_, patches = layout.num_bytes, layout.capacity
    queries, keys = (patches, bytes_) if direction == "encode" else (bytes_, patches)
    q, k, v = torch.zeros(queries, 1, 32), torch.zeros(keys, 1, 32), torch.eye(keys, 32)[:, None]
    out = bk.patch_cross_attention(q, k, v, layout, direction=direction, queries_per_patch=1)
    return out[:, 0, :keys]


def draw(colors: Colors) -> Figure:
    """Draw the weights of both directions, patches downwards and bytes to the right."""
    layout = bk.PatchLayout.from_lengths(LENGTHS).compact()
    figure, axes = canvas(LEFT + len(TEXT) + 0.2, 2 * (layout.capacity + 3.2), 0.28)
    for direction, top in (("encode", 0.0), ("decode", layout.capacity + 3.2)):
        found = weights(layout, direction)
        matrix(axes, top, direction, found if direction == "encode" else found.T, layout, colors)
    return figure


def matrix(axes: Axes, top: float, direction: str, unmasked: Tensor, layout: bk.PatchLayout, colors: Colors) -> None:
    """Draw one mask, its unmasked entries in the colour of the patch."""
    patches, bytes_ = unmasked.shape
    used = int((unmasked > 0).sum())
    reads = "patches read bytes" if direction == "encode" else "bytes read patches"
    title = f"{direction}, {reads}: {used} of {patches * bytes_} scores are unmasked"
    label(axes, 0, top + 0.5, title, colors, align="left", size=9)
    characters(axes, LEFT, top + 1.2, TEXT, layout.patch_ids.tolist(), colors, size=8)
    for patch in range(patches):
        label(axes, LEFT - 0.8, top + 2.8 + patch, patch, colors, size=8)
        for byte in range(bytes_):
            fill = fill_of(colors, patch) if unmasked[patch, byte] > 0 else "none"
            cell(axes, LEFT + byte, top + 2.3 + patch, "", colors, fill)
