"""Bits per byte of held-out text over the FLOPs of a byte, for each model of the study, and what noise adds to them.

Within every family, the model that costs less a byte is better at equal training FLOPs. Noise costs BLT most.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict

from extensions.figures import Colors
from extensions.results import newest
from matplotlib.figure import Figure

FAMILIES = {  # mark, and where names stand beside it, in points
    "byte transformer": ("o", (-6, 5), "right"),
    "MegaByte": ("s", (6, 5), "left"),
    "BLT-Space": ("^", (6, -10), "left"),
    "BLT-Entropy": ("D", (6, -11), "left"),
}


def draw(colors: Colors) -> Figure:
    """Draw means over seeds, with standard deviations."""
    with (newest("study") / "runs.csv").open(newline="", encoding="utf-8") as file:
        groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
        for row in csv.DictReader(file):
            groups[row["family"], row["model"]].append(row)
    shades = dict(zip(FAMILIES, (colors.text, colors.second, colors.accent, colors.accent), strict=True))
    figure = Figure(figsize=(5.3, 6.2), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(3, 3.4))
    for family, (mark, offset, align) in FAMILIES.items():
        points = []
        for (of, name), rows in groups.items():
            if of == family:
                bits = [float(row["bits clean"]) for row in rows]
                points.append((float(rows[0]["mflops"]), statistics.mean(bits), statistics.stdev(bits), name))
        x, y, deviation, names = zip(*sorted(points), strict=True)
        style = {"linestyle": "--", "markerfacecolor": "none"} if family == "BLT-Space" else {}
        above.errorbar(x, y, deviation, marker=mark, color=shades[family], capsize=3, label=family, **style)
        for name, *place in zip(names, x, y, strict=True):
            text = {"textcoords": "offset points", "xytext": offset, "ha": align, "fontsize": 7.5}
            above.annotate(name, place, color=colors.text, **text)
    above.set(xlabel="millions of FLOPs a byte, forward", ylabel="bits per byte", xlim=(1.3, 5.6))
    above.legend(fontsize=8.5, labelcolor=colors.text)
    noises = [name.removeprefix("bits ") for name in next(iter(groups.values()))[0] if name.startswith("bits ")][1:]
    models = list(groups)
    height = 0.8 / len(noises)
    for i, noise in enumerate(noises):
        added = [
            statistics.mean(float(row[f"bits {noise}"]) - float(row["bits clean"]) for row in rows)
            for rows in groups.values()
        ]
        at = [n + (i - (len(noises) - 1) / 2) * height for n in range(len(models))]
        fill = colors.patches[i % len(colors.patches)]
        below.barh(at, added, height, color=fill, edgecolor=colors.faint, label=noise)
    below.set_yticks(range(len(models)), [name for _, name in models], fontsize=8.5)
    below.invert_yaxis()
    below.set_xlabel("bits per byte that noise adds")
    below.legend(fontsize=8.5, labelcolor=colors.text, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
