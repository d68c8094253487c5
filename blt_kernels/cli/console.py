"""The commands share these consoles and progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Color(str, Enum):
    """Says when output has colours."""

    always = "always"
    auto = "auto"
    never = "never"


def console(color: Color, *, stderr: bool = False) -> Console:
    """Return a console that emits escape codes where `color` asks for them, and else prints plain text."""
    if color is Color.always:
        return Console(force_terminal=True, color_system="truecolor", no_color=False, highlight=False, stderr=stderr)
    plain = Console(color_system=None, highlight=False, stderr=stderr)
    if color is Color.never or not plain.is_terminal or plain.is_dumb_terminal or plain.no_color:
        return plain
    return Console(highlight=False, stderr=stderr)


def drop_output() -> None:
    """Let what standard output still holds go nowhere after a failed write: Python writes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress(title: str, total: int | None, hidden: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes on a terminal's stderr; yield the function that advances it."""
    shown = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    name, hidden = TextColumn("{task.description}", markup=False), hidden or not shown.is_terminal
    with Progress(name, *columns, console=shown, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.update(task, advance=size)


@contextmanager
def step_bar(title: str, total: int | None, color: Color) -> Iterator[Callable[..., None]]:
    """Show a bar with a text on a terminal's stderr; yield ``advance(completed, text, total=None)``."""
    shown = console(color, stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeRemainingColumn(), console=shown, disable=not shown.is_terminal) as bar:
        task = bar.add_task(title, total=total, text="")

        def advance(completed: int, text: str, total: int | None = total) -> None:
            bar.update(task, completed=completed, total=total, text=text)

        yield advance
