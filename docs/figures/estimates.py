"""Estimated shares of the limit of an H200 that the kernels of each op reach, forward and backward."""

from __future__ import annotations

import csv

import matplotlib.pyplot as plt
from extensions.figures import Colors
from extensions.measured import ROOT
from matplotlib.figure import Figure


def draw(colors: Colors) -> Figure:
    """Draw the first shape of each op in bench/results/model-sm90.csv, forward and backward."""
    with (ROOT / "bench" / "results" / "model-sm90.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] == "H200" and row["kernel"] == "all"]
    shares: dict[str, float] = {}
    for row in rows:
        shares.setdefault(row["op"], 100 * float(row["share"]))
    names = list(shares)[::-1]
    figure, axes = plt.subplots(figsize=(5.2, 0.24 * len(names) + 0.8))
    bars = axes.barh(names, [shares[name] for name in names], color=colors.accent, height=0.6)
    axes.bar_label(bars, [f"{shares[name]:.0f}%" for name in names], padding=4, color=colors.text, size=8)
    axes.set(xlim=(0, 108), ylim=(-0.6, len(names) - 0.4), xlabel="estimated share of the limit of an H200 (%)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    return figure
