"""Boxes and arrows of the pictures that show how data flow through a model."""

from __future__ import annotations

from dataclasses import dataclass

from extensions.figures import Colors
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch


@dataclass
class Box:
    """The place of a box, its middle and its size in inches."""

    x: float
    y: float
    width: float
    height: float

    def at(self, side: str) -> tuple[float, float]:
        """Return the middle of a side: "left", "right", "top" or "bottom"."""
        across = {"left": -0.5, "right": 0.5}.get(side, 0.0) * self.width
        along = {"bottom": -0.5, "top": 0.5}.get(side, 0.0) * self.height
        return self.x + across, self.y + along


class Flow:
    """A picture of boxes in lanes.

    Parameters
    ----------
    colors : Colors
    width, height : float
        In inches. On a phone the picture is about 4.5 inches wide, so text of 10 points stays readable up to 5.5.
    """

    def __init__(self, colors: Colors, width: float, height: float) -> None:
        self.colors = colors
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def box(
        self, x: float, y: float, title: str, shape: str = "", *, fill: int | None = None, width: float = 2.4
    ) -> Box:
        """Draw a box with its middle at (x, y): the names of what computes it, and the shape of what comes out."""
        lines = title.count("\n") + 1 + bool(shape)
        box = Box(x, y, width, 0.16 + 0.19 * lines)
        face = "none" if fill is None else self.colors.patches[fill]
        corner = (x - width / 2, y - box.height / 2)
        style = "round,pad=0,rounding_size=0.07"
        self.axes.add_patch(
            FancyBboxPatch(corner, width, box.height, boxstyle=style, fc=face, ec=self.colors.faint, lw=1)
        )
        top = y + box.height / 2 - 0.08
        for i, line in enumerate([*title.split("\n"), *([shape] if shape else [])]):
            is_shape = bool(shape) and i == lines - 1
            style = {"family": "monospace", "size": 9.5} if is_shape else {"size": 10}
            self.axes.text(x, top - 0.19 * i - 0.095, line, ha="center", va="center", **style)  # type: ignore[arg-type]
        return box

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a straight arrow between two points."""
        style = {"arrowstyle": "-|>", "color": self.colors.accent, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", end, start, arrowprops=style)
