"""Writes patches as a web page in one file. Hovering over a byte shows its entropy and its patch."""

from __future__ import annotations

import json
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from blt_kernels._files import write_text
from blt_kernels.cli.patch.render import Glyph, facts, glyphs
from blt_kernels.cli.patch.rules import Rules
from blt_kernels.cli.patch.statistics import Statistics
from blt_kernels.cli.patch.window import Window

PAGE = Path(__file__).parents[2] / "assets" / "patches.html"
HIGHEST = 5.545  # nats, ln 256: the entropy that is drawn as a full bar


def write(path: Path, title: str, window: Window, statistics: Statistics, rules: Rules) -> None:
    """Write a page about a window of a file. The page loads no other script, style or font."""
    write_text(path, build(title, window, statistics, rules))


def build(title: str, window: Window, statistics: Statistics, rules: Rules) -> str:
    """Return the page as text."""
    size, total = len(window.data), statistics.bytes
    if size == total:
        shown = f"All {total:,} bytes are shown."
    else:
        shown = (
            f"Shown: bytes {window.start:,} to {window.start + size:,} of {total:,}. The numbers above are about the "
            "whole file; --start and --length choose another part."
        )
    data = {
        "start": window.start,
        "bytes": window.data.hex(),
        "entropy": None if window.entropy is None else [round(value, 4) for value in window.entropy],
        "bounds": window.bounds,
        "first": window.first_patch,
    }
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        facts="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts(statistics, rules)
        ),
        shown=escape(shown),
        bars="Bars below the text are entropies. " if window.entropy is not None else "",
        text=_spans(window),
        data=json.dumps(data, separators=(",", ":")),
    )


def _spans(window: Window) -> str:
    """Return a span a patch with an element a glyph: ``data-o`` is its offset in the window, ``data-n`` its bytes."""
    spans = []
    for patch, inside in groupby(glyphs(window), lambda glyph: glyph.patch):
        elements = "".join(_element(glyph, window) for glyph in inside)
        spans.append(f'<span class="p{patch % 2}">{elements}</span>')
    return "".join(spans)


def _element(glyph: Glyph, window: Window) -> str:
    at = glyph.offset - window.start
    size = f' data-n="{len(glyph.data)}"' if len(glyph.data) > 1 else ""
    style = ""
    if window.entropy is not None:
        entropy = max(window.entropy[at : at + len(glyph.data)])
        style = f' style="--h:{min(max(entropy / HIGHEST, 0), 1):.2f}"'
    kind = ' class="m"' if glyph.mark else ""
    end = "\n" if glyph.data == b"\n" else ""
    return f'<i data-o="{at}"{size}{kind}{style}>{escape(glyph.text)}</i>{end}'
