"""Time to append a byte behind 512 bytes, in milliseconds, measured on a CPU.

For a BLT: reading its weights once, our model with int8 and with fp32 weights, a byte transformer of its size, and
transformers. For a MegaByte: the same with MEGABYTE-pytorch.
"""

from __future__ import annotations

import csv
import re

from extensions.figures import Colors
from extensions.results import newest
from matplotlib.figure import Figure

BEHIND, BATCH = 512, 1


def measured(kind: str) -> list[tuple[str, float, bool]]:
    """Return names, milliseconds a byte, and which are ours, of the model that `kind` starts the names of."""
    bars: dict[str, tuple[float, bool]] = {}
    with newest("generation").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["op"].startswith(kind)]
    for row in rows:
        found = re.match(rf"[\d.]+M parameters, (\d+) bytes behind {BEHIND}, batch {BATCH},", row["shape"])
        if found and row["median_ms"]:
            stored = row["dtype"].replace("float32", "fp32").replace(" weights", "")
            milliseconds = float(row["median_ms"]) / int(found[1])
            if row["implementation"] == "blt_kernels":
                bars[f"{kind}, {stored}"] = milliseconds, True
                bars[f"limit, {stored}"] = milliseconds * float(row["share_of_limit"]), False
            elif stored == "fp32" and not row["implementation"].startswith("limit"):
                bars[row["implementation"]] = milliseconds, False
    return sorted(((name, *bar) for name, bar in bars.items()), key=lambda bar: -bar[1])


def draw(colors: Colors) -> Figure:
    """Draw bars for both models."""
    figure = Figure(figsize=(5.3, 4.2), layout="constrained")
    groups = [measured("BLT"), measured("MegaByte")]
    for axes, bars in zip(figure.subplots(2, height_ratios=[len(bars) for bars in groups]), groups, strict=True):
        names, times, ours = zip(*bars, strict=True)
        fills = [colors.patches[1] if own else colors.patches[0] for own in ours]
        drawn = axes.barh(names, times, color=fills, edgecolor=colors.faint)
        axes.bar_label(drawn, fmt="{:.3g}", padding=3, color=colors.text, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    axes.set_xlabel("milliseconds a byte")
    return figure
