"""Time a byte of the forward of each op, in nanoseconds, over the bytes of a batch from 1024 to 262144.

Most lines are level: the time is linear in the bytes. They fall where a fixed cost counts, and rise where data leave
the caches.
"""

from __future__ import annotations

import csv
from collections import defaultdict

from extensions.figures import Colors
from extensions.results import newest
from matplotlib.figure import Figure

SWEEP = " fwd, scaling with bytes"
NAMES = {
    "block_causal_attention window 512": "attention, window 512",
    "linear_entropy": "linear_entropy",
    "ngram_hash_embed sparse": "ngram_hash_embed",
    "patch_cross_attention encode": "cross attention",
    "patch_unpool": "patch_unpool",
    "patch_pool max": "patch_pool",
    "entropy_patch": "entropy_patch",
    "ngram_hash": "ngram_hash",
    "patch_starts": "patch_starts",
}


def measured() -> dict[str, list[tuple[int, float]]]:
    """Return bytes and nanoseconds a byte of each op, with two threads."""
    found = defaultdict(list)
    with newest("cpu").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            op, sweep, _ = row["op"].partition(SWEEP)
            if sweep and op in NAMES and row["threads"] == "2" and row["implementation"] == "blt_kernels":
                size = int(row["shape"].split()[0])
                found[op].append((size, float(row["median_ms"]) * 1e6 / size))
    return found


def draw(colors: Colors) -> Figure:
    """Draw a line for each op, with its name at the right end."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, ends = figure.subplots(), {}
    for i, (op, points) in enumerate(measured().items()):
        sizes, times = zip(*points, strict=True)
        (line,) = axes.plot(sizes, times, marker="o", markersize=3.5, color=(colors.accent, colors.second)[i % 2])
        ends[op] = times[-1], line.get_color()
    below = 0.0
    for op, (end, color) in sorted(ends.items(), key=lambda item: item[1]):
        below = max(end, below * 1.45)
        axes.annotate(NAMES[op], (sizes[-1] * 1.25, below), color=color, fontsize=9, va="center", annotation_clip=False)
    axes.set(xscale="log", yscale="log", xlabel="bytes of a batch", ylabel="ns a byte", xlim=(800, 1e7))
    axes.set_xticks(sizes, [f"{size // 1024}K" for size in sizes])
    axes.minorticks_off()
    axes.grid(axis="y", color=colors.faint, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
