"""The command line: what it prints and writes, and how it fails."""

from __future__ import annotations

import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Annotated, Any

import matplotlib.image
import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.transforms import Bbox
from rich.console import Console
from typer.testing import CliRunner
from typing_extensions import Doc

import blt_kernels as bk
from blt_kernels import _extension
from blt_kernels.cli import app, doctor, main
from blt_kernels.cli.options import build, options_of
from blt_kernels.cli.patch import plot
from blt_kernels.cli.patch.model import load_entropy_model
from blt_kernels.cli.patch.render import glyphs, printable
from blt_kernels.cli.patch.rules import Rules, Scheme
from blt_kernels.cli.patch.statistics import Statistics
from blt_kernels.cli.patch.stream import with_entropy
from blt_kernels.cli.patch.window import Window
from blt_kernels.models import ByteLM
from blt_kernels.models.characters import patches_of_whole_characters
from blt_kernels.models.config import ByteLMConfig
from blt_kernels.testing import SCRIPTS, binary, invalid_utf8, real_text

TEXT = b'It was the best of times; it was <b>"the worst"</b> & so on:\n\tx = 1\n' * 3
SCHEMES = ("entropy", "space", "static", "byte", "delimiter", "topk")
CONTENT = {
    "scripts": "\n".join(SCRIPTS.values()).encode(),
    "sources": real_text(1500, 3),
    "invalid": invalid_utf8(300),
    "binary": binary(300),
    "cut character": "naïve 你好".encode()[:-1],
    "empty": b"",
    "one byte": b"\xff",
}


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "BLT_KERNELS_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text() -> str:
    return saved(TEXT)


def saved(data: bytes, name: str = "input.txt") -> str:
    Path(name).write_bytes(data)
    return name


def run(*args: object, stdin: bytes | None = None) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, prog_name="blt-kernels")


def blt(*args: object, stdin: bytes | None = None) -> str:
    """Return standard output of a command that must succeed."""
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def records(out: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return the file, the patches and the statistics of JSON lines, in strict JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    first, *patches, last = [json.loads(line, parse_constant=refuse) for line in out.splitlines()]
    assert first["type"] == "file"
    assert {patch["type"] for patch in patches} <= {"patch"}
    assert last["type"] == "statistics"
    return first, patches, last


def patches_of(*args: object) -> list[int]:
    """Return offsets of the patches that ``patch --json`` prints."""
    return [patch["offset"] for patch in records(blt("patch", "--json", *args))[1]]


def starts_of(layout: bk.PatchLayout) -> list[int]:
    return layout.compact().patch_offsets[:-1].tolist()


def entropies_of(data: bytes) -> torch.Tensor:
    return torch.cat([entropy for _, entropy in with_entropy([data], load_entropy_model())])


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_json_of_every_scheme_and_content(scheme: str, content: str) -> None:
    data = CONTENT[content]
    file, patches, stats = records(blt("patch", saved(data), "--scheme", scheme, "--json"))
    assert file["file"] == "input.txt"
    assert file["scheme"] == scheme
    end = 0
    for patch in patches:  # there is no gap, no overlap, no empty patch
        assert patch["offset"] == end
        assert patch["length"] > 0
        end += patch["length"]
    lengths = [patch["length"] for patch in patches]
    assert end == sum(lengths) == stats["bytes"] == len(data)
    assert stats["patches"] == len(lengths)
    assert stats["lengths"] == {str(length): count for length, count in sorted(Counter(lengths).items())}
    if data:
        assert stats["mean"] == len(data) / len(lengths)
        assert stats["median"] == statistics.median(lengths)
        assert (stats["min"], stats["max"]) == (min(lengths), max(lengths))
    else:
        assert stats["mean"] is stats["median"] is stats["min"] is stats["max"] is None
    assert (stats["entropy_mean"] is not None) == (scheme in ("entropy", "topk") and data != b"")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--scheme=space"], lambda ids, all: bk.space_patch(ids)),
        (["--scheme=static"], lambda ids, all: bk.static_patch(all, 4)),
        (["--scheme=static", "--patch-size=7"], lambda ids, all: bk.static_patch(all, 7)),
        (["--scheme=byte"], lambda ids, all: bk.byte_patch(all)),
        (["--scheme=delimiter"], lambda ids, all: bk.delimiter_patch(ids, 10 + 4)),
        (["--scheme=delimiter", "--delimiter=;"], lambda ids, all: bk.delimiter_patch(ids, ord(";") + 4)),
        (["--scheme=delimiter", "--delimiter=0x20"], lambda ids, all: bk.delimiter_patch(ids, 0x20 + 4)),
        (["--scheme=delimiter", r"--delimiter=\t"], lambda ids, all: bk.delimiter_patch(ids, 9 + 4)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_rules_without_a_model(
    text: str, options: list[str], expected: Callable[..., bk.PatchLayout]
) -> None:
    assert patches_of(text, *options) == starts_of(expected(bk.to_ids(TEXT), torch.tensor([0, len(TEXT)])))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], lambda h: bk.patch_starts(h, threshold=load_entropy_model().config.threshold)),
        (["--threshold=1.25"], lambda h: bk.patch_starts(h, threshold=1.25)),
        (["--threshold=-1"], lambda h: bk.patch_starts(h, threshold=-1)),
        (["--threshold=0.2", "--monotonic"], lambda h: bk.patch_starts(h, threshold=0.2, monotonic=True)),
        (["--threshold=1", "--threshold-add=0.3"], lambda h: bk.patch_starts(h, threshold=1, threshold_add=0.3)),
        (["--threshold=3", "--max-patch-length=5"], lambda h: bk.patch_starts(h, threshold=3, max_patch_length=5)),
        (["--scheme=topk"], lambda h: bk.topk_patch(h, 4)),
        (["--scheme=topk", "--patch-size=9"], lambda h: bk.topk_patch(h, 9)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_rules_with_a_model(
    text: str, options: list[str], expected: Callable[[torch.Tensor], bk.PatchLayout]
) -> None:
    assert patches_of(text, *options) == starts_of(expected(entropies_of(TEXT)))


@pytest.mark.parametrize(
    ("options", "expected", "longest"),
    [
        (["--scheme=byte"], lambda ids, h: bk.byte_patch(torch.tensor([0, len(ids)])), None),
        (["--scheme=space"], lambda ids, h: bk.space_patch(ids), None),
        (["--scheme=topk"], lambda ids, h: bk.topk_patch(h, 4), None),
        (["--threshold=1"], lambda ids, h: bk.patch_starts(h, threshold=1), None),
        (["--threshold=3", "--max-patch-length=5"], lambda ids, h: bk.patch_starts(h, threshold=3), 5),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_whole_characters(options: list[str], expected: Callable[..., bk.PatchLayout], longest: int | None) -> None:
    data = CONTENT["scripts"]
    file, ids = saved(data), bk.to_ids(data)
    layout = expected(ids, entropies_of(data))
    layout = patches_of_whole_characters(layout, ids, longest)
    starts = patches_of(file, *options, "--whole-characters")
    assert starts == starts_of(layout)
    for a, b in pairwise([*starts, len(data)]):
        data[a:b].decode()
    first, patches, _ = records(blt("patch", file, "--target-size=5", "--whole-characters", "--json"))
    assert first["whole_characters"] is True
    again = patches_of(file, f"--threshold={first['threshold']!r}", "--whole-characters")
    assert again == [patch["offset"] for patch in patches]


def test_contexts_that_start_anew_at_newlines() -> None:
    file, model = saved(real_text(3000, 5)), load_entropy_model()
    options = ["--threshold=1.3", "--reset-at-newlines"]
    (_, layout), (_, plain) = (
        model.patch(real_text(3000, 5), threshold=1.3, reset_at_newlines=on) for on in (True, None)
    )
    assert patches_of(file, *options) == starts_of(layout) != starts_of(plain)
    rule = records(blt("patch", file, *options, "--json"))[0]
    assert (rule["rule"], rule["reset_at_newlines"]) == ("entropy > 1.3 nats, context anew at newlines", True)


def test_target_size() -> None:
    file = saved(real_text(4000, 5))
    first, patches, stats = records(blt("patch", file, "--target-size=4.5", "--json"))
    assert abs(stats["mean"] - 4.5) < 0.1
    assert "target_size" not in first
    again = patches_of(file, f"--threshold={first['threshold']!r}")  # the shown threshold gives the same patches
    assert again == [patch["offset"] for patch in patches]
    assert records(blt("patch", file, "--target-size=2", "--json"))[2]["mean"] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_entropies_in_json(text: str, scheme: str) -> None:
    _, patches, stats = records(blt("patch", text, "--scheme", scheme, "--json", "--entropies"))
    expected = entropies_of(TEXT)
    assert all(len(patch["entropy"]) == patch["length"] for patch in patches)
    got = [value for patch in patches for value in patch["entropy"]]
    assert got == pytest.approx(expected.tolist(), abs=1e-6)
    assert stats["entropy_mean"] == pytest.approx(float(expected.mean()), rel=1e-5)


def test_model_option(text: str) -> None:
    torch.manual_seed(0)
    other = ByteLM(ByteLMConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=64, window=16, threshold=5.0)).eval()
    other.save("other.safetensors")
    entropy = torch.cat([entropy for _, entropy in with_entropy([TEXT], other)])
    file, patches, _ = records(blt("patch", text, "--json", "--model", "other.safetensors"))
    assert file["threshold"] == 5.0  # it is the model's own
    starts = starts_of(bk.patch_starts(entropy, threshold=5.0))
    assert [patch["offset"] for patch in patches] == starts != patches_of(text)


def test_several_files_and_standard_input(text: str) -> None:
    other = saved(b"a b\n", "other.txt")
    out = blt("patch", text, "-", other, "--scheme", "space", "--json", stdin=b"\xffs t")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines if line["type"] == "file"] == [text, "standard input", other]
    assert [line["bytes"] for line in lines if line["type"] == "statistics"] == [len(TEXT), 4, 4]


# --- the terminal -----------------------------------------------------------------------------------------------------


def shown(*args: object) -> str:
    """Return the lines between the title and the statistics, without colours."""
    out = blt("patch", *args, "--color=never")
    assert "\x1b" not in out
    _, body = out.split("\n", 1)
    return body[: body.index("\nscheme ")]


def test_patches_are_separated(text: str) -> None:
    starts = [*starts_of(bk.space_patch(bk.to_ids(TEXT))), len(TEXT)]
    pieces = [TEXT[a:b].decode() for a, b in pairwise(starts)]
    assert shown(text, "--scheme=space") == "│".join(pieces).replace("\n", "↵\n").replace("\t", "␉")


def test_window(text: str) -> None:
    assert shown(text, "--scheme=byte", "--start=3", "--length=4") == (
        f"w│a│s│ \nshown: bytes 3 to 7 of {len(TEXT)}; --start, --length and --max-show choose others\n"
    )
    assert shown(text, "--scheme=byte", "--max-show=2").startswith("I│t\nshown: bytes 0 to 2 of ")
    assert shown(text, "--scheme=byte", "--max-show=0").startswith("shown: none of ")
    assert shown(text, "--scheme=static", "--start=2", "--length=2").startswith(" w\n")  # these bytes are in a patch
    assert shown(text, "--scheme=byte", f"--start={len(TEXT) - 1}").startswith("↵\n")


def test_bytes_that_are_no_text() -> None:
    data = "aé\x00\x7f\x1b[31m\u202e你".encode() + b"\xff\xe4"
    assert shown(saved(data), "--scheme=delimiter") == "a│é␀␡␛[31m⟨U+202E⟩你⟨FF⟩⟨E4⟩\n"
    assert shown(saved("é你".encode()), "--scheme=byte") == "é│⟨A9⟩│你│⟨BD⟩│⟨A0⟩\n"


def test_statistics_are_printed(text: str) -> None:
    out = blt("patch", text, "--scheme=static", "--patch-size=5")
    size = len(TEXT)
    patches = 1 + math.ceil((size - 1) / 5)
    assert "every 5 bytes" in out
    assert re.search(rf"^bytes +{size}$", out, re.MULTILINE)
    assert re.search(rf"^patches +{patches}$", out, re.MULTILINE)
    assert f"mean {size / patches:.2f}, median 5, min 1, max 5 bytes" in out
    assert re.search(rf"^ +5 +{patches - 1 - (size % 5 != 1)}  ▇{{40}}$", out, re.MULTILINE)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("color", "variables", "terminal", "coloured"),
    [
        ("auto", {}, True, True),
        ("auto", {}, False, False),
        ("auto", {"NO_COLOR": "1"}, True, False),
        ("auto", {"TERM": "dumb"}, True, False),
        ("always", {"NO_COLOR": "1"}, False, True),
        ("never", {}, True, False),
    ],
)
def test_colours(
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    color: str,
    variables: dict[str, str],
    terminal: bool,
    coloured: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    app(["patch", text, "--scheme", "space", "--color", color], standalone_mode=False)
    assert ("\x1b[" in out.getvalue()) == coloured
    assert ("│" in out.getvalue()) == (not coloured)
    plain = re.sub("\x1b\\[[0-9;]*m|│", "", out.getvalue())
    assert TEXT.decode().replace("\n", "↵\n").replace("\t", "␉") in plain


CHARACTERS = st.sampled_from([*"aé你👍\n\t\0", "\u0301", "\u202e"]).map(str.encode)
SOME_BYTES = st.lists(CHARACTERS | st.binary(min_size=1, max_size=2), max_size=12).map(b"".join)


@given(SOME_BYTES, st.sets(st.integers(1, 30)), st.integers(0, 9))
def test_glyphs_are_the_bytes(data: bytes, starts: set[int], start: int) -> None:
    end = start + len(data)
    inside = sorted(start + at for at in starts if at < len(data))
    window = Window(start, len(data), data, None, 7, [0, *inside, end])
    found = glyphs(window)
    assert b"".join(glyph.data for glyph in found) == data
    at = start
    for glyph in found:
        assert glyph.offset == at
        at += len(glyph.data)
        assert glyph.patch == 7 + sum(bound <= glyph.offset for bound in inside)
        assert not any(glyph.offset < bound < at for bound in inside)
        assert glyph.text.isprintable()
    if not inside:
        text = data.decode("utf-8", "surrogateescape")
        assert len(found) == len(text)
        assert [g.text for g in found if not g.mark] == [c for c in text if c.isprintable()]


@pytest.mark.parametrize(("length", "bounds"), [(4, [0, 1, 5]), (5, [0, 1, 5]), (6, [0, 1, 5, 9]), (9, [0, 1, 5, 9])])
def test_narrow_windows_hold_whole_patches(length: int, bounds: list[int]) -> None:
    window = Window(0, 9, b"012345678", [0.5] * 9, 0, [0, 1, 5, 9]).narrow(length)
    assert (window.data, window.entropy) == (b"012345678"[:length], [0.5] * length)
    assert window.bounds == bounds


def test_printable() -> None:
    assert printable("naïve 你.txt") == "naïve 你.txt"
    assert printable("a\n\x1b[0m\udcff") == r"a\n\x1b[0m\udcff"


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that every element is closed where it has to be, and keeps what tests ask for."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.pre, self.title, self.patches, self.data = "", "", 0, None
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.patches += tag == "span"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.pre += data
        elif self.open and self.open[-1] == "title":
            self.title += data
        elif self.open and self.open[-1] == "script" and self.data is None:
            self.data = json.loads(data)


@pytest.mark.parametrize("content", [*CONTENT, "ascii", "markup"])
@pytest.mark.parametrize("scheme", ["entropy", "space"])
def test_html(content: str, scheme: str) -> None:
    markup = b"</pre><script>alert('$x')</script>&amp;\"${y}"
    data = {**CONTENT, "ascii": TEXT, "markup": markup}[content]
    name = saved(data, "<script>alert(1)<&.txt" if content == "markup" else "input.txt")
    result = run("patch", name, "--scheme", scheme, "--html", "page.html", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == "wrote page.html\n"
    _, patches, _ = records(result.stdout)
    html = Path("page.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags["script"] == 2  # they are the data and our code
    assert not re.search(r"<i [^>]*>([<>]|&(?!(lt|gt|amp|quot|#x27);))", html)
    assert page.title == f"{name} - patches"
    assert page.patches == len(patches)
    assert not page.attributes & {"src", "href", "onclick", "onload"}
    assert "http" not in html.replace(data.decode("utf-8", "ignore"), "")
    assert bytes.fromhex(page.data["bytes"]) == data
    assert page.data["bounds"] == [*(patch["offset"] for patch in patches), len(data)]
    assert (page.data["entropy"] is not None) == (scheme == "entropy" and data != b"")
    if content in ("ascii", "markup"):
        assert page.pre == data.decode().replace("\n", "↵\n").replace("\t", "␉")


def test_html_of_a_part(text: str) -> None:
    blt("patch", text, "--scheme=static", "--html=page.html", "--start=10", "--length=6", "--entropies")
    page = Page(Path("page.html").read_text(encoding="utf-8"))
    assert page.data["start"] == 10
    assert bytes.fromhex(page.data["bytes"]) == TEXT[10:16]
    assert page.data["bounds"] == [9, 13, 17]  # patches with bytes in the window are whole
    assert page.data["first"] == 3
    assert page.data["entropy"] == pytest.approx(entropies_of(TEXT)[10:16].tolist(), abs=1e-4)


# --- the plot ---------------------------------------------------------------------------------------------------------


def pixels(image: np.ndarray, color: str) -> int:
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(image[..., :3] - wanted).max(-1) < 0.02).sum())


def red_pixels(image: np.ndarray) -> int:
    """Count those of the threshold, thin and dashed, so that its colour is mixed with what is behind it."""
    return int((image[..., 0] - image[..., 1:3].max(-1) > 0.2).sum())


@pytest.mark.parametrize("content", ["scripts", "invalid", "empty", "one byte"])
def test_png(content: str) -> None:
    data = CONTENT[content]
    result = run("patch", saved(data), "--plot", "plot.png", "--max-show=0")
    assert result.exit_code == 0, result.output
    assert result.stderr == "wrote plot.png\n"
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread("plot.png")
    assert image.shape[1] > 1000
    assert pixels(image, "#000000") > 50  # letters are black
    if len(data) > 1:
        assert pixels(image, "#1f5fa8") > 100  # the curve is blue
        assert red_pixels(image) > 100  # the threshold is red
        assert pixels(image, "#dcebff") > 1000  # patches alternate between two colours
        assert pixels(image, "#fff0d0") > 1000


@pytest.mark.slow
def test_plot_of_lengths_and_of_many_bytes() -> None:
    file = saved(real_text(1500, 1))
    blt("patch", file, "--scheme=space", "--plot=few.png", "--length=60")
    blt("patch", file, "--scheme=space", "--plot=many.png", "--length=1200")
    few, many = (matplotlib.image.imread(name) for name in ("few.png", "many.png"))
    assert pixels(few, "#1f5fa8") > 100
    assert red_pixels(few) == 0  # there is no threshold
    assert pixels(many, "#1f5fa8") > 100
    assert few.shape == many.shape  # each has one row


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "magic"), [("svg", b"<?xml"), ("pdf", b"%PDF-")])
def test_plot_formats(text: str, suffix: str, magic: bytes) -> None:
    blt("patch", text, f"--plot=plot.{suffix}", "--length=50")
    assert Path(f"plot.{suffix}").read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("text", "size"), [("It was the best of times; ", 200), ("\u16a0", 100), ("It was the best of times; ", 1200)]
)
def test_texts_of_a_plot_do_not_overlap(text: str, size: int) -> None:
    """The bytes of a window may touch one another, as do those of a rune, which the font does not have."""
    data, statistics = (text.encode() * size)[:size], Statistics()
    figure = plot.draw(
        "text", Window(0, size, data, None, 0, [*range(0, size, 3), size]), statistics, Rules(Scheme.static)
    )
    figure.draw_without_rendering()
    groups: list[list[Bbox]] = []  # the ticks of an axis, or one label
    for axes in figure.axes:
        for axis in (axes.yaxis, axes.xaxis, *(child.xaxis for child in axes.child_axes)):
            for texts in (axis.get_ticklabels(), [axis.label]):
                boxes = [text.get_window_extent() for text in texts if text.get_text()]
                groups.append([box for box in boxes if figure.bbox.overlaps(box)])
    assert sum(map(len, groups)) > 10
    assert not [
        pair for one, other in combinations(groups, 2) for pair in product(one, other) if pair[0].overlaps(pair[1])
    ]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nowhere.txt", "nowhere.txt: No such file or directory"),
        (".", ".: Is a directory"),
        ("- -", "FILE -: expected standard input once"),
        ("input.txt --threshold nan", "--threshold nan: expected a finite number of nats"),
        ("input.txt --threshold inf", "--threshold inf: expected a finite number of nats"),
        ("input.txt --target-size 0.5", "--target-size 0.5: expected a mean of at least 1 byte"),
        ("input.txt --target-size 4 --threshold 1", "--target-size 4.0: expected no --threshold beside it"),
        ("input.txt --monotonic --threshold-add 1", "--threshold-add 1.0: expected no --monotonic beside it"),
        ("input.txt --max-patch-length 0", "--max-patch-length 0: expected a number of bytes from 1 to 2147483647"),
        ("input.txt --scheme static --patch-size 0", "--patch-size 0: expected a number of bytes from 1 to 2147483647"),
        ("input.txt --patch-size 4", "--patch-size 4: expected --scheme static or topk, got --scheme entropy"),
        ("input.txt --scheme space --threshold 1", "--threshold 1.0: expected --scheme entropy, got --scheme space"),
        ("input.txt --scheme space --monotonic", "--monotonic: expected --scheme entropy, got --scheme space"),
        ("input.txt --scheme space --reset-at-newlines", "--reset-at-newlines: expected --scheme entropy or topk"),
        ("input.txt --scheme bpe", "--scheme bpe: expected --tokenizer beside it"),
        ("input.txt --tokenizer t", "--tokenizer t: expected --scheme bpe, got --scheme entropy"),
        (
            "input.txt --scheme bpe --tokenizer t",
            "--tokenizer: expected a tokenizer.json or a directory with one, found",
        ),
        ("input.txt --delimiter x", "--delimiter 120: expected --scheme delimiter, got --scheme entropy"),
        ("input.txt --scheme delimiter --delimiter ab", "--delimiter 'ab': expected one ASCII character"),
        ("input.txt --start -1", "--start -1: expected a number of bytes of at least 0"),
        ("input.txt --length 0", "--length 0: expected a number of bytes of at least 1"),
        ("input.txt --max-show -1", "--max-show -1: expected a number of bytes of at least 0"),
        ("input.txt --start 999 --scheme byte", "--start 999: expected less than the size of input.txt, 204 bytes"),
        ("input.txt --plot x.jpg", "--plot x.jpg: expected a name ending in .png or .svg or .pdf"),
        ("input.txt --html x.png", "--html x.png: expected a name ending in .html or .htm"),
        ("input.txt --plot no/x.png", "--plot no/x.png: expected an existing folder, no is none"),
        ("input.txt - --plot x.png", "--plot x.png: expected one FILE, got 2"),
        ("page.html --html ./page.html", "--html page.html: expected another file than the one to read"),
        ("input.txt --model no.safetensors", "--model no.safetensors: expected a file or a directory"),
        ("input.txt --model input.txt", "--model: input.txt: expected a whole safetensors file"),
        ("input.txt --scheme space --model m", "--model m: expected --scheme entropy or topk, or --entropies"),
    ],
)
def test_errors_while_running(text: str, options: str, message: str) -> None:
    saved(b"<p>", "page.html")
    result = run("patch", *options.split())
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"blt-kernels patch: {message}")
    assert result.stderr.count("\n") == 1
    assert isinstance(result.exception, SystemExit)
    assert Path("page.html").read_bytes() == b"<p>"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("patch", "Missing argument 'FILE...'"),
        ("patch input.txt --threshold abc", "Invalid value for '--threshold'"),
        ("patch input.txt --patch-size 1.5", "Invalid value for '--patch-size'"),
        ("patch input.txt --scheme foo", "Invalid value for '--scheme'.*'foo' is not one of 'entropy', 'space'"),
        ("patch input.txt --color blue", "Invalid value for '--color'.*'blue' is not one of 'always'"),
        ("patch input.txt --model", "Option '--model' requires an argument"),
        ("patch input.txt --fast", "No such option: --fast"),
        ("cut input.txt", "No such command 'cut'"),
    ],
)
def test_command_lines_that_do_not_parse(text: str, args: str, message: str) -> None:
    result = run(*args.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.search(message, re.sub(r"[│\s]+", " ", result.stderr))
    assert isinstance(result.exception, SystemExit)


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLT_KERNELS_TRACEBACK", "1")
    assert isinstance(run("patch", "nowhere.txt").exception, FileNotFoundError)


def test_help_names_every_option() -> None:
    out = blt("patch", "--help")
    for word in ("scheme", "threshold", "target-size", "monotonic", "threshold-add", "max-patch-length", "patch-size"):
        assert f"--{word}" in out
    for word in ("delimiter", "model", "start", "length", "max-show", "plot", "html", "json", "entropies", "color"):
        assert f"--{word}" in out


@dataclass(frozen=True)
class Settings:
    file: Annotated[Path, Doc("What to read.")]
    names: Annotated[Sequence[str], Doc("Names.")] = ("a",)
    some_size: Annotated[int | None, Doc("Bytes.")] = None
    fast: Annotated[bool, Doc("Be fast.")] = False
    hidden: int = 3


def test_options_are_the_documented_fields_of_dataclasses() -> None:
    seen = []
    small = typer.Typer()

    @small.command()
    @options_of(Settings, some_size="BYTES")
    def command(options: dict[str, Any], loud: bool = False) -> None:
        """Do something."""
        seen.append((build(Settings, options, hidden=4), loud))

    for args in (["x"], ["x", "--some-size=5", "--fast", "--names=b", "--names=c", "--loud"]):
        assert CliRunner().invoke(small, args).exit_code == 0
    assert seen == [
        (Settings(Path("x"), hidden=4), False),
        (Settings(Path("x"), ["b", "c"], 5, True, hidden=4), True),
    ]
    text = CliRunner().invoke(small, ["--help"]).output
    assert "Do something." in text
    for word in ("FILE", "What to read.", "--some-size", "BYTES", "--fast", "Be fast.", "--no-loud"):
        assert word in text
    assert "hidden" not in text
    assert "--no-fast" not in text
    assert CliRunner().invoke(small, []).exit_code == 2


def test_version() -> None:
    assert blt("--version").strip() == doctor.package_version()


# --- as a program -----------------------------------------------------------------------------------------------------

ENVIRONMENT = {"PYTHONPATH": str(Path(bk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def test_a_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["blt-kernels", "patch", saved("a 你".encode()), "--scheme=space"])
    with pytest.raises(SystemExit) as end:
        main()
    out.flush()
    assert end.value.code == 0
    assert b"\na? ??" in out.buffer.getvalue()


def test_a_closed_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["blt-kernels", "patch", "-", "--scheme=space"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err == "blt-kernels patch: FILE -: expected an open standard input\n"


@pytest.mark.slow
def test_pipes() -> None:
    """Bytes that are no text come in by a pipe; who reads the output goes away after a line."""
    data = "naïve\n".encode() + b"\xff\x00" + b"word " * 200_000
    process = subprocess.Popen(
        [sys.executable, "-m", "blt_kernels", "patch", "-", "--scheme=space", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT},
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdin.write(data)
    process.stdin.close()
    assert json.loads(process.stdout.readline())["file"] == "standard input"
    process.stdout.close()
    assert process.wait(30) == 1
    assert process.stderr.read() == b""


MEASURE = """
import sys
from blt_kernels.cli import app

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

app(["patch", sys.argv[1], "--scheme", "space", "--max-show", "10"], standalone_mode=False)
before = peak()
app(["patch", sys.argv[2], "--scheme", "space", "--max-show", "10"], standalone_mode=False)
print(f"grown by {peak() - before} kB")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory in /proc")
def test_memory_does_not_grow_with_the_file() -> None:
    some = real_text(1 << 18)
    small, large = saved(some * 16, "small"), saved(some * 160, "large")  # they have 4 and 40 MiB
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed pages go back at once, so fragmentation is not measured
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large],
        env={**os.environ, **ENVIRONMENT, **at_once, "PYTHONIOENCODING": "ascii:replace"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"bytes         {160 * len(some):,}\n" in out
    grown = re.search(r"grown by (\d+) kB", out)
    assert grown
    assert int(grown[1]) < 8 << 10  # the file alone is 36 MiB larger


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None
from blt_kernels.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["doctor", "flops", "eval", "train"])
def test_without_numpy_only_training_and_evaluation_stop(command: str) -> None:
    arguments = {"eval": ["model", "text"], "train": ["entropy", "text"]}.get(command, [])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_NUMPY, command, *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if arguments:
        told = f"blt-kernels {command}: numpy is not installed: pip install 'blt-kernels[train]'\n"
        assert (done.returncode, done.stderr) == (1, told)
    else:
        assert done.returncode == 0
        assert ("pip install 'blt-kernels[train]'" in done.stdout) == (command == "doctor")


# --- doctor and demo --------------------------------------------------------------------------------------------------


def test_doctor() -> None:
    facts = json.loads(blt("doctor", "--json"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["blt_kernels"] == doctor.package_version()
    assert {by["CPU"] == "reference" or by["CPU"].startswith("C++") for by in facts["ops"].values()} == {True}
    assert all(item["what"] and item["command"] for item in facts["missing"])
    out = blt("doctor", "--color=never")
    assert "\x1b" not in out
    assert torch.__version__ in out
    for name in facts["ops"]:
        assert name in out


def test_doctor_lists_code_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports none of them, and tells one from a package of the same name."""
    doctor.code_bases()
    for name, (package, _, file) in doctor.CODE_BASES.items():
        path = tmp_path / name / package / file
        path.parent.mkdir(parents=True)
        path.write_text("raise AssertionError")
        (tmp_path / name / package / "__init__.py").write_text("raise AssertionError")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "path", [str(tmp_path / name)])
            for other, _, _ in doctor.CODE_BASES.values():
                patched.delitem(sys.modules, other, raising=False)
            found = doctor.code_bases()
            assert {name for name, base in found.items() if base} == {name}
            assert found[name]["path"] == str(tmp_path / name / package)
            assert found[name]["apply"] == f"blt_kernels.integrations.{name}.apply()"
            assert found[name]["replaces"]
            console = Console(width=200, record=True, file=io.StringIO())
            console.print(doctor.table_of_code_bases(found))
            shown = console.export_text()
            assert all(text in shown for pair in found[name]["replaces"].items() for text in pair)
            path.unlink()
            assert not any(doctor.code_bases().values())
    assert doctor.table_of_code_bases(dict.fromkeys(doctor.CODE_BASES)).startswith("no code base")


def test_doctor_names_every_operator() -> None:
    prefix = "blt_kernels::"
    registered = {n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)}
    assert set(_extension.OPERATORS) == registered
    assert set(doctor.owners()) == {n.removesuffix("_fwd") for n in registered if n.endswith(("_fwd", "_step"))}


def test_demo(text: str) -> None:
    out = blt("demo", text, "--rounds=1", "--color=never")
    for op in ("entropy_patch", "ngram_hash_embed", "patch_pool", "patch_unpool"):
        assert re.search(rf"\b{op} +│ +[\d.]+ │ +[\d.]+ │ +[\d.]+ │ +\S+e[-+]\d+ │", out), op
    for op in ("patch_cross_attention, encode", "patch_cross_attention, decode", "the whole model, forward"):
        assert op in out
    assert out.count("block_causal_attention") == 2
    assert "Fused and reference ops: the same to rounding." in out


def test_demo_refuses(text: str) -> None:
    for args, message in (
        ((text, "--rounds=0"), "--rounds 0: expected at least 1"),
        ((saved(b"", "empty"),), "FILE empty: expected at least one byte"),
        (("nowhere",), "nowhere: No such file or directory"),
    ):
        result = run("demo", *args)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"blt-kernels demo: {message}")
        assert result.stderr.count("\n") == 1
