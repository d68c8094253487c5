"""Rows of cells, the form of most pictures: one cell a byte or a patch, coloured by patch."""

from __future__ import annotations

from collections.abc import Sequence

from extensions.figures import Colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

SIZE = 10  # points of text; a phone shows pictures at about two thirds of their size


def canvas(width: float, height: float, unit: float = 0.36) -> tuple[Figure, Axes]:
    """Return axes without a frame whose unit is one cell of `unit` inches; y grows downwards."""
    figure = Figure(figsize=(unit * width, unit * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def fill_of(colors: Colors, patch: int) -> str:
    """Return the colour of a patch: neighbours differ. A patch of -1, none, is transparent."""
    return colors.patches[patch % len(colors.patches)] if patch >= 0 else "none"


def cell(
    axes: Axes,
    x: float,
    y: float,
    text: object,
    colors: Colors,
    fill: str = "none",
    *,
    width: float = 1,
    edge: str | None = None,
    bold: bool = False,
    mono: bool = False,
    size: float = SIZE,
) -> None:
    """Draw a cell with its upper left corner at x, y."""
    axes.add_patch(Rectangle((x, y), width, 1, fc=fill, ec=edge or colors.faint, lw=1.4 if edge else 0.6))
    if text != "":
        label(axes, x + width / 2, y + 0.5, text, colors, bold=bold, mono=mono, size=size)


def label(
    axes: Axes,
    x: float,
    y: float,
    text: object,
    colors: Colors,
    *,
    align: str = "center",
    color: str | None = None,
    bold: bool = False,
    mono: bool = False,
    size: float = SIZE,
) -> None:
    """Write text at x, vertically centred at y."""
    axes.text(
        x,
        y,
        str(text),
        ha=align,
        va="center_baseline" if mono else "center",
        size=size,
        color=color or colors.text,
        weight="bold" if bold else "normal",
        family="monospace" if mono else "sans-serif",
    )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def characters(
    axes: Axes, x: float, y: float, text: str, patch_ids: Sequence[int], colors: Colors, *, size: float = SIZE
) -> None:
    """Draw the bytes of ASCII text as cells in the colours of their patches; a space shows as ␣."""
    for i, (character, patch) in enumerate(zip(text, patch_ids, strict=True)):
        shown = "␣" if character == " " else character
        cell(axes, x + i, y, shown, colors, fill_of(colors, patch), mono=True, size=size)
