"""``blt-kernels flops`` counts the FLOPs of a byte: by the paper's formula, of this implementation, and on text."""

from __future__ import annotations

import json as json_format
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import Doc

from blt_kernels import models
from blt_kernels.cli.base import ColorOption, Command, JsonOption, app, numbers
from blt_kernels.cli.console import Color, console
from blt_kernels.cli.options import build, options_of
from blt_kernels.flops import PAPER_SIZES, PARTS, Config, Flops, Part, Rows, count_flops, counted_parts, paper_flops
from blt_kernels.layout import PatchLayout
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, ByteModel, MegaByteConfig
from blt_kernels.train import checks

if TYPE_CHECKING:
    from blt_kernels.train.data import Source

PRESETS: dict[str, Config] = {
    **PAPER_SIZES,
    "blt": BLTConfig(),
    "blt-small": BLTConfig.small(),
    "entropy": ByteLMConfig(),
    "entropy-small": ByteLMConfig.small(),
    "megabyte": MegaByteConfig(),
    "megabyte-small": MegaByteConfig.small(),
}
_MODELS: dict[type, Any] = {model.config_class: model for model in models.MODELS.values()}

# A measurement takes at most so many ids, in rows no longer than this. The model must fit into memory with gradients.
_PATCH_SIZES = (4.5, 6.0, 8.0)
_WITH_PATCHER = ("forward + patcher", "training + patcher")
_MEASURED_BYTES, _MEASURED_CONTEXT, _MOST_PARAMETERS = 8192, 2048, 1_000_000_000


@dataclass(frozen=True)
class Options:
    """Holds the options of the command. `patch_sizes` are 4.5, 6 and 8 bytes if None."""

    patch_sizes: Sequence[float] | None = None
    context: Annotated[int, Doc("Bytes of a row.")] = 16384
    window: Annotated[
        int | None, Doc("Bytes that layers over bytes attend to; the configuration's own if not given.")
    ] = None
    measure: Annotated[bool, Doc("Run the model on text, and count the FLOPs of its ops and matrices.")] = False
    text: Annotated[Sequence[Path], Doc("Text to measure on; a part of Python's library if not given.")] = ()

    def __post_init__(self) -> None:
        checks.check_count("context", self.context, 2)
        for size in self.patch_sizes or ():
            self.check_patch_size(size)
        if self.window is not None:
            checks.check_count("window", self.window, 1)
        if self.text and not self.measure:
            raise ValueError(f"text: expected measure beside it, got {', '.join(map(str, self.text))}")

    def check_patch_size(self, size: float) -> None:
        """Raise ValueError unless a row holds a patch of this size."""
        if not 1 <= size <= self.context:
            raise ValueError(f"patch_sizes: expected 1 to context = {self.context} bytes, got {size}")


