"""Shows how much less noise costs models over bytes than a model over 4k tokens, for each noise.

The measure is the ratio of bits per byte on noised and on clean text, against the same ratio of the model over tokens.
"""

from __future__ import annotations

from extensions.figures import Colors
from extensions.results import study_module
from matplotlib.figure import Figure

from figures._study import finish, results, rows_of_points


def draw(colors: Colors) -> Figure | None:
    """Draw means over seeds, with standard errors of seeds and excerpts. Returns None without results."""
    found = results()
    names = [] if found is None else found.names("noise")
    base = study_module("results").TOKENS[0]
    leads = {}
    for name, noises in [*((name, [name]) for name in names), ("mean", names)] if names else ():
        others = {family: found.noise_lead(family, base, noises) for family in found.measured if family != base}
        if known := {family: lead for family, lead in others.items() if lead is not None}:
            leads[name] = known
    if not leads:
        return None
    figure = Figure(figsize=(5.3, 4.6), layout="constrained")
    axes = figure.subplots()
    rows_of_points(axes, list(leads), leads, colors)
    axes.axvline(0.0, color=colors.text, linewidth=0.8)
    axes.set_xlabel(f"% less of noised over clean bits than {base}")
    finish(axes, colors, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3)
    return figure
