"""Training and stored patches that are killed, or meet a full disk, at moments drawn by chance.

Each test takes a few moments. ``FAULTS=20 pytest tests/tools/test_train_faults.py`` takes 20 of each kind, and
``FAULTS_SEED=1`` others. What a command leaves is compared with what the same command leaves that met no fault.
"""

from __future__ import annotations

import bisect
import heapq
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import string
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fault_driver import Command, Ended, Fault, Launcher
from tiers import slow, slow_unless

from blt_kernels.train import log as train_log
from blt_kernels.train import state as train_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

MOMENTS = int(os.environ.get("FAULTS", "0"))
MOUNTS = MOMENTS and os.geteuid() == 0
SEED = os.environ.get("FAULTS_SEED", "0")
STEPS, EVERY, KEEP = 24, 5, 2
MODEL = "blt" if MOMENTS else "entropy"  # the first has more to store, the second one is faster
LOCAL = {"dim": 16, "num_layers": 1, "num_heads": 1, "ffn_dim": 16, "window": 16}
MODELS: dict[str, dict[str, Any]] = {
    "entropy": LOCAL,
    "blt": {
        "encoder": LOCAL,
        "global_transformer": {"dim": 32, "num_layers": 1, "num_heads": 1, "ffn_dim": 32},
        "decoder": LOCAL,
        "ngram_vocab": 16,
        "patching": "space",
    },
}
Whole = Callable[[str], tuple["Left", Ended]]
TIMED = ("bytes_per_second", "seconds")  # these fields of a log depend on the machine


def moments(kind: str, few: int) -> random.Random:
    """Return the random numbers of a test, whose attribute `count` says how many moments it draws."""
    chance = random.Random(f"{SEED} {kind}")
    chance.count = MOMENTS or few  # type: ignore[attr-defined]
    return chance


@dataclass(frozen=True)
class Left:
    """Holds the files and losses of a finished run."""

    out: Path
    model: bytes
    log: list[dict[str, Any]]
    names: set[str]

    @classmethod
    def of(cls, out: Path) -> Left:
        log = [{k: v for k, v in line.items() if k not in TIMED} for line in train_log.read_log(out / "log.jsonl")]
        names = {str(path.relative_to(out)) for path in out.rglob("*") if "tfevents" not in path.name}
        return cls(out, (out / "model.safetensors").read_bytes(), log, names)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    """Return what starts commands."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the beginnings of sources of the standard library."""
    root = tmp_path_factory.mktemp("corpus")
    for module in (bisect, heapq, shlex, stat, string, textwrap):
        (root / f"{module.__name__}.py").write_bytes(Path(module.__file__).read_bytes()[:2500])
    return root


def train(corpus: Path, out: Path, model: str = "blt", *more: str) -> list[str]:
    sizes = [f"--steps={STEPS}", f"--checkpoint-every={EVERY}", f"--keep={KEEP}", "--batch-bytes=256", "--context=128"]
    rest = ["--warmup=2", "--eval-every=5", "--heldout=0.3", f"--out={out}"]
    fields = [f"--set={key}={json.dumps(value)}" for key, value in MODELS[model].items()]
    return ["train", model, str(corpus), *sizes, *rest, *fields, *more]


