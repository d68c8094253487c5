"""``blt-kernels eval`` measures a trained model in bits per byte."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from typing import Any

import typer

from blt_kernels.cli.base import ColorOption, Command, JsonOption, app, given
from blt_kernels.cli.console import Color, console, step_bar
from blt_kernels.cli.options import build, options_of
from blt_kernels.train.config import EvalConfig


@app.command("eval", cls=Command)
@options_of(EvalConfig, paths="PATH...", include="GLOB")
def evaluate(
    ctx: typer.Context, options: dict[str, Any], json: JsonOption = False, color: ColorOption = Color.auto
) -> None:
    """Measure a trained model in bits per byte."""
    if options["split"] == "all" and (ignored := given(ctx, "heldout", "seed")):
        raise ValueError(f"{ignored}: expected --split heldout or train beside it")
    config = build(EvalConfig, options)
    from blt_kernels.train.evaluate import evaluate as measure  # needs numpy, of the extra `train`

    with step_bar("eval", None, color) as advance:
        result = measure(config, lambda done, total, bits: advance(done, f"{bits:.3f} bits/byte", total))
    out = console(color)
    if json:
        out.print(json_format.dumps(asdict(result)), soft_wrap=True)
        return
    size = f"{result.num_bytes:,} bytes in {result.num_files:,} files"
    out.print(f"{result.bits_per_byte:.4f} bits per byte over {size}")
    if result.ngram_bits_per_byte is not None:
        out.print(f"{result.ngram_bits_per_byte:.4f} bits per byte with the order-3 n-gram model")
