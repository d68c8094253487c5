"""``blt-kernels train`` trains a model with a live bar."""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blt_kernels._files import parse_json
from blt_kernels.cli.base import ColorOption, Command, app, given, terminable
from blt_kernels.cli.console import Color, console, step_bar
from blt_kernels.cli.options import build, options_of
from blt_kernels.train.config import TrainConfig

if TYPE_CHECKING:
    from blt_kernels.train.loop import Progress

_PLAIN_EVERY = 100  # steps between lines where there is no terminal for a bar


@app.command(cls=Command)
@options_of(TrainConfig, paths="PATH...", include="GLOB", init_global="DIR", patches="DIR")
def train(
    ctx: typer.Context,
    options: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the run; runs/MODEL if not given.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=JSON", help="Replace a field of the preset: dim=128.")
    ] = None,
    color: ColorOption = Color.auto,
) -> None:
    """Train a model on files. Killed at any moment, the same command goes on from the last checkpoint.

    On several processes: torchrun --nproc-per-node 2 -m blt_kernels train ...
    """
    model, patch_size = options["model"], options["patch_size"]
    if model != "entropy" and given(ctx, "patch_size"):
        raise ValueError(
            f"--patch-size {patch_size}: expected the model entropy, whose threshold it is for, got {model}"
        )
    if options["heldout"] == 0 and (ignored := given(ctx, "eval_every", "eval_bytes", "patch_size")):
        raise ValueError(f"{ignored}: expected --heldout above 0 beside it")
    overrides = dict(_key_and_json(setting) for setting in set_ or [])
    from blt_kernels.train.parallel import is_launched  # takes 0.7 s, which no other command should wait for

    config = build(TrainConfig, options, out=out or Path("runs", model), overrides=overrides)
    if (unused := given(ctx, "parallel", "shard_tables")) and not is_launched():
        raise ValueError(f"{unused}: expected torchrun, which starts several processes")
    run(config, color)


def _key_and_json(setting: str) -> tuple[str, Any]:
    key, _, value = setting.partition("=")
    try:
        if key:
            return key, parse_json(value)
        raise ValueError
    except ValueError:
        raise typer.BadParameter(f"expected KEY=JSON, got {setting!r}", param_hint="--set") from None


def run(config: TrainConfig, color: Color = Color.auto) -> None:
    """Train with a bar of bits per byte and bytes per second on stderr, then say where things are.

    A run that is interrupted, or whose disk is full, says from which step it can go on. Only rank 0 prints.
    """
    from blt_kernels.train.loop import train as train_model
    from blt_kernels.train.parallel import is_launched

    if is_launched() and os.environ["RANK"] != "0":
        train_model(config)
        return
    shown = console(color, stderr=True)
    smooth, step = None, 0

    with step_bar(f"train {config.model}", config.steps, color) as advance:

        def report(now: Progress) -> None:
            nonlocal smooth, step
            step = now.step
            share = max(0.05, 1 / now.step)
            smooth = now.bits_per_byte if smooth is None else (1 - share) * smooth + share * now.bits_per_byte
            text = f"{smooth:.3f} bits/byte, {now.bytes_per_second:,.0f} bytes/s"
            if now.heldout_bits is not None:
                text += f", held out {now.heldout_bits:.3f}"
            advance(now.step, text)
            if not shown.is_terminal and (now.step % _PLAIN_EVERY == 0 or now.step == now.steps):
                shown.print(f"step {now.step}/{now.steps}: {text}", soft_wrap=True)

        def resumed(step: int) -> None:
            shown.print(f"{config.out} goes on from step {step} of {config.steps}", soft_wrap=True)

        # torchrun's SIGTERM ends a rank at once, even while it waits for another one.
        with nullcontext() if is_launched() else terminable():
            try:
                result = train_model(config, report, resumed)
            except (KeyboardInterrupt, OSError, MemoryError):
                if step:
                    _say_how_it_goes_on(config, step)
                raise
    out = console(color)
    if result.heldout_bits is not None:
        size = f"{result.heldout_bytes:,} bytes"
        out.print(f"held out: {result.heldout_bits:.4f} bits per byte over {size}", soft_wrap=True)
    out.print(f"model: {result.model}", soft_wrap=True)
    out.print(f"loss curve: {result.curve}", soft_wrap=True)


def _say_how_it_goes_on(config: TrainConfig, step: int) -> None:
    from blt_kernels.train.state import latest

    checkpoint = latest(config.out / "checkpoint")
    after = checkpoint.name if checkpoint else "0"
    message = (
        f"blt-kernels train: stopped after step {step} of {config.steps}: the same command goes on from step {after}"
    )
    with suppress(OSError):
        typer.echo(message, err=True)
