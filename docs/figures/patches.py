"""A sentence cut into patches: each byte in a box, one colour a patch, under a bar of how uncertain the model was.

Where a bar rises above the dashed threshold, a patch starts: at the first letters of words more often than at the last.
"""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

import blt_kernels as bk
from blt_kernels.models import ByteLM

TEXT = "The patches of a byte-latent model are longer where text is easy to predict."
COLUMNS = 22
NATS = 3.8  # the height of a row's bars
CELL = 0.3  # inches
BARS, BOX, GAP = 1.9, 1.0, 0.55  # heights of a row's parts, in cells


def rows_of(lengths: list[int]) -> list[list[int]]:
    """Divide patches into rows of at most COLUMNS bytes. Return the patches of each row."""
    rows: list[list[int]] = [[]]
    for patch, length in enumerate(lengths):
        if sum(lengths[p] for p in rows[-1]) + length > COLUMNS:
            rows.append([])
        rows[-1].append(patch)
    return rows


def draw(colors: Colors) -> Figure:
    """Draw TEXT, cut by the entropy model of the package."""
    model = ByteLM.bundled()
    threshold = model.config.threshold
    ids, cu_seqlens = bk.to_ids(TEXT), None
    entropy, layout = model.patch(ids, cu_seqlens)
    lengths = layout.compact().patch_lengths.tolist()
    uncertainty = [0.0, *(round(value, 2) for value in entropy.detach().tolist())]  # of each byte, before it is read
    rows = rows_of(lengths)
    height = len(rows) * (BARS + BOX + GAP) - GAP + 0.9
    figure = Figure(figsize=(CELL * COLUMNS, CELL * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, COLUMNS), ylim=(height, 0))
    axes.set_axis_off()
    legend(axes, colors)
    byte, top = 0, 0.9
    for patches in rows:
        below, x = top + BARS, 0
        limit = below - BARS * threshold / NATS
        for patch in patches:
            width = lengths[patch]
            fill = colors.patches[patch % len(colors.patches)]
            box = FancyBboxPatch(
                (x + 0.06, below + 0.06), width - 0.12, BOX - 0.12, boxstyle="round,pad=0,rounding_size=0.18"
            )
            box.set(fc=fill, ec="none")
            axes.add_patch(box)
            for i in range(width):
                size = BARS * uncertainty[byte] / NATS
                starts = uncertainty[byte] > threshold
                bar = Rectangle((x + i + 0.2, below - size), 0.6, size, fc=colors.second if starts else colors.accent)
                bar.set_alpha(1.0 if starts else 0.55)
                axes.add_patch(bar)
                shown = TEXT[byte].replace(" ", "␣")
                font = {"family": "monospace", "size": 15, "ha": "center", "va": "center_baseline"}
                faded = 0.45 if shown == "␣" else 1.0
                axes.text(x + i + 0.5, below + BOX / 2 + 0.03, shown, color=colors.text, alpha=faded, **font)
                byte += 1
            x += width
        axes.plot((0, x), (limit, limit), "--", color=colors.text, lw=0.9, alpha=0.7)
        top = below + BOX + GAP
    return figure


def legend(axes: Axes, colors: Colors) -> None:
    """Say what the bars are, above the first row."""
    parts = (
        ("how uncertain the model was of a byte", colors.accent, 0.55),
        ("above the threshold: a patch starts", colors.second, 1.0),
    )
    x = 0.2
    for text, color, alpha in parts:
        axes.add_patch(Rectangle((x, 0.1), 0.45, 0.5, fc=color, alpha=alpha))
        axes.text(x + 0.75, 0.37, text, size=10.5, va="center_baseline", color=colors.text)
        x += COLUMNS / 2