@dataclass(frozen=True)
class Measurement:
    """Holds lines (part, FLOPs by `count_flops`, FLOPs that `FlopCounterMode` counted) of a model on `rows`."""

    rows: Rows
    lines: list[tuple[str, float, float]]

    def record(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        compared = {part: {"formula": formula, "counted": counted} for part, formula, counted in self.lines}
        return {"bytes": sum(self.rows.num_bytes), "patches": sum(self.rows.num_patches), "flops": compared}


@dataclass(frozen=True)
class Result:
    """Holds the FLOPs of a byte, by the formula of the paper and of this implementation, and the measurement."""

    patch_size: float
    paper: Flops
    here: Flops
    measured: Measurement | None

    def record(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        record = {"patch_size": self.patch_size, "paper": _lines(self.paper), "implementation": _lines(self.here)}
        return record if self.measured is None else {**record, "measured": self.measured.record()}


def read_config(name: str) -> Config:
    """Return the configuration of a preset, of a ``.safetensors`` file of ours, or of another code base's directory.

    Raises
    ------
    OSError
        The file cannot be read, or the directory has no configuration.
    ValueError
        There is none of this name, it is damaged, or it is not of a model that this package has.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).exists():
        raise ValueError(f"expected a file, a directory or one of {', '.join(PRESETS)}, got {name!r}")
    return models.read_config(name)


def with_window(config: Config, window: int | None) -> Config:
    """Return a configuration whose layers over bytes attend to `window` bytes. MegaByte's attend to their patch."""
    if window is None or isinstance(config, MegaByteConfig):
        return config
    if isinstance(config, ByteLMConfig):
        return replace(config, window=window)
    local = {name: replace(getattr(config, name), window=window) for name in ("encoder", "decoder")}
    return replace(config, **local)


def measure(config: Config, patch_size: float, context: int, text: Sequence[Path] = ()) -> Measurement:
    """Run a model with random weights, forward and backward, on some documents, and count its FLOPs.

    The patches of a BLT are those of its scheme; with entropy patching, those of the bundled entropy model at the
    threshold that makes `patch_size` bytes a patch. Hash tables, which cost no FLOPs, are made small.

    Parameters
    ----------
    config : BLTConfig, ByteLMConfig or MegaByteConfig
    patch_size : float
    context : int
        Rows are no longer than this, nor than 2048 ids.
    text : sequence of Path
        Files and directories; the sources of Python's ``json`` if empty.

    Raises
    ------
    FileNotFoundError, ValueError
        As `data.find_sources`, or the model is too large.
    """
    from blt_kernels.train import data  # needs numpy, of the extra `train`

    sources = data.find_sources(text or [Path(os.__file__).parent / "json"])
    context = min(context, _MEASURED_CONTEXT)
    tokens, rows = next(data.heldout_batches(sources, _MEASURED_BYTES, context))
    model, options = _model(config), {}
    spans = Rows(rows.diff().tolist(), [0] * (len(rows) - 1))
    if isinstance(model, BLT):
        layout = options["layout"] = _patches(model, tokens, rows, patch_size, sources, context)
        spans = Rows.of(layout)
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")  # hooks of the counter warn where inputs need no gradient
        loss = model.loss(tokens, rows, **options)
        parts, forward = counted_parts(counter.get_flop_counts()), counter.get_total_flops()
        loss.backward()
        backward = counter.get_total_flops() - forward
    patcher = 0
    if isinstance(model, BLT) and model.patcher is not None and model.config.patching == "entropy":
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.patcher(tokens, rows)
        patcher = counter.get_total_flops()
    formula = count_flops(config, spans)
    whole = formula.total
    lines = [(name, formula.parts.get(name, Part()).forward, float(parts.get(name, 0))) for name in (*PARTS, "unknown")]
    lines += [("forward", whole.forward, forward), ("backward", whole.backward, backward)]
    lines.append(("patcher", formula.patcher, patcher))
    return Measurement(spans, [line for line in lines if any(line[1:])])


def _model(config: Config) -> ByteModel:
    if isinstance(config, BLTConfig):
        config = replace(config, ngram_vocab=64)
    with torch.device("meta"):
        size = sum(p.numel() for p in _MODELS[type(config)](config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"measure: expected at most {_MOST_PARAMETERS:,} parameters beside hash tables, got {size:,}")
    return _MODELS[type(config)](config)


def _patches(
    model: BLT, tokens: Tensor, rows: Tensor, patch_size: float, sources: Sequence[Source], context: int
) -> PatchLayout:
    from blt_kernels.train import data, evaluate  # needs numpy, of the extra `train`

    config = model.config
    data.check_patching("measure: config.patching", config.patching)
    if config.patching != "entropy":
        return model.patch(tokens, rows)
    own, model.patcher = model.patcher, ByteLM.bundled()
    threshold = evaluate.threshold_for_patch_size(model.patcher, sources, patch_size, _MEASURED_BYTES, context)
    model.config = replace(config, threshold=threshold)
    layout = model.patch(tokens, rows)
    model.patcher = own
    return layout


# --- output -----------------------------------------------------------------------------------------------------------


@app.command(cls=Command)
@options_of(Options)
def flops(
    options: dict[str, Any],
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
    json: JsonOption = False,
    color: ColorOption = Color.auto,
) -> None:
    """Count the FLOPs of a byte by parts: by the BLT paper's formula, and of this implementation."""
    sizes = None if patch_sizes is None else numbers("--patch-sizes", patch_sizes, float)
    chosen, out, records = build(Options, options, patch_sizes=sizes), console(color), []
    if not json:
        rows = f"rows of {chosen.context:,} bytes"
        out.print(f"millions of FLOPs a byte, {rows}: formula of the paper | this implementation", soft_wrap=True)
    read = {}
    for name in configs or PAPER_SIZES:
        with checks.reading("config"):
            read[name] = read_config(name)
    if chosen.window is not None and all(isinstance(config, MegaByteConfig) for config in read.values()):
        raise ValueError(f"window: expected a configuration with windows beside MegaByte's, got {chosen.window}")
    if chosen.patch_sizes is not None and all(_own_size(config) is not None for config in read.values()):
        given = ",".join(f"{size:g}" for size in chosen.patch_sizes)
        raise ValueError(f"patch_sizes: expected a configuration without a patch size of its own, got {given}")
    for name, whole in read.items():
        config, own, found = with_window(whole, chosen.window), _own_size(whole), []
        for size in (chosen.patch_sizes or _PATCH_SIZES) if own is None else [own]:
            chosen.check_patch_size(size)
            here = count_flops(config, Rows.even(chosen.context, size)).per_byte(chosen.context)
            done = measure(config, size, chosen.context, chosen.text) if chosen.measure else None
            found.append(Result(size, paper_flops(config, size, chosen.context), here, done))
        records += [{"model": name, "context": chosen.context, **result.record()} for result in found]
        if not json:
            out.print(_table(name, found))
            for result in found:
                if result.measured is not None:
                    out.print(_measured_table(name, result.measured))
    if json:
        out.print(json_format.dumps(records, indent=2), soft_wrap=True)


def _own_size(config: Config) -> float | None:
    """Return the patch size of a configuration that has one, None if it depends on the text."""
    if isinstance(config, ByteLMConfig):
        return 1
    if isinstance(config, MegaByteConfig):
        return config.patch_size
    return {"static": config.patch_size, "byte": 1}.get(config.patching)


def _table(name: str, results: Sequence[Result]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(name, no_wrap=True)
    columns = []
    for result in results:
        table.add_column(f"patch {result.patch_size:g}", justify="right")
        table.add_column("|", justify="left")
        columns += [_lines(result.paper), _lines(result.here)]
    for line in (*PARTS, "forward", "training", "patcher", *_WITH_PATCHER):
        if any(line in column for column in columns):
            table.add_row(line, *(_millions(column.get(line, 0.0)) for column in columns))
    return table


def _lines(flops: Flops) -> dict[str, float]:
    """Return the lines of one column of a table. If there is a patcher, the sums come without and with it."""
    lines = {name: part.forward for name, part in flops.parts.items()}
    lines |= dict(zip(("forward", "training"), _sums(flops.total), strict=True))
    if flops.patcher:
        lines |= {"patcher": flops.patcher, **dict(zip(_WITH_PATCHER, _sums(flops.with_patcher), strict=True))}
    return lines


def _sums(part: Part) -> tuple[float, float]:
    """Return the FLOPs of forward, and of a step of training."""
    return part.forward, part.forward + part.backward


def _measured_table(name: str, measurement: Measurement) -> Table:
    rows = measurement.rows
    size, patches = sum(rows.num_bytes), sum(rows.num_patches)
    mean = f" in {patches:,} patches of {size / patches:.2f}" if patches else ""
    title = f"{name}, measured on {size:,} bytes in {len(rows.num_bytes)} rows{mean}"
    table = Table(title=title, title_justify="left", min_width=len(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("part")
    for heading in ("formula", "counted", "difference"):
        table.add_column(heading, justify="right")
    for line, formula, counted in measurement.lines:
        difference = f"{100 * (formula / counted - 1):+.3f}%" if counted else ""
        table.add_row(line, _millions(formula / size), _millions(counted / size), difference)
    return table


def _millions(flops: float) -> str:
    """Format with four digits, or with all digits before the point."""
    millions = flops / 1e6
    return "-" if not flops else f"{millions:,.0f}" if millions >= 1000 else f"{millions:.4g}"
