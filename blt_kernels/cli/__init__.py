"""The command line is ``blt-kernels``. Each command is a module of its own; `patch` is a package."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"blt-kernels: the command line needs {missing.name}, which is not installed: pip install 'blt-kernels[cli]'"
    ) from None

from blt_kernels.cli.base import app as app
from blt_kernels.cli.console import drop_output

COMMANDS = ("doctor", "patch", "demo", "train", "eval", "generate", "bench", "flops")  # the help text keeps this order

for _name in COMMANDS:
    import_module(f"blt_kernels.cli.{_name}")  # adds its command to `app`


def main() -> None:
    """Run the command line: the entry point of ``blt-kernels``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="blt-kernels")
    except SystemExit as end:
        if not end.code and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this process
            _end_at_once()
        raise
    finally:
        _flush()


def _end_at_once() -> NoReturn:
    """End this process without finalizing Python, where a thread of gloo that still frees a tensor would abort it."""
    _flush()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(0)


def _flush() -> None:
    """Flush standard output here, where a full disk can be told, and not when Python ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        drop_output()
        if not isinstance(error, BrokenPipeError):
            typer.echo(f"blt-kernels: standard output: {error.strerror}", err=True)
        raise SystemExit(1) from None
