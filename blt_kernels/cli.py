"""The command line ``blt-kernels``: arguments and help texts. What a command does is in `blt_kernels.tools`.

Exit codes: 0 for success; 1 for an error while running and 2 for a command line that does not parse, each told in one
line; 130 for an interruption. Whatever else is raised is a bug and shows its traceback.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
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

EXPECTED = (OSError, ValueError, ImportError, MemoryError)
_UsageError: Any = typer.BadParameter.__mro__[1]  # of the click inside of typer, which exports only subclasses
_INT64 = range(-(1 << 63), 1 << 63)


class _Command(typer.core.TyperCommand):
    """Refuses what no option can mean: nothing, which pathlib takes for the current directory, and endless numbers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, arg in pairwise(["", *args]):
            option, sign, value = arg.partition("=")
            if not arg or (option.startswith("--") and sign and not value):
                where = option or (before if before.startswith("--") else "an argument")
                raise typer.BadParameter("expected a value, got ''", ctx=ctx, param_hint=where)
        try:
            rest = super().parse_args(ctx, list(args))  # it empties what it is given
        except _UsageError as error:
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
    """Tells errors that a user can cause in one line. BLT_KERNELS_TRACEBACK=1 shows from where."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except _UsageError as error:
            raise self._told(ctx, error, error.format_message(), 2) from None
        except (*EXPECTED, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
                raise
            raise self._told(ctx, error, one_line(error), 1) from None

    def _told(self, ctx: Any, error: Exception, message: str, code: int) -> Exception:
        """Return the exception to raise once an error has been told."""
        if os.environ.get("BLT_KERNELS_TRACEBACK"):
            return error
        command, message = self.commands.get(ctx.invoked_subcommand), " ".join(message.split())
        if command is None:
            typer.echo(f"blt-kernels: {message}", err=True)
        else:
            typer.echo(f"blt-kernels {command.name}: {_as_typed(message, command)}", err=True)
        return typer.Exit(code)


def _as_typed(message: str, command: Any) -> str:
    """A message that begins with the name of a field, with the option or argument that the field is from instead."""
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
    """What went wrong, without the line breaks and the errno."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
        return f"{where}{error.strerror}"
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


@app.command(cls=_Command)
def doctor(json: JsonOption = False, color: ColorOption = Color.auto) -> None:
    """Say what is installed, which kernels run where, what is missing and the command that brings it."""
    from blt_kernels.tools import doctor

    raise typer.Exit(doctor.run(as_json=json, color=color))


@app.command(
    cls=_Command,
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
    from blt_kernels.tools import patch
    from blt_kernels.tools.stream import Rules, parse_byte

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
    outputs = patch.Outputs(start, length, max_show, plot, html, json, entropies)
    options = {"include": include, "context": context, "bf16": bf16 or None, "processes": processes, "device": device}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if save is not None:
        from blt_kernels.tools import save_patches

        outputs.expect_none("--save")
        save_patches.run(save_patches.SaveConfig(save, [Path(file) for file in files], **given), rules, model, color)
        return
    if given:
        raise ValueError(f"--{next(iter(given))}: expected --save beside it")
    drawn = _given(ctx, "max_show", *(("start", "length") if plot is html is None else ()))
    if json and drawn:
        raise ValueError(f"{drawn}: expected no --json beside it, or --html or --plot as well")
    patch.run(files, rules, outputs, model, color)


@app.command(cls=_Command)
def demo(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="File to cut; one of the standard library if not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Times that every op is measured.")] = 5,
    color: ColorOption = Color.auto,
) -> None:
    """Cut a real file into patches, then run it through BLT: fused ops against their plain PyTorch references."""
    from blt_kernels.tools import demo

    demo.run(file, rounds=rounds, color=color)


