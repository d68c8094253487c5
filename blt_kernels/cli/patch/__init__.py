"""``blt-kernels patch``: its arguments and help texts. The modules beside this file do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blt_kernels.cli.base import ColorOption, Command, app, given
from blt_kernels.cli.console import Color
from blt_kernels.cli.options import build, options_of
from blt_kernels.cli.patch import save as saving
from blt_kernels.cli.patch import show
from blt_kernels.cli.patch.rules import Rules, parse_byte


@app.command(
    cls=Command,
    epilog="Without colours, patches are separated by │. Characters that a boundary cuts, and bytes that are no text, "
    "are shown in hexadecimal: ⟨E2⟩.",
)
@options_of(Rules, show.Outputs, saving.SaveConfig, plot="FILE", html="FILE", include="GLOB")
def patch(
    ctx: typer.Context,
    options: dict[str, Any],
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files to cut; - is standard input.")],
    delimiter: Annotated[
        str | None, typer.Option(help="The byte that ends a patch: one character, or 0x0A; a newline if not given.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Entropy model: a run, a file or a checkpoint's directory; that in the package if not given."
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Draw nothing, but store the patches of files and directories for train blt --patches."
        ),
    ] = None,
    color: ColorOption = Color.auto,
) -> None:
    """Cut files into patches, draw them in alternating colours, and count; or store them for training."""
    byte = None if delimiter is None else parse_byte("--delimiter", delimiter)
    rules, outputs = build(Rules, options, delimiter=byte), build(show.Outputs, options)
    if save is not None:
        outputs.expect_none("--save")
        saving.run(
            build(saving.SaveConfig, options, folder=save, paths=[Path(file) for file in files]), rules, model, color
        )
        return
    if stray := given(ctx, "include", "context", "bf16", "processes", "device"):
        raise ValueError(f"{stray}: expected --save beside it")
    drawn = given(ctx, "max_show", *(("start", "length") if outputs.plot is outputs.html is None else ()))
    if outputs.json and drawn:
        raise ValueError(f"{drawn}: expected no --json beside it, or --html or --plot as well")
    show.run(files, rules, outputs, model, color)
