"""Three distributions over eight values and their entropies: certain 0 nats, two likely values, all equal ln 8 nats."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk


def draw(colors: Colors) -> Figure:
    """Draw softmax of three rows of logits, and what `token_entropy` returns for each."""
    logits = torch.zeros(3, 8)
    logits[0, 2] = 20.0
    logits[1, [2, 5]] = torch.tensor([4.0, 3.2])
    entropy = bk.token_entropy(logits)
    figure, row = plt.subplots(1, 3, figsize=(5.6, 1.7), sharey=True)
    for axes, p, nats in zip(row, logits.softmax(-1), entropy.tolist(), strict=True):
        axes.bar(range(8), p, color=colors.accent, width=0.75)
        axes.set_title(f"{nats:.2f} nats", color=colors.text, size=10)
        axes.set_xticks([])
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set_ylabel("probability")
    return figure
