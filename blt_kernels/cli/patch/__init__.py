"""``blt-kernels patch``: its arguments and help texts. The modules beside this file do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blt_kernels.cli.base import ColorOption, Command, app, given
from blt_kernels.cli.console import Color
from blt_kernels.cli.patch import show
from blt_kernels.cli.patch.rules import Rules, Scheme, parse_byte


@app.command(
    cls=Command,
    epilog="Without colours, patches are separated by │. Characters that a boundary cuts, and bytes that are no text, "
    "are shown in hexadecimal: ⟨E2⟩.",
)
def patch(
    ctx: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files to cut; - is standard input.")],
    scheme: Annotated[Scheme, typer.Option(help="How bytes are cut.")] = Scheme.entropy,
    threshold: Annotated[
        float | None, typer.Option(help="Nats above which a patch starts; the model's own if not given.")
    ] = None,
    target_size: Annotated[
        float | None, typer.Option(help="Find the threshold that makes patches of this many bytes on average.")
    ] = None,
    monotonic: Annotated[bool, typer.Option("--monotonic", help="Compare the rise of the entropy.")] = False,
    threshold_add: Annotated[float | None, typer.Option(help="Nats that the entropy must rise by as well.")] = None,
    max_patch_length: Annotated[int | None, typer.Option(help="Cut longer patches, in bytes.")] = None,
    patch_size: Annotated[int | None, typer.Option(help="Bytes, for static and topk; 4 if not given.")] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="The byte that ends a patch: one character, or 0x0A; a newline if not given.")
    ] = None,
    whole_characters: Annotated[
        bool,
        typer.Option(
            "--whole-characters", help="Start no patch inside of a UTF-8 character, but for the second byte of a file."
        ),
    ] = False,
    reset_at_newlines: Annotated[
        bool, typer.Option("--reset-at-newlines", help="Start the context of the entropy model anew at every newline.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="For bpe: a tokenizer.json, or a directory with one.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Entropy model, a safetensors file or a checkpoint's directory; the one in the package if not given.",
        ),
    ] = None,
    start: Annotated[int, typer.Option(help="First byte to draw.")] = 0,
    length: Annotated[
        int | None,
        typer.Option(help="Bytes to draw; if not given: all that --max-show allows, 200 in a plot, 20000 in a page."),
    ] = None,
    max_show: Annotated[int, typer.Option(help="The most bytes to draw in the terminal.")] = 4000,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw entropies, threshold and boundaries: .png, .svg or .pdf.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that tells about bytes one points at.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines: the file, every patch, the statistics.")
    ] = False,
    entropies: Annotated[
        bool, typer.Option("--entropies", help="Put entropies into the JSON; compute them for any scheme.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Draw nothing, but store the patches of files and directories for train blt --patches."
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="With --save: names to take from directories.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="With --save: that of the training; 2048 if not given.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="With --save: for training with --bf16.")] = False,
    processes: Annotated[int | None, typer.Option(help="With --save: that share the work; 1 if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="With --save: cpu or cuda; cpu if not given.")] = None,
    color: ColorOption = Color.auto,
) -> None:
    """Cut files into patches, draw them in alternating colours, and count; or store them for training."""
    byte = None if delimiter is None else parse_byte("--delimiter", delimiter)
    rules = Rules(
        scheme,
        threshold,
        target_size,
        threshold_add,
        monotonic,
        max_patch_length,
        patch_size,
        byte,
        whole_characters,
        reset_at_newlines,
        tokenizer,
    )
    outputs = show.Outputs(start, length, max_show, plot, html, json, entropies)
    options = {"include": include, "context": context, "bf16": bf16 or None, "processes": processes, "device": device}
    storing: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if save is not None:
        from blt_kernels.cli.patch import save as saving  # needs numpy, of the extra `train`

        outputs.expect_none("--save")
        saving.run(saving.SaveConfig(save, [Path(file) for file in files], **storing), rules, model, color)
        return
    if storing:
        raise ValueError(f"--{next(iter(storing))}: expected --save beside it")
    drawn = given(ctx, "max_show", *(("start", "length") if plot is html is None else ()))
    if json and drawn:
        raise ValueError(f"{drawn}: expected no --json beside it, or --html or --plot as well")
    show.run(files, rules, outputs, model, color)
