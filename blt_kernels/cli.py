"""The command line ``blt-kernels``: arguments and help texts. What a command does is in `blt_kernels.tools`.

Exit codes: 0 for success; 1 for an error while running, told in one line; 2 for a command line that does not parse.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"blt-kernels: the command line needs {missing.name}, which is not installed: pip install 'blt-kernels[cli]'"
    ) from None

from blt_kernels.tools.render import Color
from blt_kernels.tools.stream import Scheme

EXPECTED = (OSError, ValueError, TypeError, ModuleNotFoundError)


class _Group(typer.core.TyperGroup):
    """Tells errors that a user can cause in one line, exit code 1. BLT_KERNELS_TRACEBACK=1 shows where they come from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except EXPECTED as error:
            if os.environ.get("BLT_KERNELS_TRACEBACK"):
                raise
            typer.echo(f"blt-kernels {ctx.invoked_subcommand}: {one_line(error)}", err=True)
            raise typer.Exit(1) from None


def one_line(error: BaseException) -> str:
    """What went wrong, without the line breaks and the errno."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


app = typer.Typer(
    cls=_Group,
    help="Kernels for byte-latent language models: look at patches, check the installation, train and measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ColorOption = Annotated[Color, typer.Option("--color", help="Colours: auto uses them on a terminal unless NO_COLOR is set.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for other programs to read.")]


def _version(wanted: bool) -> None:
    if wanted:
        from blt_kernels.tools import doctor

        typer.echo(doctor.package_version())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(json: JsonOption = False, color: ColorOption = Color.auto) -> None:
    """Say what is installed, which kernels run where, what is missing and the command that brings it."""
    from blt_kernels.tools import doctor

    raise typer.Exit(doctor.run(as_json=json, color=color))


@app.command(
    epilog="Without colours, patches are separated by │. Characters that a boundary cuts, and bytes that are no text, are "
    "shown in hexadecimal: ⟨E2⟩."
)
def patch(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files to cut; - is standard input.")],
    scheme: Annotated[Scheme, typer.Option(help="How bytes are cut.")] = Scheme.entropy,
    threshold: Annotated[
        float | None, typer.Option(help="Nats above which a patch starts; the model's own if not given.")
    ] = None,
    target_size: Annotated[
        float | None, typer.Option(help="Find the threshold that makes patches of this many bytes on average.")
    ] = None,
    monotonic: Annotated[bool, typer.Option("--monotonic", help="Compare the rise of the entropy.")] = False,
    threshold_add: Annotated[
        float | None, typer.Option(help="Nats that the entropy must rise by as well.")
    ] = None,
    max_patch_length: Annotated[int | None, typer.Option(help="Cut longer patches, in bytes.")] = None,
    patch_size: Annotated[int | None, typer.Option(help="Bytes, for static and topk; 4 if not given.")] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="The byte that ends a patch: one character, or 0x0A; a newline if not given.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Entropy model, safetensors; the one in the package if not given.")
    ] = None,
    start: Annotated[int, typer.Option(help="First byte to draw.")] = 0,
    length: Annotated[
        int | None, typer.Option(help="Bytes to draw; if not given: all that --max-show allows, 200 in a plot, 20000 in a page.")
    ] = None,
    max_show: Annotated[int, typer.Option(help="The most bytes to draw in the terminal.")] = 4000,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw entropies, threshold and boundaries: .png, .svg or .pdf.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page that tells about bytes one points at.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines: the file, every patch, the statistics.")] = False,
    entropies: Annotated[
        bool, typer.Option("--entropies", help="Put entropies into the JSON; compute them for any scheme.")
    ] = False,
    color: ColorOption = Color.auto,
) -> None:
    """Cut files into patches, draw them in alternating colours, and count."""
    from blt_kernels.tools import patch
    from blt_kernels.tools.stream import Rules, parse_byte

    byte = None if delimiter is None else parse_byte("--delimiter", delimiter)
    rules = Rules(scheme, threshold, target_size, threshold_add, monotonic, max_patch_length, patch_size, byte)
    outputs = patch.Outputs(start, length, max_show, plot, html, json, entropies)
    patch.run(files, rules, outputs, model, color)


def main() -> None:
    """Run the command line: the entry point of ``blt-kernels``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="blt-kernels")
