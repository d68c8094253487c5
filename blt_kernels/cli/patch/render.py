"""Draws patches in the terminal: bytes as readable glyphs, patches in colours, statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text

from blt_kernels.cli.patch.rules import Rules
from blt_kernels.cli.patch.statistics import Statistics
from blt_kernels.cli.patch.window import Window

PATCH_STYLES = ("black on #bcdcff", "black on #ffe0a3")
MARK_STYLES = ("#55728f on #bcdcff", "#8a6a2a on #ffe0a3")
SEPARATOR = "│"
NEWLINE = "↵"


@dataclass(frozen=True)
class Glyph:
    """Some bytes of one patch, and the text to show for them.

    `mark` is True if the text stands for bytes that are not printable.
    """

    offset: int
    data: bytes
    text: str
    patch: int
    mark: bool


def glyphs(window: Window) -> list[Glyph]:
    """Turn the bytes of a window into readable glyphs, none of which crosses a patch boundary.

    A character is shown where its first byte is. Where a boundary cuts it, its remaining bytes are shown in
    hexadecimal, ``⟨97A5⟩``, in the patch that they belong to. Bytes that are not UTF-8 are shown so too.
    """
    found, data, i = [], window.data, 0
    starts = set(window.bounds[1:])
    patch = window.first_patch
    size_of_rest = 0  # bytes left of a character that has been shown
    while i < len(data):
        patch += window.start + i in starts
        size = size_of_rest or _character_size(data, i)
        here = next((n for n in range(1, size) if window.start + i + n in starts), size)
        some = data[i : i + here]
        if size_of_rest:
            text, mark = f"⟨{some.hex().upper()}⟩", True
        else:
            text, mark = _show(data[i : i + size])
        found.append(Glyph(window.start + i, some, text, patch, mark))
        size_of_rest, i = size - here, i + here
    return found


def _character_size(data: bytes, i: int) -> int:
    """Return the bytes of the UTF-8 character that starts at byte i; 1 if none does."""
    lead = data[i]
    size = 1 if lead < 0xC2 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4 if lead < 0xF5 else 1
    try:
        return len(data[i : i + size].decode("utf-8")) * size
    except UnicodeDecodeError:
        return 1


def _show(character: bytes) -> tuple[str, bool]:
    """Return the text for the bytes of one character, and whether it is a mark."""
    if character == b"\n":
        return NEWLINE, True
    if len(character) == 1 and (character[0] < 32 or character[0] == 127):
        return chr(0x2400 + character[0]) if character[0] < 32 else "␡", True
    try:
        text = character.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{character.hex().upper()}⟩", True
    # Invisible characters, and those that change the direction or the line, would hide what is in the file.
    return (text, False) if text.isprintable() else (f"⟨U+{ord(text):04X}⟩", True)


def printable(name: str) -> str:
    """Escape the characters of a file's name that could control a terminal, or that have no encoding."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def draw(console: Console, title: str, window: Window, total: int) -> None:
    """Print the patches of a window in alternating colours, or separated by bars where there are none."""
    text = Text()
    separate = console.color_system is None
    for patch, inside in groupby(glyphs(window), lambda glyph: glyph.patch):
        if separate and text:
            text.append(SEPARATOR)
        for mark, run in groupby(inside, lambda glyph: glyph.mark):
            shown = "".join(glyph.text + "\n" * (glyph.data == b"\n") for glyph in run)
            text.append(shown, None if separate else (MARK_STYLES if mark else PATCH_STYLES)[patch % 2])
    console.print(Text(title, "bold"), soft_wrap=True)
    if text:
        console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")
    size = len(window.data)
    if size < total:
        span = f"bytes {window.start:,} to {window.start + size:,}" if size else "none"
        line = f"shown: {span} of {total:,}; --start, --length and --max-show choose others"
        console.print(Text(line, "dim"), soft_wrap=True)
    console.print()


def facts(statistics: Statistics, rules: Rules) -> list[tuple[str, str]]:
    """Return names and values of the numbers of a whole file."""
    found = [("scheme", f"{rules.scheme.value}: {rules.describe()}")]
    found += [("bytes", f"{statistics.bytes:,}"), ("patches", f"{statistics.patches:,}")]
    if statistics.patches:
        minimum, maximum = min(statistics.lengths), max(statistics.lengths)
        middle = f"mean {statistics.mean:.2f}, median {statistics.median:g}"
        found.append(("patch length", f"{middle}, min {minimum:,}, max {maximum:,} bytes"))
    if statistics.entropy is not None:
        found.append(("entropy", f"mean {statistics.entropy:.3f} nats ({statistics.entropy / math.log(2):.3f} bits)"))
    return found


def print_statistics(console: Console, statistics: Statistics, rules: Rules, notes: list[str]) -> None:
    """Print the numbers of a whole file and a histogram of patch lengths."""
    lines = facts(statistics, rules)
    if statistics.bytes and statistics.seconds:
        speed = statistics.bytes / statistics.seconds
        lines.append(("speed", f"{speed:,.0f} bytes/second, {statistics.seconds:.2f} s"))
    lines += [("note", note) for note in notes]
    for name, value in lines:
        console.print(Text.assemble((f"{name:<14}", "dim"), value), soft_wrap=True)
    console.print()
    bars = statistics.histogram()
    if bars:
        console.print(Text(f"{'length':>7}{'patches':>14}", "dim"))
    for label, count in bars:
        bar = "▇" * (math.ceil(40 * count / max(n for _, n in bars)))
        console.print(Text.assemble(f"{label:>7}{count:>14,}  ", (bar, "#4a90d9")), soft_wrap=True)
