"""Bits per byte over bytes of training text, for BLT of one cost a byte with patches of 4.5, 6 and 8, and for tokens.

Longer patches pay for a wider global transformer.
"""

from __future__ import annotations

from extensions.figures import Colors
from extensions.results import study_module
from matplotlib.figure import Figure

from figures._study import finish, look, results


def draw(colors: Colors) -> Figure | None:
    """Draw means over seeds, with standard errors. Returns None without results."""
    found = results()
    if found is None:
        return None
    families, tokens = study_module("families"), study_module("results").TOKENS
    models = families.longer_patches()
    looks = [
        (model.name, {"color": colors.accent, "marker": mark, "linestyle": line, "capsize": 2, "markersize": 5})
        for model, mark, line in zip(models, "o^s", (":", "--", "-"), strict=False)
    ]
    looks += [(f"{family} {models[0].size}", look(family, colors)) for family in tokens]
    figure = Figure(figsize=(5.3, 4.7), layout="constrained")
    axes, ticks = figure.subplots(), []
    for name, style in looks:
        points = [(runs[0], found.bits(name, x)) for x in found.budgets if (runs := found.group(name, x))]
        if points:
            read = [run.trained_bytes / 1e6 for run, _ in points]
            ticks = ticks or read
            label = f"{name}: {points[0][0].patch_size:.1f} bytes, {points[0][0].mflops:.2f} MFLOP a byte"
            axes.errorbar(read, [b.value for _, b in points], [b.error for _, b in points], label=label, **style)
    if not axes.containers:
        return None
    axes.set(xscale="log", xlabel="training text read, in MB", ylabel="bits per byte of held-out text")
    axes.set_xticks(ticks, [f"{megabytes:.2g}" for megabytes in ticks])
    axes.minorticks_off()
    finish(axes, colors, fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
