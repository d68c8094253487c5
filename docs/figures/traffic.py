"""Bytes that the CUDA kernels of seven ops move on the emulator, as multiples of the fewest that could do."""

from __future__ import annotations

import csv

import matplotlib.pyplot as plt
from extensions.figures import Colors
from extensions.measured import ROOT
from matplotlib.figure import Figure


def draw(colors: Colors) -> Figure:
    """Draw docs/contribute/traffic.csv, which tests/traffic_table.py writes and a test counts anew."""
    with (ROOT / "docs" / "contribute" / "traffic.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::-1]
    shares = [int(row["moved"]) / int(row["minimum"]) for row in rows]
    figure, axes = plt.subplots(figsize=(5.2, 2.8))
    bars = axes.barh([row["op"] for row in rows], shares, color=colors.accent, height=0.6)
    axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=4, color=colors.text)
    axes.axvline(1, color=colors.second, lw=1.5)
    axes.set(xlim=(0, 1.9), xlabel="bytes moved, in multiples of the minimum")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure
