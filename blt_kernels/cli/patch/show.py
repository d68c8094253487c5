"""Cuts files into patches, and counts, draws or prints them."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TextIO

import torch
from torch import Tensor
from typing_extensions import Doc

from blt_kernels.cli.console import Color, console, drop_output, progress
from blt_kernels.cli.patch import page, plot, render
from blt_kernels.cli.patch.model import load_entropy_model
from blt_kernels.cli.patch.rules import Rules
from blt_kernels.cli.patch.statistics import Statistics
from blt_kernels.cli.patch.stream import SAMPLE_SIZE, Piece, cut, read
from blt_kernels.cli.patch.window import Window
from blt_kernels.models import ByteLM

STDIN = "-"
PLOT_LENGTH = 200
HTML_LENGTH = 20_000


@dataclass(frozen=True)
class Outputs:
    """The outputs that are asked for."""

    start: Annotated[int, Doc("First byte to draw.")] = 0
    length: Annotated[
        int | None,
        Doc("Bytes to draw; if not given: all that --max-show allows, 200 in a plot, 20000 in a page."),
    ] = None
    max_show: Annotated[int, Doc("The most bytes to draw in the terminal.")] = 4000
    plot: Annotated[Path | None, Doc("Draw entropies, threshold and boundaries: .png, .svg or .pdf.")] = None
    html: Annotated[Path | None, Doc("Write a page that tells about bytes one points at.")] = None
    json: Annotated[bool, Doc("Print JSON lines: the file, every patch, the statistics.")] = False
    entropies: Annotated[bool, Doc("Put entropies into the JSON; compute them for any scheme.")] = False

    def check(self, files: list[str]) -> None:
        """Raise ValueError naming an option that cannot work, before any time is spent."""
        numbers = (("start", self.start, 0), ("length", self.length, 1), ("max-show", self.max_show, 0))
        for name, value, minimum in numbers:
            if value is not None and value < minimum:
                raise ValueError(f"--{name} {value}: expected a number of bytes of at least {minimum}")
        paths = (("plot", self.plot, (".png", ".svg", ".pdf")), ("html", self.html, (".html", ".htm")))
        for name, path, suffixes in paths:
            if path is None:
                continue
            if path.suffix.lower() not in suffixes:
                raise ValueError(f"--{name} {path}: expected a name ending in {' or '.join(suffixes)}")
            if path.is_dir():
                raise ValueError(f"--{name} {path}: expected a file, got a directory")
            if not path.parent.is_dir():
                raise ValueError(f"--{name} {path}: expected an existing folder, {path.parent} is none")
            if len(files) != 1:
                raise ValueError(f"--{name} {path}: expected one FILE, got {len(files)}")
            if files[0] != STDIN and path.exists() and path.samefile(files[0]):
                raise ValueError(f"--{name} {path}: expected another file than the one to read")
        if files.count(STDIN) > 1:
            raise ValueError("FILE -: expected standard input once")
        if STDIN in files and sys.stdin is None:
            raise ValueError("FILE -: expected an open standard input")

    def expect_none(self, beside: str) -> None:
        """Raise ValueError naming an option that is set, and `beside`, which it does not go with."""
        for field_ in fields(self):
            if getattr(self, field_.name) != field_.default:
                name = field_.name.replace("_", "-")
                raise ValueError(f"--{name}: expected none beside {beside}")

    def window(self) -> Window:
        """Return a window that is large enough for every output."""
        lengths = [0 if self.json else self.max_show]
        lengths += [PLOT_LENGTH] * (self.plot is not None) + [HTML_LENGTH] * (self.html is not None)
        return Window(self.start, max(lengths) if self.length is None else self.length)


class JsonLines:
    """Prints one JSON object a patch, as soon as the patch is complete."""

    def __init__(self, out: TextIO, entropies: bool) -> None:
        self.out = out
        self.entropies = entropies
        self._start: int | None = None
        self._entropy: list[Tensor] = []  # entropies from `_start` on, joined where a patch ends

    def add(self, piece: Piece) -> None:
        """Print the patches that end in a piece."""
        if self.entropies and piece.entropy is not None:
            self._entropy.append(piece.entropy)
        starts = piece.starts.tolist()
        if starts:
            bounds = starts if self._start is None else [self._start, *starts]
            self._print(bounds)
            self._start = starts[-1]

    def finish(self, end: int) -> None:
        """Print the last patch."""
        if self._start is not None:
            self._print([self._start, end])

    def _print(self, bounds: list[int]) -> None:
        if not self.entropies:
            lines = (f'{{"type": "patch", "offset": {a}, "length": {b - a}}}\n' for a, b in pairwise(bounds))
            self.out.write("".join(lines))
            return
        first = bounds[0]
        joined = torch.cat(self._entropy)
        values = joined[: bounds[-1] - first].tolist()
        self._entropy = [joined[bounds[-1] - first :].clone()]  # a view would keep all of `joined` in memory
        for a, b in pairwise(bounds):
            entropy = [round(h, 6) for h in values[a - first : b - first]]
            self.out.write(json.dumps({"type": "patch", "offset": a, "length": b - a, "entropy": entropy}) + "\n")


def run(files: list[str], rules: Rules, outputs: Outputs, model_path: Path | None, color: Color) -> None:
    """Cut each of `files`, ``-`` being standard input, and show what `outputs` asks for.

    Raises
    ------
    OSError
        A file cannot be read or written.
    ValueError
        An option cannot work; the message names it.
    """
    outputs.check(files)
    model = None
    if rules.needs_entropy or outputs.entropies:
        model = load_entropy_model(model_path)
    elif model_path is not None:
        raise ValueError(f"--model {model_path}: expected --scheme entropy or topk, or --entropies, to use it")
    for name in files:
        with _opened(name) as source:
            try:
                _show(name, source, rules, outputs, model, color)
            except OSError as error:
                if error.errno == errno.ENOSPC:  # errors of the files to write are told by their options
                    drop_output()
                    raise OSError(error.errno, error.strerror, "standard output") from error
                raise


def _show(name: str, source: BinaryIO, rules: Rules, outputs: Outputs, model: ByteLM | None, color: Color) -> None:
    source_name = "standard input" if name == STDIN else name
    title = render.printable(source_name)
    statistics, window = Statistics(), outputs.window()
    lines = JsonLines(sys.stdout, outputs.entropies) if outputs.json else None
    began = time.perf_counter()
    with progress(title, _size(source), hidden=outputs.json and sys.stdout.isatty()) as advance:
        used, pieces = cut(_counted(read(source), advance), rules, model)
        if lines is not None:
            _print_record({"type": "file", "file": source_name, "rule": used.describe(), **used.record()})
        for piece in pieces:
            statistics.add(piece)
            window.add(piece)
            if lines is not None:
                lines.add(piece)
    statistics.seconds = time.perf_counter() - began
    statistics.finish()
    window.finish()
    notes = []
    if rules.target_size is not None and statistics.bytes > SAMPLE_SIZE:
        notes.append(f"threshold found on the first {SAMPLE_SIZE:,} of {statistics.bytes:,} bytes")
    if window.length and outputs.start >= max(statistics.bytes, 1):
        raise ValueError(f"--start {outputs.start}: expected less than the size of {title}, {statistics.bytes} bytes")
    if lines is not None:
        lines.finish(statistics.bytes)
        _print_record({"type": "statistics", **statistics.record(), "notes": notes})
    else:
        terminal = console(color)
        render.draw(terminal, title, window.narrow(min(outputs.max_show, window.length)), statistics.bytes)
        render.print_statistics(terminal, statistics, used, notes)
    for path, length, write in ((outputs.plot, PLOT_LENGTH, plot.write), (outputs.html, HTML_LENGTH, page.write)):
        if path is not None:
            try:
                write(path, title, window.narrow(outputs.length or length), statistics, used)
            except OSError as error:
                name = "plot" if path is outputs.plot else "html"
                raise ValueError(f"--{name} {path}: {error.strerror or error}") from error
            print(f"wrote {path}", file=sys.stderr)


def _opened(name: str) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if name == STDIN else open(name, "rb")


def _size(source: BinaryIO) -> int | None:
    """Return the size in bytes of a regular file, None for a stream."""
    try:
        status = os.fstat(source.fileno())
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _counted(pieces: Iterable[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        advance(len(piece))


def _print_record(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
