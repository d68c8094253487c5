"""Bits per byte of held-out text over the FLOPs of training, for models over tokens, over bytes, and over patches.

Every point is the best size of a family at a budget. For BLT by entropy, one line counts the patcher and one does not.
"""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.figure import Figure

from figures._study import FAMILIES, finish, look, results


def draw(colors: Colors) -> Figure | None:
    """Draw means over seeds, with standard errors. Returns None without results."""
    found = results()
    if found is None:
        return None
    figure = Figure(figsize=(5.3, 4.4), layout="constrained")
    axes = figure.subplots()
    for family in FAMILIES:
        for paid in (False, True) if family == "BLT-Entropy" else (False,):
            curve = found.curve(family, paid)
            if curve:
                flops, bits, _ = zip(*curve, strict=True)
                style = look(family, colors, hollow=paid or None) | ({"linestyle": ":"} if paid else {})
                name = f"{family}, patcher counted" if paid else family
                axes.errorbar(flops, [b.value for b in bits], [b.error for b in bits], label=name, **style)
    if not axes.containers:
        return None
    axes.set(xscale="log", xlabel="training, in TFLOP", ylabel="bits per byte of held-out text")
    axes.set_xticks(found.budgets, [f"{budget:g}" for budget in found.budgets])
    axes.minorticks_off()
    finish(axes, colors)
    return figure
