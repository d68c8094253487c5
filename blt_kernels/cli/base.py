"""The app that the commands are part of, and what they share: parsing, errors, options.

Exit codes: 0 is success, 1 an error while running, 2 a command line that does not parse, 130 an interruption, and 143
SIGTERM where a command says how it goes on. An error prints one line. Any other exception is a bug and prints its
traceback.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Annotated, Any, TypeVar

import typer

from blt_kernels.cli.console import Color

# Some commands need these packages; the extra brings each.
EXTRAS = {"matplotlib": "cli", "safetensors": "cli", "numpy": "train"}
EXPECTED = (OSError, ValueError, ImportError, MemoryError)
UsageError: Any = typer.BadParameter.__mro__[1]  # typer has it from click and exports only subclasses
_INT64 = range(-(1 << 63), 1 << 63)
Number = TypeVar("Number", int, float)


class Command(typer.core.TyperCommand):
    """Refuses values that no option has: empty ones, which pathlib takes for the current folder, and huge numbers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the words of a command line, then parse them."""
        for before, arg in pairwise(["", *args]):
            option, sign, value = arg.partition("=")
            if not arg or (option.startswith("--") and sign and not value):
                where = option or (before if before.startswith("--") else "an argument")
                raise typer.BadParameter("expected a value, got ''", ctx=ctx, param_hint=where)
        try:
            rest = super().parse_args(ctx, list(args))  # it empties the list that it is given
        except UsageError as error:
            for option in getattr(getattr(error, "param", None), "opts", ()):
                values = [value for name, value in pairwise(args) if name == option]
                values += [arg.removeprefix(f"{option}=") for arg in args if arg.startswith(f"{option}=")]
                if values and repr(values[-1]) not in error.message:
                    error.message += f", got {values[-1]!r}"
            raise
        for param in self.params:
            given = ctx.params.get(param.name)
            if isinstance(given, int) and given not in _INT64:
                message = f"expected a number of 64 bits, got {given}"
                raise typer.BadParameter(message, ctx=ctx, param_hint=param.opts[0])
        return rest


class _Group(typer.core.TyperGroup):
    """Prints errors that a user can cause in one line. BLT_KERNELS_TRACEBACK=1 shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt as interruption:
            raise typer.Exit(143 if isinstance(interruption, Terminated) else 130) from None
        except UsageError as error:
            raise self._told(ctx, error, error.format_message(), 2) from None
        except (*EXPECTED, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
                raise
            raise self._told(ctx, error, one_line(error), 1) from None

    def _told(self, ctx: Any, error: Exception, message: str, code: int) -> Exception:
        """Print an error, and return the exception to raise after it."""
        if os.environ.get("BLT_KERNELS_TRACEBACK"):
            return error
        command, message = self.commands.get(ctx.invoked_subcommand), " ".join(message.split())
        # A name in a file, or of one, may hold what a terminal takes for commands.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if command is None:
            typer.echo(f"blt-kernels: {message}", err=True)
        else:
            typer.echo(f"blt-kernels {command.name}: {_as_typed(message, command)}", err=True)
        return typer.Exit(code)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command in the same way as Ctrl-C."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM, unless somebody else handles it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(*_: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_typed(message: str, command: Any) -> str:
    """Replace the name of a field that a message begins with by the option or argument that the field is from."""
    others = {"overrides": "set_", "config": "configs", "paths": "text"}
    params, (name, colon, rest) = {param.name: param for param in command.params}, message.partition(": ")
    param = params.get(name) or params.get(others.get(name))
    if not colon or param is None:
        return message
    return f"{param.opts[0] if param.opts[0].startswith('-') else param.metavar.strip('[].')}: {rest}"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch ran out of memory, for which it has an exception class of its own on CUDA only."""
    words = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return any(word in str(error) for word in words)


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks and errno."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
        return f"{where}{error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed: pip install 'blt-kernels[{EXTRAS[error.name]}]'"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (MemoryError, RuntimeError)):
        return f"not enough memory for a model or batch of this size: {text[:200]}"
    return text


app = typer.Typer(
    cls=_Group,
    help="Kernels for byte-latent language models: look at patches, check the installation, train and measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ColorOption = Annotated[
    Color, typer.Option("--color", help="Colours: auto uses them on a terminal unless NO_COLOR is set.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for other programs to read.")]


def installed(package: str) -> str | None:
    """Return the version of an installed package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_version() -> str:
    """Return the version of blt-kernels; "source tree" where it was not installed."""
    return installed("blt-kernels") or "source tree"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(package_version())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def given(ctx: typer.Context, *names: str) -> str | None:
    """Return the first of these options that the command line has, None if it has none."""
    found = (name for name in names if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE")
    return next(("--" + name.replace("_", "-") for name in found), None)


def numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """Return the numbers between the commas of an option's value."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas, got {text!r}", param_hint=option) from None
