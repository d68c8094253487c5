"""For each op three times on a logarithmic scale: the limit of the machine, this library, and the best alternative."""

from __future__ import annotations

import csv

import matplotlib.pyplot as plt
from extensions.figures import Colors
from extensions.measured import ROOT, readme
from matplotlib.figure import Figure

OPS = (
    "entropy_patch",
    "patch_pool max",
    "patch_unpool decode",
    "ngram_hash_embed",
    "patch_cross_attention encode",
    "patch_cross_attention decode",
    "block_causal_attention",
)


def draw(colors: Colors) -> Figure:
    """Draw the forward in fp32, from the first rows of the newest results of the CPU."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    for y, op in enumerate(reversed(OPS)):
        ours, limit, best = times(op)
        axes.plot([limit, best], [y, y], color=colors.faint, lw=1, zorder=1)
        for value, marker, color in ((limit, "|", colors.text), (ours, "o", colors.accent), (best, "s", colors.second)):
            axes.scatter(value, y, marker=marker, color=color, s=60 if marker == "|" else 28, zorder=2)
    names = "limit", "blt_kernels", "best alternative"
    for name, marker, color in zip(names, "|os", (colors.text, colors.accent, colors.second), strict=True):
        axes.scatter([], [], marker=marker, color=color, label=name)
    axes.set_yticks(range(len(OPS)), [op.replace(" max", "").replace(" ", ", ") for op in reversed(OPS)])
    axes.set(xscale="log", xlabel="milliseconds")
    axes.legend(loc="lower center", bbox_to_anchor=(0.3, 1), ncols=3, labelcolor=colors.text)
    axes.grid(axis="x", color=colors.faint, lw=0.4)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def times(op: str) -> tuple[float, float, float]:
    """Return milliseconds of this library, of the limit, and of the best peer."""
    path = readme().newest(ROOT / "bench" / "results", "cpu")
    with path.open(newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row["op"] in (op, f"{op} fwd") and row["dtype"] == "float32"]
    threads, shape = max((row["threads"] for row in found), key=int), found[0]["shape"]
    rows = {row["implementation"]: row for row in found if (row["threads"], row["shape"]) == (threads, shape)}
    ours = rows["blt_kernels"]
    peers = [float(row["median_ms"]) for name, row in rows.items() if name != "blt_kernels" and "limit" not in name]
    median = float(ours["median_ms"])
    return median, median * float(ours["share_of_limit"]), min(peers)
