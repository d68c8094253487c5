"""Draws entropies, threshold and patch boundaries over the bytes as a picture."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blt_kernels._files import whole_file
from blt_kernels.cli.patch.render import Glyph, glyphs
from blt_kernels.cli.patch.rules import Rules
from blt_kernels.cli.patch.statistics import Statistics
from blt_kernels.cli.patch.window import Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW = 100  # a row of the picture shows so many bytes, each labelled
LABEL_SIZE = 8  # points
LABELLED = 1000  # a window of more bytes is one row without labels
PATCH_COLORS = ("#dcebff", "#fff0d0")
CURVE, LIMIT, EDGE = "#1f5fa8", "#c0392b", "#7a7a7a"


def write(path: Path, title: str, window: Window, statistics: Statistics, rules: Rules) -> None:
    """Write `draw`'s picture of a window of a file; the suffix of `path` chooses the format.

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed; the message has the command.
    """
    figure = draw(title, window, statistics, rules)
    with whole_file(path) as part:
        figure.savefig(part, dpi=110, format=path.suffix[1:] or "png")


def draw(title: str, window: Window, statistics: Statistics, rules: Rules) -> Figure:
    """Draw a window of a file.

    The point at byte i is the entropy of the model after it has read byte i; where it is high enough, the boundary
    right after it starts a new patch. Without entropies the curve is the length of the byte's patch.

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed; the message has the command.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"--plot: needs {missing.name}: pip install 'blt-kernels[cli]'") from None

    size = len(window.data)
    step = ROW if size <= LABELLED else size
    rows = max(math.ceil(size / step), 1)
    figure = Figure(figsize=(16, 1.2 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    curve = window.entropy if window.entropy is not None else _patch_lengths(window)
    top = 1.08 * max([*curve, _limit(window, rules) or 0, 1e-9])
    for row, axis in enumerate(axes):
        begin = window.start + row * step
        offsets = _draw_row(axis, window, curve, rules, begin, begin + step)
        axis.set_ylim(0, top)
        axis.set_ylabel("entropy (nats)" if window.entropy is not None else "patch length (bytes)")
    offsets.set_xlabel("offset (bytes)")
    shown = f"bytes {window.start:,} to {window.start + size:,} of {statistics.bytes:,}"
    if statistics.mean is not None:
        shown += f"; {statistics.patches:,} patches, {statistics.mean:.2f} bytes on average"
    figure.suptitle(f"{title}: {rules.describe()}\n{shown}", fontsize=11, parse_math=False)
    return figure


def _draw_row(axis: Any, window: Window, curve: list[float], rules: Rules, begin: int, end: int) -> Any:
    """Draw the bytes from `begin` to `end`, and return the axis with their offsets."""
    stop = window.start + len(window.data)
    spans: tuple[list[tuple[float, float]], ...] = ([], [])  # [(offset, length), ...] of each colour
    edges = []
    for k, (first, last) in enumerate(pairwise(window.bounds)):
        low, high = max(first, begin), min(last, end, stop)
        if low < high:
            spans[(window.first_patch + k) % 2].append((low - 0.5, high - low))
            if first >= begin:
                edges.append(first - 0.5)
    # One artist draws all spans: matplotlib goes through its artists whenever one is added.
    across = axis.get_xaxis_transform()
    for some, color in zip(spans, PATCH_COLORS, strict=True):
        axis.broken_barh(some, (0, 1), color=color, lw=0, transform=across)
    axis.vlines(edges, 0, 1, color=EDGE, lw=0.8, transform=across)
    at = range(begin, min(end, stop))
    values = curve[begin - window.start : begin - window.start + len(at)]
    labelled = len(window.data) <= LABELLED
    axis.plot(at, values, color=CURVE, lw=1.2, marker="o" if labelled else None, markersize=2.5)
    limit = _limit(window, rules)
    if limit is not None:
        axis.axhline(limit, color=LIMIT, lw=1, ls="--", label=f"threshold {limit:.4g} nats")
        axis.legend(loc="upper right", fontsize=8, framealpha=0.8)
    axis.set_xlim(begin - 0.5, end - 0.5)
    axis.spines[["top", "right"]].set_visible(False)
    if not labelled:
        return axis
    labels = {glyph.offset: _label(glyph) for glyph in glyphs(window) if begin <= glyph.offset < end}
    axis.set_xticks(list(labels), list(labels.values()), family="monospace", parse_math=False)
    axis.tick_params(axis="x", length=0, labelsize=LABEL_SIZE)
    lines = max((label.count("\n") + 1 for label in labels.values()), default=1)
    below = axis.secondary_xaxis(0)
    below.set_xticks([offset for offset in at if offset % 10 == 0])
    below.tick_params(labelsize=7, length=0, pad=8 + 1.25 * LABEL_SIZE * lines, colors=EDGE)
    below.spines["bottom"].set_visible(False)
    return below


def _limit(window: Window, rules: Rules) -> float | None:
    """Return the height of the threshold line, None where the rule is about rises."""
    return None if window.entropy is None or rules.monotonic else rules.threshold


def _patch_lengths(window: Window) -> list[float]:
    stop = window.start + len(window.data)
    lengths: list[float] = []
    for first, last in pairwise(window.bounds):
        lengths += [last - first] * (min(last, stop) - max(first, window.start))
    return lengths


def _label(glyph: Glyph) -> str:
    """Return a label that the plot's font can show: other characters become their bytes, one below the other."""
    from matplotlib import font_manager

    if glyph.text == " ":
        return "␣"
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    if len(glyph.text) == 1 and font.get_char_index(ord(glyph.text)):
        return glyph.text
    return "\n".join(f"{byte:02X}" for byte in glyph.data)
