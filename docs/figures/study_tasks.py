"""Share of questions about characters answered right, with chance, and of words told from their misspellings."""

from __future__ import annotations

from extensions.figures import Colors
from extensions.results import study_module
from matplotlib.figure import Figure

from figures._study import finish, results, rows_of_points


def draw(colors: Colors) -> Figure | None:
    """Draw means over seeds, with standard errors of seeds and questions. Returns None without results."""
    found = results()
    if found is None or not found.names("task") or not found.names("misspelling"):
        return None
    chance = study_module("scores").CHANCE
    tasks, edits = found.names("task"), found.names("misspelling")
    figure = Figure(figsize=(5.3, 6.6), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(len(tasks), len(edits) + 1))
    rows_of_points(above, tasks, {name: found.shares_right("task", [name]) for name in tasks}, colors)
    for row, name in enumerate(tasks):
        above.vlines(100 * chance[name], row - 0.5, row + 0.5, colors=colors.text, linewidth=0.8, linestyles=":")
    above.set_xlabel("% of questions answered right; chance is dotted")
    finish(above, colors, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3)
    shares = {name: found.shares_right("misspelling", [name]) for name in edits}
    shares["mean"] = found.shares_right("misspelling", edits)
    rows_of_points(below, list(shares), shares, colors)
    below.set_xlabel("% of words told from their misspellings")
    below.spines[["top", "right"]].set_visible(False)
    return figure