@pytest.fixture(scope="module")
def whole(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a function of a model: what its run leaves without a fault, and how that ends."""
    root = tmp_path_factory.mktemp("whole")

    @cache
    def run(model: str) -> tuple[Left, Ended]:
        ended = launcher.run(Command(train(corpus, root / model, model), root / "trace", Fault(str(root / model))))
        assert ended.code == 0, ended.stderr
        return Left.of(root / model), ended

    return run


def check_resumed(launcher: Launcher, command: Command, out: Path, before: list[int], expected: Left) -> None:
    """Run a command that met a fault again: it loses less than an interval, and leaves what the other left."""
    checkpoint = train_state.latest(out / "checkpoint")
    step = int(checkpoint.name) if checkpoint else 0
    ended = launcher.run(Command(command.words, command.trace))
    assert ended.code == 0, ended.stderr
    assert ended.steps == list(range(step + 1, STEPS + 1))
    assert (before[-1] if before else 0) - step < EVERY
    left = Left.of(out)
    assert left.names == expected.names
    assert left.log == expected.log
    assert left.model == expected.model


# --- killed -----------------------------------------------------------------------------------------------------------

CODES = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "cut": -signal.SIGXFSZ}


def check_told(action: str, ended: Ended, out: Path) -> None:
    """Check that the error output says how the run goes on, in few lines and without a traceback."""
    assert ended.code == CODES[action], ended.stderr
    assert "Traceback" not in ended.stderr
    checkpoint = train_state.latest(out / "checkpoint")
    if action in ("SIGTERM", "SIGINT") and ended.steps and ended.steps[-1] < STEPS:
        expected = f"goes on from step {checkpoint.name}"
        assert expected in ended.stderr


@pytest.mark.parametrize(
    ("model", "action"),
    list(product(MODELS, CODES))
    if MOMENTS
    else [
        ("entropy", "SIGKILL"),
        ("entropy", "SIGTERM"),
        *(slow("blt", action) for action in ("SIGKILL", "SIGINT", "cut")),
    ],
)
def test_killed_at_an_event(
    model: str, action: str, launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path
) -> None:
    """The process dies at an event of the file system in the folder of its run, or while a file grows."""
    expected, ended = whole(model)
    chance = moments(f"event {model} {action}", 1)
    for number in range(chance.count):
        out = tmp_path / str(number)
        at, size = chance.randrange(1, len(ended.events) + 1), chance.randrange(1, 30000)
        command = Command(train(corpus, out, model), tmp_path / "trace", Fault(str(out), at, action, size))
        killed = launcher.run(command)
        if killed.code == 0:  # no file grew beyond the limit, or a thread that saved the last checkpoint got the signal
            last = next(i for i, event in enumerate(ended.events, 1) if f"checkpoint/{STEPS}" in event)
            assert action == "cut" or (action == "SIGINT" and at >= last and killed.steps == ended.steps)
            continue
        check_told(action, killed, out)
        check_resumed(launcher, command, out, killed.steps, expected)
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["SIGKILL", "SIGTERM", "SIGINT"] if MOMENTS else ["SIGTERM"])
def test_killed_at_a_time(action: str, launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path) -> None:
    expected, ended = whole(MODEL)
    chance = moments(f"time {action}", 1)
    for number in range(chance.count):
        out = tmp_path / str(number)
        command = Command(train(corpus, out, MODEL), tmp_path / "trace")
        pid = launcher.start(command)
        time.sleep(chance.uniform(0.05, ended.seconds))
        os.kill(pid, getattr(signal, action))
        killed = launcher.wait(pid)
        if killed.code == 0:
            continue
        if out.exists():
            check_told(action, killed, out)
        check_resumed(launcher, command, out, killed.steps, expected)
        shutil.rmtree(out)


# --- a full disk, and other errors of the file system -----------------------------------------------------------------

FAILURES = {
    "full": "No space left on device",
    "limit": "File too large",
    "EROFS": "Read-only file system",
    "EIO": "Input/output error",
    "EACCES": "Permission denied",
}


@pytest.mark.parametrize("action", slow_unless(FAILURES if MOMENTS else ["full", "limit", "EIO"], {"full"}))
def test_a_disk_that_fails(action: str, launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path) -> None:
    """The disk is full from an event on, or one event fails. The run ends with the file and the reason."""
    expected, ended = whole(MODEL)
    chance = moments(f"disk {MODEL} {action}", 1)
    renames = [at for at, event in enumerate(ended.events, 1) if event.startswith("os.rename checkpoint")]
    for number in range(chance.count):
        out = tmp_path / str(number)
        at, size = chance.randrange(1, len(ended.events) + 1), chance.randrange(1, 5000)
        if action == "full" and number == 0:  # while a checkpoint becomes complete
            at = chance.choice(renames)
        command = Command(train(corpus, out, MODEL), tmp_path / "trace", Fault(str(out), at, action, size))
        failed = launcher.run(command)
        where = f"{ended.events[at - 1]}: {failed.stderr}"
        # The thread of TensorBoard prints its own.
        assert "Traceback" not in failed.stderr or "record_writer.py" in failed.stderr, where
        if failed.code != 0:  # what only tidies up may fail
            assert failed.code == 1, where
            *_, last = failed.stderr.splitlines()
            assert last.startswith("blt-kernels train: "), where
            assert FAILURES[action] in last, where
            assert re.search(r"/\S*: ", last), where
            if failed.steps and failed.steps[-1] < STEPS:
                assert "the same command goes on from step" in failed.stderr
        check_resumed(launcher, command, out, failed.steps, expected)
        shutil.rmtree(out)


@pytest.mark.skipif(not MOUNTS, reason="mounts a small disk, for which FAULTS has to be set and root")
def test_a_small_disk(launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path) -> None:
    """A disk with no room for the whole run, which gets larger then."""
    expected, _ = whole(MODEL)
    chance, out = moments("small disk", 2), tmp_path / "disk" / "run"
    out.parent.mkdir()
    for _ in range(chance.count):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={chance.randrange(8, 640)}k", "tmpfs", str(out.parent)]
        subprocess.run(mount, check=True)
        try:
            command = Command(train(corpus, out, MODEL), tmp_path / "trace")
            failed = launcher.run(command)
            if failed.code:
                assert failed.code == 1
                assert "Traceback" not in failed.stderr
                assert "No space left on device" in failed.stderr.splitlines()[-1]
            subprocess.run(["mount", "-o", "remount,size=64m", str(out.parent)], check=True)
            check_resumed(launcher, command, out, failed.steps, expected)
        finally:
            subprocess.run(["umount", str(out.parent)], check=True)


# --- two ranks --------------------------------------------------------------------------------------------------------

KILLED = {"first": [0], "second": [1], "both": [0, 1]}
PARALLEL = {"ddp": (), "tables": ("--shard-tables",), "fsdp": ("--parallel=fsdp",)}


def start_ranks(launcher: Launcher, words: list[str], trace: Path, faults: dict[int, Fault]) -> list[int]:
    """Start two ranks as torchrun does, without its agent, which would end the other rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["TORCHELASTIC_RUN_ID"] = "faults"
    return [
        launcher.start(
            Command(
                words,
                trace.with_name(f"{trace.name}-{rank}"),
                faults.get(rank, Fault()),
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                finalize=True,
            )
        )
        for rank in range(2)
    ]


def same_losses(one: Left, other: Left) -> None:
    """A run on two ranks has the losses of one on one rank, to rounding, and leaves the same files."""
    assert {name for name in one.names if "/__1_" not in name} == other.names
    assert [line["step"] for line in one.log] == [line["step"] for line in other.log]
    for a, b in zip(one.log, other.log, strict=True):
        assert a == {key: pytest.approx(value, rel=2e-6) for key, value in b.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "killed"),
    list(product(PARALLEL, KILLED)) if MOMENTS else [("ddp", "second"), ("fsdp", "first")],
)
def test_ranks_are_killed(
    name: str, killed: str, launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path
) -> None:
    """One is killed at an event or at a time. The other one ends by itself, soon, and says what has happened."""
    expected, ended = whole("blt")
    events = [len(ended.events), 18]  # the second rank writes only its part of each checkpoint
    chance = moments(f"ranks {name} {killed}", 1)
    victims = KILLED[killed]
    for number in range(chance.count):
        out, faults = tmp_path / str(number), {}
        if number % 2 == 0:
            for rank in victims:
                at = chance.randrange(1, events[rank] + 1)
                faults[rank] = Fault(str(out), at, chance.choice(["SIGKILL", "SIGTERM", "SIGKILL", "SIGINT"]))
        words = train(corpus, out, "blt", *PARALLEL[name])
        pids = start_ranks(launcher, words, tmp_path / "trace", faults)
        if not faults:
            time.sleep(chance.uniform(0.1, 2 * ended.seconds))
            for rank in victims:
                os.kill(pids[rank], signal.SIGKILL)
        finished = [launcher.wait(pid, 30) for pid in pids]
        told = f"{faults}: {[each.code for each in finished]}: {finished[0].stderr}{finished[1].stderr}"
        assert not any("Traceback" in each.stderr for each in finished), told
        other = finished[1 - victims[0]]
        if killed != "both" and other.code != 0:
            interrupted = faults and faults[victims[0]].action == "SIGINT"  # the ranks tell each other while they save
            assert other.code == 1 or interrupted, told
            assert "has lost another rank" in other.stderr or interrupted, told
        checkpoint = train_state.latest(out / "checkpoint")
        step, before = int(checkpoint.name) if checkpoint else 0, finished[0].steps
        assert (before[-1] if before else 0) - step < EVERY
        again = [launcher.wait(pid) for pid in start_ranks(launcher, words, tmp_path / "trace", {})]
        assert [each.code for each in again] == [0, 0], told + again[0].stderr + again[1].stderr
        assert again[0].steps == list(range(step + 1, STEPS + 1))
        same_losses(Left.of(out), expected)
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1] if MOMENTS else [1])
def test_a_full_disk_of_a_rank(rank: int, launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", moments(f"full rank {rank}", 1)
    for _ in range(chance.count):
        words = train(corpus, out, "blt", "--parallel=fsdp")
        fault = Fault(str(out), chance.randrange(1, [90, 20][rank]), "full")
        pids = start_ranks(launcher, words, tmp_path / "trace", {rank: fault})
        failed = [launcher.wait(pid, 30) for pid in pids]
        told = f"{fault}: {failed[0].stderr}{failed[1].stderr}"
        assert [each.code for each in failed] == [1, 1], told
        assert not any("Traceback" in each.stderr for each in failed), told
        assert "No space left on device" in failed[rank].stderr, told
        again = [launcher.wait(pid) for pid in start_ranks(launcher, words, tmp_path / "trace", {})]
        assert [each.code for each in again] == [0, 0], told + again[0].stderr + again[1].stderr
        assert not [path for path in out.rglob("*") if "part" in path.name or "tmp" in path.name]
        shutil.rmtree(out)


# --- stored patches ---------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_patches(corpus: Path, folder: Path, model: Path, processes: int = 1) -> list[str]:
    options = [f"--model={model}", "--context=100", f"--processes={processes}"]
    return ["patch", f"--save={folder}", str(corpus), *options]


@pytest.mark.parametrize(
    ("action", "processes"),
    list(product([*CODES, *FAILURES], [1, 2]))
    if MOMENTS
    else [
        ("SIGKILL", 1),
        *(slow(action, 1) for action in ("SIGTERM", "cut", "full", "limit", "EIO")),
        slow("SIGTERM", 2),
    ],
)
def test_storing_patches(
    action: str, processes: int, launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path
) -> None:
    """It goes on where it was, and ends in the same folder."""
    model = whole("entropy")[0].out / "model.safetensors"
    folder = tmp_path / "whole"
    ended = launcher.run(Command(save_patches(corpus, folder, model), tmp_path / "trace", Fault(str(folder))))
    assert ended.code == 0, ended.stderr
    expected = contents(folder)
    assert expected.keys() == {"index.json", "patches.bits", "lock"}
    chance = moments(f"patches {action} {processes}", 1)
    for number in range(chance.count):
        folder = tmp_path / str(number)
        at, size = chance.randrange(1, len(ended.events) + 1), chance.randrange(1, 2000)
        fault = Fault(str(folder), at, action, size)
        command = Command(save_patches(corpus, folder, model, processes), tmp_path / "trace", fault)
        failed = launcher.run(command)
        told = f"{ended.events[at - 1]}: {failed.stderr}"
        assert "Traceback" not in failed.stderr, told
        assert failed.code in ((0, CODES[action]) if action in CODES else (0, 1)), told
        if failed.code == 1:
            assert re.search(f"^blt-kernels patch: .*/.*: {FAILURES[action]}$", failed.stderr, re.MULTILINE), told
        if failed.code in (1, 143, 130) and (folder / "done").exists() and (folder / "done").stat().st_size:
            assert "and the same command goes on from there" in failed.stderr, told
        again = launcher.run(Command(save_patches(corpus, folder, model), tmp_path / "trace"))
        assert again.code == 0, told + again.stderr
        assert contents(folder) == expected, told
        shutil.rmtree(folder)


# --- order, and other processes ---------------------------------------------------------------------------------------


def test_the_order_on_the_disk(whole: Whole) -> None:
    """A checkpoint and its folders are on the disk before an older one goes; so are the lines of the log before it."""
    events = whole("entropy")[1].events
    ends = [i for i, event in enumerate(events) if event.endswith("/.metadata") and event.startswith("os.rename")]
    assert len(ends) == 6
    for end in ends:
        step = events[end].split("/")[1]
        assert events[end + 1 : end + 5] == [
            f"fsync checkpoint/{step}",
            f"fsynced checkpoint/{step}",
            "fsync checkpoint",
            "fsynced checkpoint",
        ]
        begin = events.index(f"open checkpoint/{step}/values.json")
        if step != "0":
            before = [event for event in events[:begin] if "log.jsonl" in event]
            assert before[-2:] == ["fsync log.jsonl", "fsynced log.jsonl"]
        for name in ("values.json", "__0_0.distcp", ".metadata.tmp"):
            assert f"fsynced checkpoint/{step}/{name}" in events[begin:end]
    removed = [i for i, event in enumerate(events) if event.startswith("os.remove checkpoint") and ".metadata" in event]
    assert all(any(end + 4 < i for end in ends[KEEP:]) for i in removed)
    for name in ("model.safetensors", "loss.png"):
        where = [event for event in events if name in event]
        kinds = [event.split()[0] for event in where]
        assert kinds[kinds.index("fsync") :] == ["fsync", "fsynced", "os.rename", "os.rmdir"]


@pytest.mark.slow
def test_two_runs_in_one_folder(launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path) -> None:
    """One of them is told, by whatever name of the folder, and the other one goes on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    traces = [tmp_path / "one", tmp_path / "two"]
    names = [tmp_path / "run", tmp_path / "link"]
    pids = [
        launcher.start(Command(train(corpus, *each), trace))
        for each, trace in zip(((name, "entropy") for name in names), traces, strict=True)
    ]
    ended = [launcher.wait(pid) for pid in pids]
    assert sorted(each.code for each in ended) == [0, 1]
    (refused,) = (each for each in ended if each.code)
    assert "another process is writing to" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    left, expected = Left.of(tmp_path / "run"), whole("entropy")[0]
    assert (left.model, left.log, left.names) == (expected.model, expected.log, expected.names)


@pytest.mark.slow
def test_links_and_the_clock(launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path) -> None:
    """The run and its checkpoints are links to another place. The clock goes back by a day, then by two."""
    expected, ended = whole("entropy")
    for name in ("disk", "checkpoints"):
        (tmp_path / name).mkdir()
    out = tmp_path / "run"
    out.symlink_to("disk")
    (out / "checkpoint").symlink_to(tmp_path / "checkpoints")
    words = train(corpus, out, "entropy")
    pid = launcher.start(Command(words, tmp_path / "trace", Fault(str(out), 30, "clock", 86400)))
    time.sleep(ended.seconds / 2)
    os.kill(pid, signal.SIGKILL)
    launcher.wait(pid)
    again = launcher.run(Command(words, tmp_path / "trace", Fault(str(out), 5, "clock", 2 * 86400)))
    assert again.code == 0, again.stderr
    left = Left.of(out)
    assert (left.model, left.log) == (expected.model, expected.log)
    assert out.is_symlink()
    assert (out / "checkpoint").is_symlink()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"20", "24"}


@pytest.mark.slow
def test_files_that_go_while_a_run_resumes(launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path) -> None:
    """A file of the newest checkpoint is removed before or while it is read. Without it the run ends as all others."""
    expected, _ = whole("entropy")
    words, begun = train(corpus, tmp_path / "run", "entropy"), tmp_path / "begun"
    killed = launcher.run(Command(words, tmp_path / "trace", Fault(str(tmp_path / "run"), 70, "SIGKILL")))
    assert killed.code == -9
    (tmp_path / "run").rename(begun)
    newest = train_state.latest(begun / "checkpoint")
    chance, out = moments("lose", 1), tmp_path / "run"
    for name in [path.name for path in newest.iterdir()]:
        for _ in range(chance.count):
            shutil.copytree(begun, out, symlinks=True)
            victim = out / "checkpoint" / newest.name / name
            fault = Fault(str(out), chance.randrange(1, 9), "lose", victim=str(victim))
            lost = launcher.run(Command(words, tmp_path / "trace", fault))
            told = f"{fault}: {lost.stderr}"
            assert not victim.exists() or lost.code == 0, told
            assert "Traceback" not in lost.stderr, told
            if lost.code:
                assert lost.code == 1
                assert str(victim.parent) in lost.stderr, told
                shutil.rmtree(victim.parent)  # as the message says
                again = launcher.run(Command(words, tmp_path / "trace"))
                assert again.code == 0, told + again.stderr
            left = Left.of(out)
            assert (left.model, left.log, left.names) == (expected.model, expected.log, expected.names), told
            shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["/dev/full", "pipe"])
def test_output_that_goes_nowhere(stdout: str, launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path) -> None:
    """A full disk under standard output is told; a pipe that nobody reads is no error to tell."""
    expected, _ = whole("entropy")
    model, text = str(expected.out / "model.safetensors"), str(corpus / "heapq.py")
    for words in (
        ["generate", f"--model={model}", "--prompt=def ", "--max-new-bytes=20"],
        ["generate", f"--model={model}", "--prompt=def ", "--max-new-bytes=20", "--json"],
        ["eval", model, str(corpus), "--context=128"],
        ["eval", model, str(corpus), "--context=128", "--json"],
        ["patch", text, "--scheme=space"],
        ["patch", text, "--scheme=space", "--json"],
        ["flops"],
        save_patches(corpus, tmp_path / "patches", Path(model)),
        train(corpus, tmp_path / "run", "entropy"),
    ):
        ended = launcher.run(Command(words, tmp_path / "trace", stdout=stdout))
        told = f"{words[0]}: {ended.stderr}"
        assert ended.code == 1, told
        assert "Traceback" not in ended.stderr, told
        assert "Exception" not in ended.stderr, told
        assert ("No space left on device" in ended.stderr) == (stdout == "/dev/full"), told
    assert Left.of(tmp_path / "run").model == expected.model
    assert launcher.run(Command(words, tmp_path / "trace")).code == 0


@pytest.mark.slow
def test_a_checkpoint_of_another_version(launcher: Launcher, corpus: Path, whole: Whole, tmp_path: Path) -> None:
    """An older version had fewer options and fields. What a newer one has more is named."""
    expected, _ = whole("entropy")
    out = tmp_path / "run"
    words = train(corpus, out, "entropy")
    launcher.run(Command(words, tmp_path / "trace", Fault(str(out), 70, "SIGKILL")))
    path = train_state.latest(out / "checkpoint") / "values.json"
    values = json.loads(path.read_text())
    for change, message in (
        ({"format": 2}, r"values.json: expected format 1, got 2: another version of blt-kernels wrote it"),
        ({"options": {**values["options"], "muon": 1}}, "run by another version of blt-kernels, with the option muon"),
        ({"config": {**values["config"], "experts": 4}}, "model of another version of blt-kernels: .*experts"),
    ):
        path.write_text(json.dumps({**values, **change}))
        refused = launcher.run(Command(words, tmp_path / "trace"))
        assert refused.code == 1
        assert re.search(message, refused.stderr), refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    del (
        values["format"],
        values["options"]["clip"],
        values["config"]["dropout" if "dropout" in values["config"] else "rope_theta"],
    )
    path.write_text(json.dumps(values))
    again = launcher.run(Command(words, tmp_path / "trace"))
    assert again.code == 0, again.stderr
    assert Left.of(out).model == expected.model
