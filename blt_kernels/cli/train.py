"""``blt-kernels train`` trains a model with a live bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blt_kernels.cli.base import ColorOption, Command, app, given
from blt_kernels.cli.console import Color, console, step_bar

if TYPE_CHECKING:
    from blt_kernels.train.config import TrainConfig
    from blt_kernels.train.loop import Progress

_PLAIN_EVERY = 100  # steps between lines where there is no terminal for a bar


@app.command(cls=Command)
def train(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="entropy, blt or megabyte.")],
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files and directories to learn.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the run; runs/MODEL if not given.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Size of the model: small or paper; small if not given.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=JSON", help="Replace a field of the preset: dim=128.")
    ] = None,
    patcher: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Entropy model of a BLT; if not given, that of --init or in the package."),
    ] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Names to take from directories.")] = None,
    heldout: Annotated[
        float,
        typer.Option(
            help="Fraction of the files to keep for measuring. Each file is drawn by itself; few may give none."
        ),
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the split, the order of the data and the first weights.")] = 0,
    steps: Annotated[
        int,
        typer.Option(help="Steps in all. A run may go on with more, at the learning rates of a run of that length."),
    ] = 3000,
    batch_bytes: Annotated[int, typer.Option(help="Bytes in a step.")] = 4096,
    context: Annotated[int, typer.Option(help="The most bytes of a file in one piece.")] = 2048,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate after the warm-up, from which it falls along a cosine.")
    ] = 3e-3,
    final_learning_rate: Annotated[float, typer.Option(help="Learning rate at the last step.")] = 3e-5,
    warmup: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 50,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bf16: faster on GPUs, and on CPUs with AMX.")] = False,
    save_bf16: Annotated[bool, typer.Option("--save-bf16", help="Save in bf16: half the size.")] = False,
    patch_size: Annotated[
        float, typer.Option(help="Mean bytes of a patch, for which the threshold of an entropy model is chosen.")
    ] = 4.5,
    accumulate: Annotated[int, typer.Option(help="Micro-batches in a rank's share of a step.")] = 1,
    checkpoint_activations: Annotated[
        bool,
        typer.Option(
            "--checkpoint-activations", help="Keep only the inputs of layers; backward computes the layers again."
        ),
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the layers with torch.compile.")] = False,
    parallel: Annotated[str, typer.Option(help="How the ranks of torchrun share the work: ddp or fsdp.")] = "ddp",
    shard_tables: Annotated[
        bool, typer.Option("--shard-tables", help="Shard a BLT's hash tables by rows over the ranks; fsdp always does.")
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Model to begin as, with its configuration: a safetensors file, or a directory of transformers or "
            "facebookresearch/blt. Optimiser and learning rate begin anew.",
        ),
    ] = None,
    init_global: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Llama that the global transformer of a BLT begins as.")
    ] = None,
    global_learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate of the global transformer's layers; that of the others if not given."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    eval_every: Annotated[int, typer.Option(help="Steps between measurements on held-out files.")] = 500,
    eval_bytes: Annotated[int, typer.Option(help="The most bytes of a measurement; the last one takes all.")] = 1 << 18,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    checkpoint_seconds: Annotated[float, typer.Option(help="The most seconds between checkpoints.")] = 60.0,
    patches: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For a BLT: patches that patch --save stored, read in place of patching."),
    ] = None,
    keep: Annotated[int, typer.Option(help="How many checkpoints to keep, the newest ones.")] = 1,
    tensorboard: Annotated[
        bool | None,
        typer.Option(
            "--tensorboard/--no-tensorboard",
            help="Write TensorBoard events; if not given, they are written where it is installed.",
        ),
    ] = None,
    color: ColorOption = Color.auto,
) -> None:
    """Train a model on files. Killed at any moment, the same command goes on from the last checkpoint.

    On several processes: torchrun --nproc-per-node 2 -m blt_kernels train ...
    """
    from blt_kernels.train.config import TrainConfig  # needs numpy, of the extra `train`

    if model != "entropy" and given(ctx, "patch_size"):
        raise ValueError(
            f"--patch-size {patch_size}: expected the model entropy, whose threshold it is for, got {model}"
        )
    if heldout == 0 and (ignored := given(ctx, "eval_every", "eval_bytes", "patch_size")):
        raise ValueError(f"{ignored}: expected --heldout above 0 beside it")
    config = TrainConfig(
        model,
        paths,
        out or Path("runs", model),
        preset=preset,
        overrides=dict(_key_and_json(setting) for setting in set_ or []),
        patcher=patcher,
        include=include or ["*"],
        heldout=heldout,
        seed=seed,
        steps=steps,
        batch_bytes=batch_bytes,
        context=context,
        learning_rate=learning_rate,
        final_learning_rate=final_learning_rate,
        warmup=warmup,
        bf16=bf16,
        save_bf16=save_bf16,
        patch_size=patch_size,
        accumulate=accumulate,
        checkpoint_activations=checkpoint_activations,
        compile=compile,
        parallel=parallel,
        shard_tables=shard_tables,
        init=init,
        init_global=init_global,
        global_learning_rate=global_learning_rate,
        device=device,
        eval_every=eval_every,
        eval_bytes=eval_bytes,
        checkpoint_every=checkpoint_every,
        checkpoint_seconds=checkpoint_seconds,
        tensorboard=tensorboard,
        patches=patches,
        keep=keep,
    )
    run(config, color)


def _key_and_json(setting: str) -> tuple[str, Any]:
    key, _, value = setting.partition("=")
    try:
        if key:
            return key, json.loads(value)
        raise ValueError
    except ValueError:
        raise typer.BadParameter(f"expected KEY=JSON, got {setting!r}", param_hint="--set") from None


def run(config: TrainConfig, color: Color = Color.auto) -> None:
    """Train with a bar of bits per byte and bytes per second on stderr, then say where things are.

    Only rank 0 prints.
    """
    from blt_kernels.train.loop import train as train_model  # takes 0.7 s, which no other command should wait for
    from blt_kernels.train.parallel import is_first

    if not is_first():
        train_model(config)
        return
    shown = console(color, stderr=True)
    smooth = None

    with step_bar(f"train {config.model}", config.steps, color) as advance:

        def report(now: Progress) -> None:
            nonlocal smooth
            share = max(0.05, 1 / now.step)
            smooth = now.bits_per_byte if smooth is None else (1 - share) * smooth + share * now.bits_per_byte
            text = f"{smooth:.3f} bits/byte, {now.bytes_per_second:,.0f} bytes/s"
            if now.heldout_bits is not None:
                text += f", held out {now.heldout_bits:.3f}"
            advance(now.step, text)
            if not shown.is_terminal and (now.step % _PLAIN_EVERY == 0 or now.step == now.steps):
                shown.print(f"step {now.step}/{now.steps}: {text}")

        result = train_model(config, report)
    out = console(color)
    if result.heldout_bits is not None:
        out.print(f"held out: {result.heldout_bits:.4f} bits per byte over {result.heldout_bytes:,} bytes")
    out.print(f"model: {result.model}", soft_wrap=True)
    out.print(f"loss curve: {result.curve}", soft_wrap=True)
