"""Bars over the bytes of a text: how uncertain a small model is about each byte. A patch starts where one is high."""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from blt_kernels.models import ByteLM
from figures._cells import canvas, characters, label

TEXT = "The length of a patch"
TOP = 4.4  # nats, at the height of SCALE cells
SCALE = 5


def draw(colors: Colors) -> Figure:
    """Draw over each byte the entropy of its distribution before it is read, with the threshold."""
    model = ByteLM.bundled()
    ids, cu_seqlens = bk.to_ids([TEXT])
    entropy, layout = model.patch(ids, cu_seqlens)
    before = [None, *entropy.tolist()[:-1]]
    threshold = model.config.threshold
    figure, axes = canvas(len(TEXT) + 2.5, SCALE + 2, 0.32)
    left, base = 2.5, SCALE + 0.6
    for nats in range(int(TOP) + 1):
        y = base - SCALE * nats / TOP
        axes.plot([left, left + len(TEXT)], [y, y], color=colors.faint, lw=0.5)
        label(axes, left - 0.3, y, nats, colors, align="right", size=9)
    label(axes, 0.5, base - SCALE / 2, "nats", colors, size=9)
    starts = set(layout.patch_offsets.tolist())
    for i, value in enumerate(before):
        if value is not None:
            color = colors.accent if i in starts else colors.faint
            height = SCALE * value / TOP
            axes.bar(left + i + 0.5, -height, 0.7, base, color=color)
    y = base - SCALE * threshold / TOP
    axes.plot([left, left + len(TEXT)], [y, y], color=colors.second, lw=1.2, ls="--")
    note = f"threshold {threshold:.3g}"
    label(axes, left + len(TEXT), y - 0.4, note, colors, align="right", color=colors.second, size=9)
    characters(axes, left, base + 0.2, TEXT, layout.patch_ids.tolist(), colors, size=9)
    return figure
