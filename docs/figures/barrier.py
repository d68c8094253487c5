"""Six threads of a block in time, first in order, then backwards: each runs alone up to the barrier, then waits."""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from figures._cells import canvas, label

THREADS = 6
BEFORE, AFTER = (1.0, 1.4, 0.8, 1.2, 1.0, 0.9), (0.7, 0.5, 0.9, 0.6, 0.8, 0.5)
LEFT, HEIGHT = 3.2, 0.72


def draw(colors: Colors) -> Figure:
    """Draw one panel for each of two orders."""
    figure, axes = canvas(15, 15.7, unit=0.34)
    for title, top, order in (("forward", 0, range(THREADS)), ("backward", 8.4, range(THREADS - 1, -1, -1))):
        label(axes, 0, top + 0.5, title, colors, align="left", bold=True)
        for thread in range(THREADS):
            label(axes, 0, top + thread + 1.6, f"thread {thread}", colors, align="left")
        now, met = LEFT, LEFT + sum(BEFORE)
        for part, lengths in enumerate((BEFORE, AFTER)):
            for thread in order:
                y, length = top + thread + 1.6 - HEIGHT / 2, lengths[thread]
                axes.add_patch(Rectangle((now, y), length, HEIGHT, fc=colors.patches[part], ec=colors.faint, lw=0.6))
                now += length
                if part == 0:
                    axes.plot([now, met], [top + thread + 1.6] * 2, color=colors.faint, lw=1, ls=":")
        axes.plot([met, met], [top + 1.1, top + THREADS + 1.1], color=colors.accent, lw=2)
        label(axes, met, top + 0.5, "__syncthreads()", colors, color=colors.accent, mono=True)
    return figure
