"""Shows what a byte costs over the bytes of a row, from 1k to 1M: FLOPs forward, time and memory of a training step.

The models have as many parameters. A transformer that attends to its whole row costs more a byte the longer the row is.
MegaByte with long patches, and models with windows, cost about the same for any length, and their memory is linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from extensions.figures import Colors
from extensions.results import newest, study_module
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(colors: Colors) -> Figure | None:
    """Draw one panel for FLOPs, which are counted for every length, and two for what was measured.

    Returns None without results.
    """
    path = newest("study-long")
    if path is None:
        return None
    long_report = study_module("long_report")
    points = long_report.read(path)
    figure = Figure(figsize=(5.3, 7.4), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    _lines(panels[0], points, "forward", lambda point: 1e3 * point.gflop / point.context, colors)
    _lines(panels[1], points, "step", lambda point: point.median, colors)
    _lines(panels[2], points, "step", lambda point: point.peak_mb / 1e3, colors)
    panels[0].set_ylabel("MFLOP a byte, forward")
    panels[1].set_ylabel("µs a byte, training step")
    panels[2].set_ylabel("peak GB, training step")
    contexts = sorted({point.context for point in points})
    panels[2].set_xlabel("bytes of a row")
    panels[2].set_xticks(contexts, [long_report.name_of(context) for context in contexts])
    panels[2].minorticks_off()
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=2,
        fontsize=8.5,
        labelcolor=colors.text,
    )
    return figure


def _lines(axes: Axes, points: list[Any], run: str, value: Callable[[Any], float], colors: Colors) -> None:
    shades = {"transformer": colors.text, "MegaByte": colors.second, "BLT": colors.accent}
    drawn: dict[str, int] = {}
    for model in dict.fromkeys(point.model for point in points):
        family = next(name for name in shades if model.startswith(name))
        style = ("-", "--", ":")[drawn.get(family, 0)]
        drawn[family] = drawn.get(family, 0) + 1
        found = [(p.context, value(p)) for p in points if (p.model, p.run) == (model, run) and value(p) > 0]
        if found:
            axes.plot(*zip(*found, strict=True), style, marker="o", markersize=3.5, color=shades[family], label=model)
    axes.set(xscale="log", yscale="log")
    axes.grid(axis="y", color=colors.faint, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
