"""Shows how many bits per byte each changed part costs BLT by entropy, or gains, against the model as it is."""

from __future__ import annotations

from extensions.figures import Colors
from extensions.results import study_module
from matplotlib.figure import Figure

from figures._study import results


def draw(colors: Colors) -> Figure | None:
    """Draw means over seeds, with standard errors. Returns None without results."""
    found = results()
    base, bits, tflops = study_module("sections").ablation_bits(found) if found is not None else ("", {}, 0.0)
    leads = {name: found.lead(base, name, tflops) for name in bits if name != base}
    if not leads:
        return None
    figure = Figure(figsize=(5.3, 0.9 + 0.28 * len(leads)), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [lead.value for lead in leads.values()],
        range(len(leads)),
        xerr=[lead.error for lead in leads.values()],
        color=colors.accent,
        marker="o",
        markersize=4,
        linestyle="none",
        capsize=2,
    )
    axes.set_yticks(range(len(leads)), [name.removeprefix(f"{base}, ") for name in leads], fontsize=8.5)
    axes.set_ylim(len(leads) - 0.5, -0.5)
    axes.axvline(0.0, color=colors.text, linewidth=0.8)
    axes.set_xlabel(f"bits per byte more than {base}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
