"""Shows how many fewer bits per byte BLT by entropy has than models over 4k and 32k tokens, for each language.

The languages are ordered by their share of the training text, from half of it to nothing.
"""

from __future__ import annotations

from extensions.figures import Colors
from extensions.results import study_module
from matplotlib.figure import Figure

from figures._study import finish, look, results


def draw(colors: Colors) -> Figure | None:
    """Draw means over seeds, with standard errors of seeds and excerpts. Returns None without results."""
    found = results()
    families = study_module("results")
    leads = {} if found is None else {t: part for t in families.TOKENS if (part := found.log_leads(families.BLT, t))}
    if not leads:
        return None
    groups = sorted(found.groups(), key=lambda group: -found.share(group))
    figure = Figure(figsize=(5.3, 1.2 + 0.17 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for i, (tokens, part) in enumerate(leads.items()):
        axes.errorbar(
            [100 * part[group].value for group in groups],
            [row + 0.3 * (i - (len(leads) - 1) / 2) for row in range(len(groups))],
            xerr=[100 * part[group].error for group in groups],
            label=f"than {tokens}",
            **look(tokens, colors) | {"linestyle": "none", "markersize": 4},
        )
    names = [f"{group}, {share_of(found.share(group))}" for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=7.5)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.axvline(0.0, color=colors.text, linewidth=0.8)
    axes.set(xlabel=f"100 log(bits / bits of {families.BLT})", ylabel="share of the training text")
    finish(axes, colors, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)
    return figure


def share_of(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.2g}%" if share else "none"
