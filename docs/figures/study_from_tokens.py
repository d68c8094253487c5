"""Training loss over bytes read, for BLT from scratch and for BLT that begins as a trained transformer over tokens."""

from __future__ import annotations

import statistics

from extensions.figures import Colors
from extensions.results import study_module
from matplotlib.figure import Figure

from figures._study import finish, results

BEGINNING = 0.1  # of the run, which is left out


def draw(colors: Colors) -> Figure | None:
    """Draw means over seeds. Returns None without results."""
    found = results()
    base, begun = study_module("sections").begun_models(found) if found is not None else ("", [])
    if not begun:
        return None
    tflops = max(run.tflops for run in found.runs if run.model in begun)
    figure = Figure(figsize=(5.3, 3.6), layout="constrained")
    axes = figure.subplots()
    looks = [(colors.text, "-"), (colors.accent, "-"), (colors.accent, "--"), (colors.second, "-")]
    for name, (color, line) in zip([base, *begun], looks, strict=False):
        runs = [run for run in found.group(name, tflops) if run.run in found.curves]
        if runs:
            losses = [statistics.fmean(values) for values in zip(*(found.curves[run.run] for run in runs), strict=True)]
            read = [runs[0].trained_bytes / 1e6 * (i + 0.5) / len(losses) for i in range(len(losses))]
            start = round(BEGINNING * len(losses))
            label = f"{name} from scratch" if name == base else name
            axes.plot(read[start:], losses[start:], color=color, linestyle=line, linewidth=1.2, label=label)
    axes.set(xlabel="training text read, in MB", ylabel="training loss, in bits per byte")
    finish(axes, colors)
    return figure
