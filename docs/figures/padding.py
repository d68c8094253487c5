"""Source files as rows of a padded rectangle, much of it empty, and the same bytes packed end to end below."""

from __future__ import annotations

from itertools import accumulate

from extensions.figures import Colors
from extensions.measured import ROOT
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import blt_kernels as bk
from figures._cells import canvas, fill_of, label

FOLDER = ROOT / "blt_kernels" / "reference"
WIDTH = 20.0  # cells, of the longest document


def draw(colors: Colors) -> Figure:
    """Draw the batch both ways on one scale."""
    _ids, cu_seqlens = bk.to_ids([path.read_bytes() for path in sorted(FOLDER.glob("[a-z]*.py"))])
    lengths = cu_seqlens.diff().tolist()
    documents = len(lengths)
    total, longest = sum(lengths), max(lengths)
    scale = WIDTH / longest
    packed_rows = -(-total // longest)
    figure, axes = canvas(WIDTH + 0.2, documents + packed_rows + 3.4, 0.27)
    used = total / (documents * longest)
    title = f"padded: {documents} × {longest:,} = {documents * longest:,} places, {used:.0%} used"
    label(axes, 0.1, 0.5, title, colors, align="left")
    for row, length in enumerate(lengths):
        bar(axes, 0, row + 1.1, WIDTH, "none", colors, hatch="////")
        bar(axes, 0, row + 1.1, length * scale, fill_of(colors, row), colors)
    top = documents + 2.4
    label(axes, 0.1, top - 0.5, f"packed: {total:,} places, all used", colors, align="left")
    for document, (end, length) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
        begin = end - length
        while begin < end:
            row, column = divmod(begin, longest)
            part = min(end - begin, longest - column)
            bar(axes, column * scale, top + row + 0.1, part * scale, fill_of(colors, document), colors)
            begin += part
    return figure


def bar(axes: Axes, x: float, y: float, width: float, fill: str, colors: Colors, hatch: str = "") -> None:
    """Draw a bar of height 0.8."""
    axes.add_patch(Rectangle((x + 0.1, y), width, 0.8, fc=fill, ec=colors.faint, lw=0.6, hatch=hatch))