@app.command(cls=_Command)
def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Ops to measure; all if not given.")
    ] = None,
    threads: Annotated[str, typer.Option(help="Numbers of CPU threads, with commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(help="Times that every implementation is measured.")] = 30,
    budget: Annotated[
        float, typer.Option(metavar="SECONDS", help="Measure a slow implementation no longer, but three times.")
    ] = 5.0,
    small: Annotated[bool, typer.Option("--small", help="Small inputs, to see that everything runs.")] = False,
    compile_peers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure torch.compile as well.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add to this file instead of bench/results/<date>-<device>.csv."),
    ] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write the CSV file and pictures.")] = True,
    color: ColorOption = Color.auto,
) -> None:
    """Time the ops against the best that one could run instead, and against what the machine can do at all."""
    from blt_kernels.tools import bench

    try:
        counts = [int(count) for count in threads.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas, got {threads!r}", param_hint="--threads") from None
    bench.run(
        ops or [],
        threads=counts,
        rounds=rounds,
        budget=budget,
        small=small,
        compile_peers=compile_peers,
        device=device,
        csv=csv,
        save=save,
        color=color,
    )


@app.command(cls=_Command)
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
            help="Fraction of the files to keep for measuring, each by its own chance: of few files perhaps none."
        ),
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the split, the order of the data and the first weights.")] = 0,
    steps: Annotated[
        int,
        typer.Option(
            help="Steps in all. A run may go on with more: then with the learning rates of a run of that length."
        ),
    ] = 3000,
    batch_bytes: Annotated[int, typer.Option(help="Bytes in a step.")] = 4096,
    context: Annotated[int, typer.Option(help="The most bytes of a file in one piece.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up, from where it falls along a cosine.")] = 3e-3,
    final_learning_rate: Annotated[float, typer.Option(help="At the last step.")] = 3e-5,
    warmup: Annotated[int, typer.Option(help="Steps.")] = 50,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bf16: faster on GPUs, and on CPUs with AMX.")] = False,
    save_bf16: Annotated[bool, typer.Option("--save-bf16", help="Save in bf16: half the size.")] = False,
    patch_size: Annotated[
        float, typer.Option(help="Bytes of a patch on average, which the threshold of an entropy model is chosen for.")
    ] = 4.5,
    accumulate: Annotated[int, typer.Option(help="Micro-batches in a rank's share of a step.")] = 1,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Keep only the inputs of layers, and compute them twice.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the layers with torch.compile.")] = False,
    parallel: Annotated[str, typer.Option(help="How the ranks of torchrun share the work: ddp or fsdp.")] = "ddp",
    shard_tables: Annotated[
        bool, typer.Option("--shard-tables", help="Share the rows of a BLT's hash tables out; fsdp always does.")
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
        float | None, typer.Option(help="Of the global transformer's layers; that of the others if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    eval_every: Annotated[int, typer.Option(help="Steps between measurements on held-out files.")] = 500,
    eval_bytes: Annotated[int, typer.Option(help="The most bytes of one; the last one takes all.")] = 1 << 18,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    checkpoint_seconds: Annotated[float, typer.Option(help="The most seconds between checkpoints.")] = 60.0,
    patches: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of a BLT: what patch --save stored, in place of patching.")
    ] = None,
    keep: Annotated[int, typer.Option(help="How many checkpoints stay: the newest ones.")] = 1,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Write its events; if installed if not given.")
    ] = None,
    color: ColorOption = Color.auto,
) -> None:
    """Train a model on files. Killed at any moment, the same command goes on from the last checkpoint.

    On several processes: torchrun --nproc-per-node 2 -m blt_kernels train ...
    """
    from blt_kernels.tools import watch
    from blt_kernels.tools.train import TrainConfig

    if model != "entropy" and _given(ctx, "patch_size"):
        raise ValueError(
            f"--patch-size {patch_size}: expected the model entropy, whose threshold it is for, got {model}"
        )
    if heldout == 0 and (ignored := _given(ctx, "eval_every", "eval_bytes", "patch_size")):
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
    watch.run_train(config, color)


def _given(ctx: typer.Context, *names: str) -> str | None:
    """The first of these options that stands on the command line."""
    given = (name for name in names if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE")
    return next(("--" + name.replace("_", "-") for name in given), None)


def _key_and_json(setting: str) -> tuple[str, Any]:
    import json

    key, _, value = setting.partition("=")
    try:
        if key:
            return key, json.loads(value)
        raise ValueError
    except ValueError:
        raise typer.BadParameter(f"expected KEY=JSON, got {setting!r}", param_hint="--set") from None


@app.command("eval", cls=_Command)
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
    from blt_kernels.tools import watch
    from blt_kernels.tools.evaluate import EvalConfig

    if split == "all" and (ignored := _given(ctx, "heldout", "seed")):
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
    watch.run_eval(config, as_json=json, color=color)


@app.command(cls=_Command)
def flops(
    configs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG]...",
            help="400M, 1B, 2B, 4B, 8B: sizes of the BLT paper; blt, entropy, megabyte, each also with -small; a "
            ".safetensors file; a directory of transformers or facebookresearch/blt. All five sizes if not given.",
        ),
    ] = None,
    patch_sizes: Annotated[
        str | None, typer.Option(help="Bytes of a patch on average, with commas; 4.5,6,8 if not given.")
    ] = None,
    context: Annotated[int, typer.Option(help="Bytes of a row.")] = 16384,
    window: Annotated[
        int | None, typer.Option(help="Bytes that layers over bytes see; the configuration's own if not given.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the model on text, and count what its ops and matrices do.")
    ] = False,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="What to measure on; a part of Python's library.")
    ] = None,
    json: JsonOption = False,
    color: ColorOption = Color.auto,
) -> None:
    """Count the FLOPs of a byte by parts: by the BLT paper's formula, and of this implementation."""
    from blt_kernels.tools import flops

    try:
        sizes = None if patch_sizes is None else [float(size) for size in patch_sizes.split(",")]
    except ValueError:
        message = f"expected numbers with commas, got {patch_sizes!r}"
        raise typer.BadParameter(message, param_hint="--patch-sizes") from None
    options = flops.Options(sizes, context, window, measure, text or ())
    flops.run(configs or [], options, as_json=json, color=color)


def main() -> None:
    """Run the command line: the entry point of ``blt-kernels``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="blt-kernels")
    finally:
        _flush()


def _flush() -> None:
    """Write out what standard output holds, here rather than when Python ends, which has no words for a full disk."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes at the end
        if not isinstance(error, BrokenPipeError):
            typer.echo(f"blt-kernels: standard output: {error.strerror}", err=True)
        raise SystemExit(1) from None
