"""Has what the pictures of the study share: its newest results, and the look of every family."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from extensions.figures import Colors
from extensions.results import newest
from matplotlib.axes import Axes

# The colour, the mark, and whether lines are dashed and marks hollow.
FAMILIES = {
    "tokens 4k": ("second", "o", False),
    "tokens 32k": ("second", "o", True),
    "bytes": ("text", "s", False),
    "MegaByte": ("text", "D", True),
    "BLT-Space": ("accent", "^", True),
    "BLT-Entropy": ("accent", "^", False),
}


def results() -> Any:
    """Return the newest results of the study, None if there are none."""
    folder = newest("study")
    return None if folder is None else _load(folder)


@cache
def _load(folder: Path) -> Any:
    return importlib.import_module("study.results").load(folder)


def look(family: str, colors: Colors, hollow: bool | None = None) -> dict[str, Any]:
    """Return the arguments of `Axes.errorbar` for a family."""
    color, mark, dashed = FAMILIES[family]
    fill = {"markerfacecolor": "none"} if (dashed if hollow is None else hollow) else {}
    line = {"linestyle": "--"} if dashed else {}
    return {"color": getattr(colors, color), "marker": mark, "capsize": 2, "markersize": 5, **fill, **line}


def finish(axes: Axes, colors: Colors, **legend: Any) -> None:
    """Take away the frame, and set the legend."""
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(labelcolor=colors.text, **{"fontsize": 8, **legend})


def rows_of_points(
    axes: Axes, names: list[str], values: dict[str, dict[str, Any]], colors: Colors, scale: float = 100.0
) -> None:
    """Draw one row for each name, with an estimate for each family that has one: `values[name][family]`."""
    families = [family for family in FAMILIES if any(family in values[name] for name in names)]
    for i, family in enumerate(families):
        at = [
            (n + (i - (len(families) - 1) / 2) * 0.7 / len(families), values[name].get(family))
            for n, name in enumerate(names)
        ]
        at = [(y, estimate) for y, estimate in at if estimate is not None]
        axes.errorbar(
            [scale * estimate.value for _, estimate in at],
            [y for y, _ in at],
            xerr=[scale * estimate.error for _, estimate in at],
            label=family,
            **look(family, colors) | {"linestyle": "none", "markersize": 4},
        )
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for row in range(len(names) - 1):
        axes.axhline(row + 0.5, color=colors.faint, linewidth=0.5)
