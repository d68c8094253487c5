"""Two documents of noisy steps and their moving averages: large weights follow at once, small weights smooth."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk

ENDS = (0, 40, 64)


def draw(colors: Colors) -> Figure:
    """Draw x, y and the weights."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor([1.0] * 20 + [3.0] * 20 + [2.0] * 24)
    x = steps + 0.4 * torch.randn(ENDS[-1], generator=generator)
    p = torch.full((ENDS[-1],), 0.15)
    p[[0, 20, 40]] = 1.0
    y = bk.ema_scan(x[:, None], p, torch.tensor(ENDS))[:, 0]
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(5.4, 3.2), sharex=True, height_ratios=(3, 1), gridspec_kw={"hspace": 0.15}
    )
    upper.plot(x, ".", color=colors.second, ms=4, label="x")
    for begin, end in pairwise(ENDS):
        upper.plot(range(begin, end), y[begin:end], color=colors.accent, label="y" if begin == 0 else None)
    lower.bar(range(ENDS[-1]), p, color=colors.text, width=0.6)
    lower.set_ylabel("p")
    lower.set_xlabel("row; a document ends before row 40")
    upper.legend(labelcolor=colors.text, loc="upper left")
    for axes in (upper, lower):
        axes.axvline(ENDS[1] - 0.5, color=colors.faint, ls="--", lw=1)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
