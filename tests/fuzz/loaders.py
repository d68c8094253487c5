"""Every loader of files: how to make small valid files for it, how to call it, and how to use what it returns."""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blt_kernels.models import load_model, load_patcher
from blt_kernels.train import loop
from fuzz import valid_files as valid

PLACES = frozenset(("pipe", "unix_socket", "folder", "link", "removal", "sparse"))


class RefusedError(Exception):
    """The command line has refused a file in one line."""


@dataclass(frozen=True)
class Loader:
    """One loader of files.

    Attributes
    ----------
    make : writes valid files into an empty folder
    load : calls the loader on the folder, and raises what it raises
    use : is called with what `load` returned; what is accepted has to work
    without : mutations that a user asks for with such a file: a pipe is waited for
    own_sizes : the file is what the user asks for, memory included
    """

    make: Callable[[Path], object]
    load: Callable[[Path], Any]
    use: Callable[[Any], object] = lambda loaded: None
    without: frozenset[str] = frozenset()
    own_sizes: bool = False


# The command line


def command(line: str, folder: Path, *more: str) -> None:
    """Run a command here; `RefusedError` for an error that is told in one line, AssertionError for any other."""
    from typer.testing import CliRunner

    from blt_kernels.cli import app

    args = [word.replace("FOLDER", str(folder)) for word in shlex.split(line)]
    sys.argv = ["blt-kernels"]
    result = CliRunner().invoke(app, [*args, *more], prog_name="blt-kernels")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 0:
        return
    told = result.stderr.splitlines()
    last = re.sub(r"\s+", " ", told[-1] if told else "")
    if result.exit_code not in (1, 2) or not last.startswith(f"blt-kernels {args[0]}: ") or not last.isprintable():
        raise AssertionError(f"exit code {result.exit_code}, and on stderr {result.stderr[-300:]!r}")
    raise RefusedError(last)


def _drawn(folder: Path, choices: list[str]) -> str:
    """Draw a command by the content of the files, so that a case is the same again."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return random.Random(size).choice(choices)


def cli_model(folder: Path) -> None:
    (folder.parent / "text").write_bytes(valid.TEXT)
    commands = [
        f"eval FOLDER/model.safetensors {folder.parent}/text --batch-bytes 64 --context 32",
        f"patch {folder.parent}/text --model FOLDER/model.safetensors",
        "generate --model FOLDER/model.safetensors --prompt abc --max-new-bytes 4",
        f"flops FOLDER/model.safetensors --measure --text {folder.parent}/text --context 32",
    ]
    command(_drawn(folder, commands), folder)


def cli_resume(folder: Path) -> None:
    try:
        loop.train(valid.training(folder, steps=3))
    except ValueError as error:
        if str(error).startswith(("paths:", "out:", "steps:", "learning_rate:")):
            raise ValueError(f"{folder}: {error}") from error
        raise


def cli_patch(folder: Path) -> None:
    schemes = ["entropy", "space", "static", "byte", "delimiter", "entropy --target-size 4", "topk", "entropy --json"]
    command(f"patch {_drawn(folder, schemes).join(('--scheme ', ''))} FOLDER/text", folder)


def save_text(folder: Path) -> None:
    (folder / "text").write_bytes(valid.TEXT)


def save_settings(folder: Path) -> None:
    values = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16, "window": 8}
    (folder / "set.json").write_text(json.dumps(values))


def cli_settings(folder: Path) -> None:
    """Give every field of a JSON object to ``train --set``."""
    from blt_kernels.models.checkpoint.fields import Values

    settings = Values.read(folder / "set.json")
    (folder.parent / "text").write_bytes(valid.TEXT)
    options = f"{folder.parent}/text --out FOLDER/run --steps 1 --batch-bytes 64 --context 16 --heldout 0"
    words = [
        "--no-tensorboard",
        *(f"--set={key}={json.dumps(value)}" for key, value in settings.items() if "\0" not in key),
    ]
    try:
        command(f"train entropy {options}", folder, *(word.encode(errors="replace").decode() for word in words))
    except RefusedError as refusal:
        raise RefusedError(f"{refusal} {folder}") from None


LOADERS: dict[str, Loader] = {
    "ByteLM": Loader(valid.save_lm, lambda folder: load_model(folder / "model.safetensors"), valid.run_model),
    "BLT": Loader(valid.save_blt, lambda folder: load_model(folder / "model.safetensors"), valid.run_model),
    "MegaByte": Loader(valid.save_megabyte, lambda folder: load_model(folder / "model.safetensors"), valid.run_model),
    "entropy model": Loader(valid.save_blt, lambda folder: load_patcher(folder / "model.safetensors"), valid.run_model),
    "transformers": Loader(valid.save_transformers, load_model, valid.run_model),
    "transformers, shards": Loader(valid.save_shards, load_model, valid.run_model),
    "transformers, patcher": Loader(valid.save_transformers_patcher, load_patcher, valid.run_model),
    "bytelatent, .pth": Loader(valid.save_bytelatent, load_model, valid.run_model),
    "bytelatent, old .pth": Loader(
        lambda folder: valid.save_bytelatent(folder, legacy=True), load_model, valid.run_model
    ),
    "bytelatent, hub": Loader(lambda folder: valid.save_bytelatent(folder, hub=True), load_model, valid.run_model),
    "hub cache": Loader(  # its refs are read by huggingface_hub, however long
        valid.save_hub_cache, valid.load_hub_cache, valid.run_model, without=frozenset(("sparse",))
    ),
    "Llama": Loader(valid.save_llama, valid.load_llama),
    "train --init-global": Loader(valid.save_llama, valid.begin_as_llama),
    "train --init": Loader(valid.save_lm, valid.begin_as_lm),
    "train --patcher": Loader(valid.save_transformers_patcher, valid.begin_with_patcher),
    "checkpoint": Loader(valid.save_checkpoint, valid.load_checkpoint),
    "resumed training": Loader(valid.save_run, cli_resume),
    "stored patches": Loader(valid.save_patches, valid.load_patches),
    "patch --save": Loader(valid.resume_unfinished, valid.resume_patches),
    "log": Loader(valid.save_log, valid.load_log, valid.draw_log),
    "tokenizer": Loader(valid.save_tokenizer, valid.load_tokenizer),
    "texts": Loader(valid.save_texts, valid.load_texts, without=frozenset(("sparse",))),
    "CSV": Loader(valid.save_table, valid.load_table, without=PLACES),
    "blt-kernels MODEL": Loader(valid.save_lm, cli_model),
    "blt-kernels flops DIR": Loader(valid.save_transformers, lambda folder: command("flops FOLDER", folder)),
    "blt-kernels patch FILE": Loader(save_text, cli_patch, without=PLACES),
    "train --set": Loader(save_settings, cli_settings, own_sizes=True),
}
