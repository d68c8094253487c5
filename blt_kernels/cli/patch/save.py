"""``blt-kernels patch --save`` stores the patches of a corpus for ``blt-kernels train blt --patches``."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typing_extensions import Doc

from blt_kernels.cli.base import terminable
from blt_kernels.cli.console import Color, console, progress
from blt_kernels.cli.patch.model import load_entropy_model
from blt_kernels.cli.patch.rules import Rules, Scheme
from blt_kernels.models import BLT, BLTConfig, ByteLM
from blt_kernels.nn import TransformerConfig
from blt_kernels.train import checks

_SCHEMES = (Scheme.entropy, Scheme.space, Scheme.static, Scheme.byte)  # schemes of a BLT that is trained on files


@dataclass(frozen=True)
class SaveConfig:
    """The files to store patches of, and how."""

    folder: Path
    paths: Sequence[Path]
    include: Annotated[Sequence[str], Doc("With --save: names to take from directories.")] = ("*",)
    context: Annotated[int, Doc("With --save: that of the training.")] = 2048
    bf16: Annotated[bool, Doc("With --save: for training with --bf16.")] = False
    processes: Annotated[int, Doc("With --save: that share the work.")] = 1
    device: Annotated[str, Doc("With --save: cpu or cuda.")] = "cpu"

    def __post_init__(self) -> None:
        checks.check_device(self.device)
        folder = Path(os.path.realpath(self.folder))
        for path in self.paths:
            if Path(os.path.realpath(path)) in (folder, *folder.parents):
                raise ValueError(f"--save {self.folder}: expected a folder outside of {path}, whose patches it is for")
        checks.check_count("context", self.context, 2)
        if self.processes < 1 or (self.processes > 1 and self.device != "cpu"):
            expected = "at least 1" if self.device == "cpu" else f"1 with --device {self.device}"
            raise ValueError(f"--processes {self.processes}: expected {expected}")


def run(config: SaveConfig, rules: Rules, model: Path | None, color: Color) -> None:
    """Store the patches of all files under ``config.paths``, with a bar, and say where they are.

    Raises
    ------
    OSError
        A file cannot be read or written.
    ValueError
        An option cannot work, or the folder holds other patches; the message names it.
    """
    from blt_kernels.train import data, save_patches  # needs numpy, of the extra `train`

    cutter = patching_model(rules, model).to(config.device)
    sources = data.find_sources(config.paths, config.include)
    size = sum(source.size for source in sources)
    total = data.num_ids(sources, config.context)
    began, first, done = time.perf_counter(), None, 0
    with progress(f"patch --save {config.folder}", total) as advance, terminable():

        def report(ids: int) -> None:
            nonlocal first, done
            first, done = ids if first is None else first, done + ids
            advance(ids)

        options: dict[str, Any] = {"bf16": config.bf16, "processes": config.processes, "report": report}
        try:
            save_patches.save(config.folder, sources, cutter, config.context, **options)
        except (KeyboardInterrupt, OSError, MemoryError):
            if first is not None:
                with suppress(OSError):
                    share = f"{done / total:.0%} of the patches are in {config.folder}"
                    typer.echo(
                        f"blt-kernels patch: stopped: {share}, and the same command goes on from there", err=True
                    )
            raise
    seconds, fresh = time.perf_counter() - began, total - (first or 0)
    shown = console(color)
    shown.print(f"patches: {config.folder}", soft_wrap=True)
    speed = f", {fresh / seconds:,.0f} bytes/s" if fresh else ", all of them stored before"
    shown.print(f"{size:,} bytes in {len(sources):,} files{speed}")


def patching_model(rules: Rules, path: Path | None) -> BLT:
    """Return a BLT that patches by `rules` and the entropy model at `path`. Its other parts are as small as possible.

    Raises
    ------
    ValueError
        No BLT is trained with the rule, or there is an entropy model that it does not need.
    """
    if rules.scheme not in _SCHEMES:
        expected = ", ".join(scheme.value for scheme in _SCHEMES)
        raise ValueError(f"--scheme {rules.scheme.value}: expected one of {expected}, since --save is for training")
    if rules.target_size is not None:
        raise ValueError(f"--target-size {rules.target_size}: expected --threshold beside --save, as training has it")
    names = {field.name for field in fields(rules)} & {field.name for field in fields(BLTConfig)}
    values: dict[str, Any] = {name: getattr(rules, name) for name in names if getattr(rules, name) is not None}
    patcher: ByteLM | None = None
    if rules.needs_entropy:
        patcher = load_entropy_model(path)
        values.setdefault("threshold", patcher.config.threshold)
    elif path is not None:
        raise ValueError(f"--model {path}: expected --scheme entropy to use it")
    nothing = TransformerConfig(dim=2, num_layers=0, num_heads=1)
    config = BLTConfig(
        nothing, nothing, nothing, None, patching=rules.scheme.value, ngram_sizes=(1,), ngram_vocab=1, **values
    )
    model = BLT(config)
    model.patcher = patcher and patcher.requires_grad_(False)
    return model
