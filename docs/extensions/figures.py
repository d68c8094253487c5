"""Pictures that the library itself draws, one for a light page and one for a dark one.

``docs/figures/NAME.py`` has ``draw(colors: Colors) -> matplotlib.figure.Figure | None`` and a docstring, which is the
alternative text of the picture. On a page, the directive ``{drawn} NAME`` shows it; its content is the caption. Where
`draw` returns None, since no measurements are stored, the directive shows nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


@dataclass(frozen=True)
class Colors:
    """The colours of a picture, as matplotlib takes them."""

    text: str
    faint: str  # rules, grids and what is in the background
    patches: tuple[str, ...]  # fills of neighbouring patches, behind `text`
    accent: str
    second: str


LIGHT = Colors("#1f2328", "#c9ced6", ("#cfe2ff", "#ffe3c2", "#d3f0d8", "#ead9f7"), "#0b62c4", "#c2410c")
DARK = Colors("#e6e8eb", "#4a5058", ("#1d3a5f", "#5b3a17", "#1f4a2c", "#43305a"), "#6cb6ff", "#ffa657")


def write(name: str, folder: Path) -> list[Path]:
    """Draw the figure `name` into `folder` as NAME-light.svg and NAME-dark.svg and return what was drawn."""
    draw = importlib.import_module(f"figures.{name}").draw
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for theme, colors in (("light", LIGHT), ("dark", DARK)):
        style = {
            "svg.hashsalt": name,
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "text.color": colors.text,
            "axes.labelcolor": colors.text,
            "axes.edgecolor": colors.faint,
            "xtick.color": colors.text,
            "ytick.color": colors.text,
            "legend.frameon": False,
        }
        with matplotlib.rc_context(style):
            figure = draw(colors)
            if figure is None:
                return []
            paths.append(folder / f"{name}-{theme}.svg")
            figure.savefig(paths[-1], transparent=True, bbox_inches="tight", metadata={"Date": None})
    return paths


class Drawn(SphinxDirective):
    """The directive ``{drawn} NAME``."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Draw the picture, and return a figure with both versions and the caption."""
        name = self.arguments[0]
        module = importlib.import_module(f"figures.{name}")
        self.env.note_dependency(module.__file__)
        paths = write(name, Path(self.env.srcdir) / "_generated" / "figures")
        if not paths:
            return []
        figure = nodes.figure(classes=["drawn"])
        for path, theme in zip(paths, ("light", "dark"), strict=True):
            uri = "/" + path.relative_to(self.env.srcdir).as_posix()
            figure += nodes.image(uri=uri, alt=" ".join((module.__doc__ or "").split()), classes=[f"only-{theme}"])
        if self.content:
            inline, messages = self.parse_inline(" ".join(self.content))
            figure += nodes.caption("", "", *inline, *messages)
        return [figure]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("drawn", Drawn)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
