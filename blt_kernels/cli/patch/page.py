"""Writes patches as a web page in one file. Hovering over a byte shows its entropy and its patch."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template

from blt_kernels._files import write_text
from blt_kernels.cli.patch.render import Glyph, glyphs
from blt_kernels.cli.patch.rules import Rules
from blt_kernels.cli.patch.statistics import Statistics
from blt_kernels.cli.patch.window import Window

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
    facts = [("scheme", f"{rules.scheme.value}: {rules.describe()}"), ("bytes", f"{total:,}")]
    facts.append(("patches", f"{statistics.patches:,}"))
    if statistics.mean is not None:
        facts.append(("mean patch", f"{statistics.mean:.2f} bytes"))
    if statistics.entropy is not None:
        facts.append(("mean entropy", f"{statistics.entropy:.3f} nats"))
    data = {
        "start": window.start,
        "bytes": window.data.hex(),
        "entropy": None if window.entropy is None else [round(value, 4) for value in window.entropy],
        "bounds": window.bounds,
        "first": window.first_patch,
    }
    return _PAGE.substitute(
        title=escape(title),
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts),
        shown=escape(shown),
        bars="Bars below the text are entropies. " if window.entropy is not None else "",
        text=_spans(window),
        data=json.dumps(data, separators=(",", ":")),
    )


def _spans(window: Window) -> str:
    """Return a span a patch with an element a glyph: ``data-o`` is its offset in the window, ``data-n`` its bytes."""
    parts: list[str] = []
    previous = None
    for glyph in glyphs(window):
        if glyph.patch != previous:
            parts.append("</span>" if parts else "")
            parts.append(f'<span class="p{glyph.patch % 2}">')
            previous = glyph.patch
        parts.append(_element(glyph, window))
    return "".join([*parts, "</span>"] if parts else [])


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


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title - patches</title>
<style>
:root { color-scheme: light dark; --back: #fbfbf9; --text: #1c1c1c; --soft: #686868; --line: #dcdcd6;
  --p0: #cfe5ff; --p1: #ffe9bd; --bar: #c0392b; --card: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #e9e9e6; --soft: #a2a6ad; --line: #33373e;
  --p0: #1e3f66; --p1: #58431a; --bar: #ff8a73; --card: #22262c; } }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
header, main, footer { max-width: 1100px; margin: 0 auto; padding: 16px 20px; }
h1 { font-size: 20px; margin: 0 0 8px; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0 0 8px; }
dt { color: var(--soft); font-size: 12px; } dd { margin: 0; }
p { margin: 4px 0; color: var(--soft); }
pre { margin: 0; font: 15px/1.9 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.p0 { background: var(--p0); } .p1 { background: var(--p1); }
i { font-style: normal; cursor: default; padding: 2px 0; background: linear-gradient(var(--bar), var(--bar)) left bottom
  / 100% calc(var(--h, 0) * 7px) no-repeat; }
.m { color: var(--soft); }
i.on { outline: 2px solid var(--bar); }
#card { position: fixed; display: none; pointer-events: none; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 8px 12px; box-shadow: 0 4px 16px #0004; font-size: 13px; white-space: nowrap; }
#card b { font-weight: 600; } #card td, #card th { padding: 0 12px 0 0; text-align: right; font-weight: normal; }
#card th { color: var(--soft); }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<dl>$facts</dl>
<p>$shown</p>
<p>${bars}Hover over a character to see its bytes; the entropy of a byte is what the model expects of the next one.</p>
</header>
<main><pre id="text">$text</pre></main>
<div id="card" role="status"></div>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const card = document.getElementById("card"), text = document.getElementById("text");
let on = null;
function patchOf(offset) { // the last bound at or before the offset
  let low = 0, high = data.bounds.length - 1;
  while (low + 1 < high) { const mid = (low + high) >> 1; if (data.bounds[mid] <= offset) low = mid; else high = mid; }
  return low;
}
function cell(row, kind, value) { const c = document.createElement(kind); c.textContent = value; row.append(c); }
function describe(glyph) {
  const first = Number(glyph.dataset.o), size = Number(glyph.dataset.n || 1);
  const patch = patchOf(data.start + first), begin = data.bounds[patch], end = data.bounds[patch + 1];
  const head = document.createElement("div"), table = document.createElement("table"), row = table.insertRow();
  const name = document.createElement("b");
  name.textContent = glyph.textContent;
  head.append(name, ` patch $${data.first + patch}, $${end - begin} byte$${end - begin === 1 ? "" : "s"} at $${begin}`);
  for (const title of ["offset", "byte", data.entropy ? "entropy, nats" : ""]) cell(row, "th", title);
  for (let i = first; i < first + size; i++) {
    const line = table.insertRow();
    cell(line, "td", data.start + i);
    cell(line, "td", "0x" + data.bytes.slice(2 * i, 2 * i + 2).toUpperCase());
    cell(line, "td", data.entropy ? data.entropy[i].toFixed(3) : "");
  }
  card.replaceChildren(head, table);
}
function hide() { if (on) on.classList.remove("on"); on = null; card.style.display = "none"; }
text.addEventListener("pointerover", event => {
  const glyph = event.target.closest("i");
  hide();
  if (!glyph) return;
  on = glyph;
  on.classList.add("on");
  describe(glyph);
  card.style.display = "block";
  const box = glyph.getBoundingClientRect(), below = box.bottom + 8 + card.offsetHeight < innerHeight;
  card.style.left = Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8)) + "px";
  card.style.top = (below ? box.bottom + 8 : box.top - 8 - card.offsetHeight) + "px";
});
text.addEventListener("pointerleave", hide);
addEventListener("scroll", hide, { passive: true });
</script>
</body>
</html>
""")
