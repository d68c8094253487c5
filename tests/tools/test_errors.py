"""Errors that a user can cause are told in one line that names the option and its value, and nothing is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import blt_kernels as bk
from blt_kernels.cli import app, demo
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig
from blt_kernels.nn import TransformerConfig
from blt_kernels.train import log as train_log
from blt_kernels.train import loop
from blt_kernels.train.config import TrainConfig

TINY = {"dim": 16, "num_layers": 1, "num_heads": 1, "ffn_dim": 16, "window": 16}
SET = [f"--set={name}={value}" for name, value in TINY.items()]
# This is a training run of one step.
QUICK = ["--steps=1", "--batch-bytes=64", "--context=16", "--heldout=0", "--no-tensorboard"]
ENTROPY = f"train entropy text --out run {' '.join([*SET, *QUICK])}"
BLT_SPACE = f'train blt text --out run {" ".join(QUICK)} --set patching="space" --set ngram_vocab=16'
HUGE = 1 << 63


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make models, damaged ones, texts and directories."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    layers = TransformerConfig(16, 1, 1, ffn_dim=16, window=16)
    model = ByteLM(ByteLMConfig(**TINY))
    model.save(folder / "lm.safetensors")
    BLT(BLTConfig(layers, layers, layers, None, ngram_vocab=16, patching="space")).save(folder / "blt.safetensors")
    MegaByte(MegaByteConfig(2, layers, layers)).save(folder / "megabyte.safetensors")
    whole = (folder / "lm.safetensors").read_bytes()
    for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / f"cut{size * 100 // len(whole)}-{size}.safetensors").write_bytes(whole[:size])
    (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 4)
    for name, content in {"bad": "{", "list": "[]", "bytes": "\xff", "nothing": "{}"}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(content.encode("latin1"))
    (folder / "text").write_bytes(b"hello world, it was the best of times\n" * 4)
    (folder / "empty").touch()
    for name in ("folder", "d.png", "d.html", "d.csv"):
        (folder / name).mkdir()
    (folder / "other.csv").write_text("a,b\n1,2\n")
    return folder


@pytest.fixture(autouse=True)
def _there(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLT_KERNELS_TRACEBACK", raising=False)
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), prog_name="blt-kernels")


def fails(args: list[str], expected: str) -> None:
    result = run(*args)
    told = result.stderr.splitlines()
    assert isinstance(result.exception, SystemExit), (result.exception, told)
    assert result.exit_code in (1, 2)
    assert len(told) == 1, told
    assert told[0].startswith(f"blt-kernels {args[0]}: ")
    assert re.search(expected, told[0]), told[0]


NUMBERS = {  # these values are out of range for each kind of option
    "count": ("0", "-1", "x", "1.5", "nan", f"{HUGE}", f"-{HUGE}", "1" + "0" * 400, ""),
    "not negative": ("-1", "x", "1.5", "nan", f"{HUGE}", f"-{HUGE}", ""),
    "ids": ("0", "1", "-1", "x", f"{HUGE}", ""),
    "positive": ("0", "-1", "nan", "inf", "-inf", "1e400", "x", ""),
    "finite": ("nan", "inf", "-inf", "1e400", "x", ""),
    "not below 0": ("-1", "nan", "inf", "-inf", "x", ""),
    "fraction": ("-0.1", "1.1", "nan", "inf", "x", ""),
    "mean": ("0", "0.9", "-1", "nan", "inf", "x", ""),
    "device": ("", "x", "gpu", "mps", "meta", "cpu:1", "cuda:x", "cuda:999", "cuda:-1", "xla"),
}
OPTIONS = {
    "patch text --scheme byte": {"start": "not negative", "length": "count", "max-show": "not negative"},
    "patch text --scheme static": {"patch-size": "count"},
    "patch text": {
        "threshold": "finite",
        "threshold-add": "finite",
        "target-size": "mean",
        "max-patch-length": "count",
    },
    "patch text --scheme byte --save stored": {"context": "ids", "processes": "count", "device": "device"},
    "demo text": {"rounds": "count"},
    "bench patch_pool --small --no-save": {
        "rounds": "count",
        "threads": "count",
        "budget": "not below 0",
        "device": "device",
    },
    ENTROPY: {
        "seed": "not negative",
        "steps": "count",
        "batch-bytes": "ids",
        "context": "ids",
        "learning-rate": "positive",
        "final-learning-rate": "not below 0",
        "warmup": "not negative",
        "accumulate": "count",
        "checkpoint-every": "count",
        "checkpoint-seconds": "not below 0",
        "keep": "count",
        "heldout": "fraction",
        "device": "device",
    },
    f"{ENTROPY} --heldout=0.1": {"patch-size": "mean", "eval-every": "count", "eval-bytes": "count"},
    BLT_SPACE: {"global-learning-rate": "positive"},
    "eval lm.safetensors text": {"batch-bytes": "ids", "context": "ids", "device": "device"},
    "eval lm.safetensors text --split train": {"heldout": "fraction"},
    "flops 400M": {"context": "count", "window": "count", "patch-sizes": "mean"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "option", "kind"),
    [(command, option, kind) for command, options in OPTIONS.items() for option, kind in options.items()],
)
def test_numbers_and_devices(command: str, option: str, kind: str) -> None:
    for value in NUMBERS[kind]:
        fails([*command.split(), f"--{option}={value}"], f"--{option}\\b.*{re.escape(value[:10])}|--{option}.* inf")
    assert not Path("run", "checkpoint").exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        # These paths are missing, or something else.
        ("patch folder --scheme byte", "folder: Is a directory"),
        ("patch text/x --scheme byte", "text/x: Not a directory"),
        ("patch text --plot d.png --scheme byte", "--plot d.png: expected a file, got a directory"),
        ("patch text --html d.html --scheme byte", "--html d.html: expected a file, got a directory"),
        ("patch text --html /proc/x.html --scheme byte", "--html /proc/x.html: No such file or directory"),
        ("demo empty", "FILE empty: expected at least one byte"),
        ("demo folder", "folder: Is a directory"),
        ("eval nowhere text", "CHECKPOINT: .*nowhere"),
        ("eval folder text", "CHECKPOINT: folder: expected config.json"),
        ("eval lm.safetensors nowhere", "PATH: no such file or directory: nowhere"),
        ("eval lm.safetensors folder", "PATH: no files to read in folder"),
        ("eval lm.safetensors empty", "PATH: no files to read in empty"),
        ("eval lm.safetensors /dev/zero", "PATH: expected a file or a directory, got /dev/zero"),
        ("train entropy nowhere --out run", "PATH: no such file or directory: nowhere"),
        (f"{ENTROPY} --out text", "--out: expected a directory, or a place for one, got text"),
        (f"{ENTROPY} --out text/run", "--out: expected a directory, or a place for one, got text/run: Not a directory"),
        (f"{ENTROPY} --out /proc/run", "--out: expected a directory, or a place for one, got /proc/run"),
        ("flops nowhere", "CONFIG: expected a file, a directory or one of .*'nowhere'"),
        ("flops folder", "CONFIG: folder: expected config.json"),
        ("flops blt-small --measure --text nowhere", "--text: no such file or directory: nowhere"),
        ("bench nothing", "OP: expected some of .*'nothing'"),
        ("bench patch_pool --small --csv d.csv", "--csv: expected a file, got the directory d.csv"),
        ("bench patch_pool --small --csv other.csv", "--csv: expected a table of measurements, got other.csv"),
        # These values are not among the choices.
        ("train gpt text", "MODEL: expected one of 'entropy', 'blt', 'megabyte', got 'gpt'"),
        (f"{ENTROPY} --preset big", "--preset: expected one of 'small', 'paper', got 'big'"),
        (f"{ENTROPY} --parallel dp", "--parallel: expected one of 'ddp', 'fsdp', got 'dp'"),
        ("eval lm.safetensors text --split half", "--split: expected one of 'all', 'heldout', 'train', got 'half'"),
        ("bench --threads 1,x", "--threads: expected numbers with commas, got '1,x'"),
        ("bench patch_pool --threads 4096", "--threads: expected 1 to 1024, got 4096"),
        ("flops --patch-sizes 4;5", "--patch-sizes: expected numbers with commas, got '4;5'"),
        # These options contradict each other, or change nothing.
        ("patch text --scheme byte --json --max-show 9", "--max-show: expected no --json beside it"),
        ("patch text --scheme byte --json --start 9", "--start: expected no --json beside it"),
        ("patch text --scheme byte --processes 2", "--processes: expected --save beside it"),
        ("eval lm.safetensors text --heldout 0.5", "--heldout: expected --split heldout or train beside it"),
        ("eval lm.safetensors text --seed 1", "--seed: expected --split heldout or train beside it"),
        ("eval lm.safetensors text --include *.py", "--include: expected a directory among the paths, got text"),
        ("eval lm.safetensors text --ngram", "--ngram: expected split='heldout'"),
        ("eval lm.safetensors text --strided", "--strided: expected a MegaByte, got a ByteLM in lm.safetensors"),
        ("eval lm.safetensors text --split train --heldout 1", "--split: no files on the 'train' side of 1 files"),
        (f"{ENTROPY} --patcher lm.safetensors", "--patcher: expected None, since model is 'entropy', got lm.saf"),
        (f"{ENTROPY} --shard-tables", "--shard-tables: expected False, since model is 'entropy', got True"),
        (f"{ENTROPY} --init-global folder", "--init-global: expected None, since model is 'entropy', got folder"),
        (f"{ENTROPY} --global-learning-rate 1", "--global-learning-rate: expected None, since model is 'entropy', got"),
        (f"{ENTROPY} --heldout 1", "--heldout: all of 1 files are held out at 1.0"),
        (f"{ENTROPY} --eval-every 5", "--eval-every: expected --heldout above 0"),
        (f"{ENTROPY} --include *.py", "--include: expected a directory among the paths, got text"),
        (f"{BLT_SPACE} --patch-size 4", "--patch-size 4.0: expected the model entropy.*, got blt"),
        (f"{BLT_SPACE} --patcher lm.safetensors", "--patcher: expected None, since patching is 'space', got lm.saf"),
        ("flops 400M --text text", "--text: expected measure beside it, got text"),
        ("flops entropy --patch-sizes 4", "--patch-sizes: expected a configuration without a patch size of its own"),
        ("flops megabyte --window 4", "--window: expected a configuration with windows beside MegaByte's, got 4"),
        ("bench patch_pool --no-save --csv x.csv", "--csv: expected None, since nothing is saved, got x.csv"),
        # These are wrong fields of a configuration.
        (f"{ENTROPY} --set dim", "--set: expected KEY=JSON, got 'dim'"),
        (f"{ENTROPY} --set =1", "--set: expected KEY=JSON, got '=1'"),
        (f"{ENTROPY} --set dim=x", "--set: expected KEY=JSON, got 'dim=x'"),
        (f"{ENTROPY} --set nothing=1", "--set: config: expected the fields of ByteLMConfig, got nothing as well"),
        (f"{ENTROPY} --set dim=7", "--set: dim: expected a multiple of 2 .* got 7"),
        (f"{ENTROPY} --set dim=null", "--set: dim: expected an int, got None"),
        (f'{ENTROPY} --set dim="a"', "--set: dim: expected an int, got 'a'"),
        (f"{ENTROPY} --set dim={1 << 60}", "not enough memory|dim"),
        (f"{ENTROPY} --set num_heads=0", "--set: num_heads: .* got 0"),
        (f"{ENTROPY} --set num_kv_heads=-1", "--set: num_kv_heads: .* got -1"),
        (f"{ENTROPY} --set ffn_dim=1.5", "--set: ffn_dim: expected an int, got 1.5"),
        (f"{ENTROPY} --set ffn_dim=-1", "--set: ffn_dim: .* got -1"),
        (f"{ENTROPY} --set window=0", "--set: window: .* got 0"),
        (f"{ENTROPY} --set rope_theta=0", "--set: rope_theta: .* got 0"),
        (f"{ENTROPY} --set rope_theta=Infinity", "--set: rope_theta: expected a finite value > 0, got inf"),
        (f"{ENTROPY} --set rope_theta=NaN", "--set: rope_theta: .* got nan"),
        (f'{ENTROPY} --set norm_eps="a"', "--set: norm_eps: .* got 'a'"),
        (f'{ENTROPY} --set threshold="a"', "--set: threshold: .* got 'a'"),
        (f"{ENTROPY} --set split_documents=3", "--set: split_documents: .* got 3"),
        (f"{ENTROPY} --set rope_scaling=[1]", r"--set: rope_scaling: .* got \(1,\)"),
        (f"{ENTROPY} --set vocab_size=-1", "--set: vocab_size: .* got -1"),
        (f'{BLT_SPACE} --set patching="x"', "--set: patching: expected one of .* got 'x'"),
        (f"{BLT_SPACE} --set threshold_add=1", "--set: threshold_add: expected none, since patching 'space' does not"),
        (f"{BLT_SPACE} --set patcher=null", "--set: patcher: expected the option patcher"),
        (f"{BLT_SPACE} --parallel fsdp", "--parallel: expected torchrun, which starts several processes"),
        (f"{BLT_SPACE} --set encoder=1", "--set: encoder: .* got 1"),
        (f"{BLT_SPACE} --set ngram_sizes=[0]", r"--set: ngram_sizes: .* got (\(0,\)|0)"),
        (f"{BLT_SPACE} --set ngram_vocab=0", "--set: ngram_vocab: .* got 0"),
        (f"{BLT_SPACE} --set queries_per_patch=0", "--set: queries_per_patch: .* got 0"),
        (f"{BLT_SPACE} --set num_functions=99", "--set: num_functions: .* got 99"),
        (f"{BLT_SPACE} --set max_patch_length=0", "--set: max_patch_length: .* got 0"),
        (f"{BLT_SPACE} --set cross_attn_heads=0", "--set: cross_attn_heads: .* got 0"),
        (f"train megabyte text --out run {' '.join(QUICK)} --set patch_size=0", "--set: patch_size: .* got 0"),
        (f'train blt text --out run {" ".join(QUICK)} --set patching="bpe"', "--set patching: .* got 'bpe'"),
        # These are wrong models.
        (f"{ENTROPY} --init blt.safetensors", "--init: expected a ByteLM, .* got a BLT in blt.safetensors"),
        (f"train blt text --out run {' '.join(QUICK)} --patcher megabyte.safetensors", "--patcher: .*'MegaByte'"),
        (f"{BLT_SPACE} --init-global folder", "--init-global: folder: expected config.json"),
    ],
)
def test_command_lines(args: str, expected: str) -> None:
    fails(args.split(), expected)
    assert not Path("run", "checkpoint").exists()


@pytest.mark.parametrize("command", ["patch text --model", "eval", "flops", "train blt", "train entropy"])
def test_files_that_are_no_model(command: str, files: Path) -> None:
    option = {"patch text --model": "--model", "eval": "CHECKPOINT", "flops": "CONFIG"}.get(command, "--patcher")
    damaged = [file.name for file in files.iterdir() if file.name.startswith(("cut", "noise", "text", "empty"))]
    for name in sorted([*damaged, "bad", "list", "bytes", "nothing"]):
        args = [*command.split(), name, *(["text"] if command == "eval" else [])]
        if command.startswith("train"):
            option = "--init" if command.endswith("entropy") else "--patcher"
            args = [*command.split(), "text", "--out=run", *QUICK, f"{option}={name}"]
        if (command, name) != ("flops", "nothing"):
            fails(args, f"{option}.*{name}")


# --- a run whose files are damaged, or the user's ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = {"steps": 1, "batch_bytes": 64, "context": 16, "heldout": 0.0, "tensorboard": False, "overrides": TINY}
    loop.train(TrainConfig("entropy", [files / "text"], folder, **options))
    return folder


DAMAGES = {
    "values.json": (b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"options": 1, "step": "x"}'),
    ".metadata": (b"", b"x", b"\x80\x04.", b"cos\nnothing\n."),
    "__0_0.distcp": (b"", b"PK\x03\x04", b"x" * 1000),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint(name: str, trained: Path) -> None:
    shutil.copytree(trained, "run")
    file = Path("run/checkpoint/1", name)
    whole = file.read_bytes()
    half = [whole[: len(whole) // 2], whole[:-1]] if name != "values.json" else [whole[: len(whole) // 2]]
    for content in (*DAMAGES[name], *half):
        file.write_bytes(content)
        fails(ENTROPY.split(), "run/checkpoint/1.*damaged")
    file.unlink()
    if name not in (".metadata", "values.json"):  # a folder without one of these is no checkpoint
        fails(ENTROPY.split(), "run/checkpoint/1")
    else:
        fails(ENTROPY.split(), "--out: run holds the log of a run but no checkpoint")


def test_a_run_is_a_model(trained: Path) -> None:
    """Commands take the directory of a run for its model."""
    shutil.copytree(trained, "trained")
    assert run("eval", "trained", "text").exit_code == 0
    assert run("flops", "trained").exit_code == 0
    assert run("patch", "text", "--model", "trained").exit_code == 0
    result = run("train", "entropy", "text", "--out=run", "--init=trained", *QUICK)
    assert result.exit_code == 0, result.output


def test_a_damaged_log(trained: Path) -> None:
    shutil.copytree(trained, "run")
    for line in ("[]\n", "x\n", '{"step": "x"}\n', "\0\n"):
        Path("run/log.jsonl").write_text(line)
        fails(ENTROPY.split(), "log.jsonl: expected a JSON object with a step in line 1, got")
    Path("run/log.jsonl").write_text('{"step": 1}\n{"st')  # a kill has cut the log
    assert train_log.read_log(Path("run/log.jsonl")) == [{"step": 1}]


def test_folders_of_the_user_stay(files: Path) -> None:
    """They stay beside checkpoints and inside of them, whatever they are called."""
    kept = []
    for name in ("notes", "1.old", "01x", "-1", "7", "٣", "checkpoint"):
        for parent in (Path("run"), Path("run/checkpoint")):
            (parent / name).mkdir(parents=True, exist_ok=True)
            kept.append(parent / name / "mine.txt")
            kept[-1].write_text(name)
    for name in ("values.json", "data.distcp"):
        kept.append(Path("run/checkpoint/7", name))
        kept[-1].write_text("mine")
    Path("run/checkpoint/link").symlink_to(Path("folder").resolve())
    options = {"steps": 4, "checkpoint_every": 1, "batch_bytes": 64, "context": 16, "heldout": 0.0}
    for steps in (4, 6):
        config = TrainConfig("entropy", [Path("text")], Path("run"), overrides=TINY, **{**options, "steps": steps})
        loop.train(config)
        assert [file.exists() for file in kept] == [True] * len(kept)
        assert Path("run/checkpoint/link").is_symlink()
        ours = [path for path in Path("run/checkpoint").iterdir() if (path / ".metadata").exists()]
        assert [path.name for path in ours] == [str(steps)]


# --- processes, interruptions, bugs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE: expected torchrun, .* got '2' alone"),
        ({"RANK": "0"}, "RANK: expected torchrun, .* got '0' alone"),
        ({"TORCHELASTIC_RUN_ID": "1"}, "RANK: expected what torchrun sets, .* got None"),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "x"}, "RANK: expected what torchrun sets, .* got 'x'"),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE: expected what torchrun sets"),
        (
            {"TORCHELASTIC_RUN_ID": "1", "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
            "MASTER_ADDR: expected what torchrun sets",
        ),
    ],
)
def test_variables_of_torchrun_that_are_half_set(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fails(ENTROPY.split(), expected)


@pytest.mark.parametrize("error", [TypeError, KeyError, IndexError, AssertionError, AttributeError, RuntimeError])
def test_bugs_show_their_traceback(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise error("a bug")

    monkeypatch.setattr(demo, "load_entropy_model", broken)
    assert type(run("demo").exception) is error


def test_an_interruption_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_entropy_model", interrupted)
    result = run("demo")
    assert (result.exit_code, result.output) == (130, "")


def test_memory_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load_entropy_model", lambda *args, **options: torch.empty(1 << 60))
    fails(["demo"], "not enough memory for a model or batch of this size")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(bk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "blt_kernels", "patch", "text", "--scheme=byte"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "blt-kernels patch: standard output: No space left on device\n")
