"""Three files of different lengths as pieces, and the batches that training packs the pieces into without padding."""

from __future__ import annotations

import tempfile
from pathlib import Path

from extensions.figures import Colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from blt_kernels.train import data

SIZES, CONTEXT, BATCH = (150, 46, 102), 64, 96  # in bytes


def draw(colors: Colors) -> Figure:
    """Draw what `PackedBatches` makes of files of these sizes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.txt" for i in range(len(SIZES))]
        for path, size in zip(paths, SIZES, strict=True):
            path.write_text(path.stem * size)
        sources = data.find_sources(paths)
        batches = data.PackedBatches(sources, BATCH, CONTEXT, seed=3)
        rows = [batches.rows(step) for step in range(batches.batches_per_epoch)]
    colors_of = {source.path: fill for source, fill in zip(sources, colors.patches, strict=False)}
    figure = Figure(figsize=(5.3, 2.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-34, max(SIZES) + 8), ylim=(6.6, -0.2))
    axes.set_axis_off()
    y = 0.0
    for source in sorted(sources, key=lambda source: source.path):
        start = 0
        axes.text(-2, y + 0.4, f"file {int(source.path.stem) + 1}", ha="right", va="center", size=10)
        for i in range(data.num_pieces(source.size, CONTEXT)):
            length = data.find_piece(source, i, CONTEXT).length
            _bar(axes, start, y, length, colors_of[source.path], colors)
            start += length
        y += 1
    y += 0.6
    for step, batch in enumerate(rows):
        start = 0
        axes.text(-2, y + 0.4, f"step {step + 1}", ha="right", va="center", size=10)
        for row in batch:
            _bar(axes, start, y, row.length, colors_of[row.source.path], colors)
            start += row.length
        y += 1
    return figure


def _bar(axes: Axes, x: float, y: float, width: float, fill: str, colors: Colors) -> None:
    axes.add_patch(Rectangle((x, y), width, 0.8, fc=fill, ec=colors.text, lw=0.8))
    axes.text(x + width / 2, y + 0.4, width, ha="center", va="center", size=9)
