"""Writes the results of the study: one line a run (CSV), means over seeds (markdown), and a picture."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blt_kernels._files import whole_file, write_text
from study.text import CLEAN, CONDITIONS, NOISES


@dataclass(frozen=True)
class Outcome:
    """Describes one run. FLOPs are of a byte forward, in millions; training is three times that, without the patcher.

    `mflops` are those of this implementation on batches of the training text, `paper_mflops` those of the formula of
    the BLT paper. `bits` are bits per byte by condition.
    """

    model: str
    family: str
    seed: int
    parameters: int
    table_parameters: int
    patch_size: float
    mflops: float
    paper_mflops: float
    patcher_mflops: float
    steps: int
    trained_bytes: int
    cpu_seconds: float
    bits: dict[str, float]


def write(outcomes: Sequence[Outcome], settings: dict[str, Any], folder: Path) -> None:
    """Write ``runs.csv``, ``table.md``, ``study.png`` and ``settings.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "runs.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        rows = [flat(outcome) for outcome in outcomes]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_text(folder / "table.md", table(outcomes))
    write_text(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
    draw(outcomes, folder / "study.png")


def flat(outcome: Outcome) -> dict[str, Any]:
    row = asdict(outcome)
    bits = row.pop("bits")
    return {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} | {
        f"bits {condition}": f"{bits[condition]:.4f}" for condition in CONDITIONS
    }


def by_model(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.model, []).append(outcome)
    return groups


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation, which is 0 for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(outcomes: Sequence[Outcome]) -> str:
    """Return bits per byte, mean ± standard deviation over seeds; for noised text, the difference to clean text."""
    noises = " | ".join(f"+ {noise}" for noise in NOISES)
    lines = [
        f"| model | parameters, in tables | patch | MFLOPs/byte | patcher | trained MB | held out | {noises} |",
        "|---|---|---:|---:|---:|---:|---:|" + "---:|" * len(NOISES),
    ]
    for model, group in by_model(outcomes).items():
        first = group[0]
        clean = spread([outcome.bits[CLEAN] for outcome in group])
        more = [spread([o.bits[noise] - o.bits[CLEAN] for o in group]) for noise in NOISES]
        cells = [
            model,
            f"{first.parameters / 1e6:.2f} M, {first.table_parameters / 1e6:.2f} M",
            f"{first.patch_size:.2f}",
            f"{first.mflops:.2f}",
            f"{first.patcher_mflops:.2f}" if first.patcher_mflops else "",
            f"{first.trained_bytes / 1e6:.2f}",
            f"{clean[0]:.3f} ± {clean[1]:.3f}",
            *(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in more),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw bits per byte over FLOPs a byte, and the cost of noise."""
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(outcome.family for outcome in outcomes))
    color = {family: f"C{i}" for i, family in enumerate(families)}
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = by_model(outcomes)
    for family in families:
        points = []
        for group in groups.values():
            if group[0].family == family:
                points.append((group[0].mflops, *spread([o.bits[CLEAN] for o in group]), group[0].model))
        x, y, deviation, names = zip(*sorted(points), strict=True)
        left.errorbar(x, y, deviation, color=color[family], marker="o", capsize=3, label=family)
        for name, *place in zip(names, x, y, strict=True):
            left.annotate(name, place, textcoords="offset points", xytext=(5, 5), fontsize=7)
    left.set(xlabel="millions of FLOPs a byte, forward, without patcher", ylabel="bits per byte, held out")
    left.set(xscale="log", title="equal training FLOPs; mean and deviation over seeds")
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter("{x:g}")
    left.margins(x=0.12)
    left.grid(alpha=0.3, which="both")
    left.legend()

    width = 0.8 / len(groups)
    for i, (model, group) in enumerate(groups.items()):
        costs = [spread([o.bits[noise] - o.bits[CLEAN] for o in group]) for noise in NOISES]
        x = [n + (i - (len(groups) - 1) / 2) * width for n in range(len(NOISES))]
        shade = 1.0 - 0.25 * [m for m, g in groups.items() if g[0].family == group[0].family].index(model)
        means, deviations = zip(*costs, strict=True)
        right.bar(x, means, width, yerr=deviations, color=color[group[0].family], alpha=shade, label=model)
    right.set_xticks(range(len(NOISES)), list(NOISES))
    right.set(ylabel="bits per byte more than clean", title="noised text")
    right.grid(alpha=0.3, axis="y")
    right.legend(fontsize=7, ncols=2)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")
