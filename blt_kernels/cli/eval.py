"""``blt-kernels eval`` measures a trained model in bits per byte."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blt_kernels.cli.base import ColorOption, Command, JsonOption, app, given
from blt_kernels.cli.console import Color, console, step_bar

if TYPE_CHECKING:
    from blt_kernels.train.evaluate import EvalConfig


@app.command("eval", cls=Command)
def evaluate(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The model.safetensors of a run, or a directory.")
    ],
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files and directories to measure on.")],
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Names to take from directories.")] = None,
    split: Annotated[
        str, typer.Option(help="all, or heldout or train: one side of what `train` makes of these paths.")
    ] = "all",
    heldout: Annotated[float, typer.Option(help="Fraction that was held out in training.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    batch_bytes: Annotated[int, typer.Option(help="Bytes at a time.")] = 16384,
    context: Annotated[int, typer.Option(help="The most bytes of a file in one piece.")] = 2048,
    ngram: Annotated[
        bool, typer.Option("--ngram", help="With --split heldout: an order-3 n-gram model of the other side too.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Measure in bf16.")] = False,
    strided: Annotated[bool, typer.Option("--strided", help="MegaByte's strided inference: two passes.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: JsonOption = False,
    color: ColorOption = Color.auto,
) -> None:
    """Measure a trained model in bits per byte."""
    from blt_kernels.train.evaluate import EvalConfig  # needs numpy, of the extra `train`

    if split == "all" and (ignored := given(ctx, "heldout", "seed")):
        raise ValueError(f"{ignored}: expected --split heldout or train beside it")
    config = EvalConfig(
        checkpoint,
        paths,
        include=include or ["*"],
        split=split,
        heldout=heldout,
        seed=seed,
        batch_bytes=batch_bytes,
        context=context,
        ngram=ngram,
        bf16=bf16,
        strided=strided,
        device=device,
    )
    run(config, as_json=json, color=color)


def run(config: EvalConfig, *, as_json: bool, color: Color = Color.auto) -> None:
    """Evaluate with a bar on stderr, then print the result, as JSON if asked for."""
    from blt_kernels.train.evaluate import evaluate as measure

    with step_bar("eval", None, color) as advance:
        result = measure(config, lambda done, total, bits: advance(done, f"{bits:.3f} bits/byte", total))
    out = console(color)
    if as_json:
        out.print(json_format.dumps(asdict(result)), soft_wrap=True)
        return
    size = f"{result.num_bytes:,} bytes in {result.num_files:,} files"
    out.print(f"{result.bits_per_byte:.4f} bits per byte over {size}")
    if result.ngram_bits_per_byte is not None:
        out.print(f"{result.ngram_bits_per_byte:.4f} bits per byte with the order-3 n-gram model")
