"""Runs cases in child processes that are forked from this one, and judges each.

A case is the name of a loader and seeds, one for each mutation. The child limits its address space, resets the peak of
its memory before each case, and has an audit hook that notes what Python writes, starts or connects to.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fuzz.file_mutations import mutate
from fuzz.loaders import LOADERS, Loader, RefusedError
from fuzz.pickle_mutations import CANARY

SECONDS = 10.0  # CPU seconds after which a case hangs; one that only waits hangs after three seconds
MEMORY = 256 << 20  # bytes that a loader may take beside four times the size of its files
ADDRESS_SPACE = 4 << 30  # bytes beside what the process has when it starts
MESSAGE = 4000  # characters of the longest message
_READ_ONLY = os.O_RDONLY | os.O_CLOEXEC
_WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
_STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn", "socket.connect"}


@dataclass(frozen=True)
class Case:
    """A loader, and the seeds of the mutations of its files."""

    loader: str
    seeds: tuple[int, ...]

    @staticmethod
    def drawn(loader: str, seed: int) -> Case:
        """Return a case of one to three mutations."""
        draw = random.Random(f"{loader} {seed}")
        return Case(loader, tuple(draw.randrange(1 << 32) for _ in range(draw.choice((1, 1, 1, 2, 3)))))

    def __str__(self) -> str:
        return f"{self.loader}: {' '.join(map(str, self.seeds))}"


@dataclass(frozen=True)
class Outcome:
    """Holds the outcome of a case.

    `kind` is "accepted" or "refused", or what is wrong. Finds are told apart by `where`, the place in the code.
    """

    kind: str
    detail: str = ""
    where: str = ""
    mutations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak: int = 0

    @property
    def is_find(self) -> bool:
        return self.kind not in ("accepted", "refused")


class Files:
    """Valid files of every loader, made once, in a folder that is removed at the end."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.made: set[str] = set()

    def folder(self, loader: str) -> Path:
        """Return the folder of valid files of a loader."""
        folder = self.root / "valid" / loader
        if loader not in self.made:
            folder.mkdir(parents=True)
            LOADERS[loader].make(folder)
            self.made.add(loader)
        return folder

    def copy(self, loader: str, work: Path) -> Path:
        """Return a new copy of the valid files."""
        if work.exists():
            shutil.rmtree(work)
        shutil.copytree(self.folder(loader), work / "case", symlinks=True)
        return work / "case"

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def run(files: Files, cases: Sequence[Case]) -> Iterator[tuple[Case, Outcome]]:
    """Yield the outcome of each case. Another child goes on behind a case that kills or hangs one."""
    for case in cases:
        files.folder(case.loader)
    done = 0
    while done < len(cases):
        child = _Child(files, cases[done:])
        try:
            for outcome in child.outcomes():
                yield cases[done], outcome
                done += 1
        finally:
            child.end()


class _Child:
    """A forked process that runs cases and writes a line for each."""

    def __init__(self, files: Files, cases: Sequence[Case]) -> None:
        self.expected = len(cases)
        self.errors = files.root / "stderr"
        self.read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of the parent do not take part
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self.read)
            try:
                _child(files, cases, write, self.errors)
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(1)
        os.close(write)

    def outcomes(self) -> Iterator[Outcome]:
        """Yield outcomes, the last one being that of a case that did not end."""
        count, buffer = 0, b""
        began, waited, before = self._cpu(), 0, -1.0
        while count < self.expected:
            if not select.select([self.read], [], [], 1.0)[0]:
                used = self._cpu()
                waited, before = (waited + 1 if used == before else 0), used
                if waited >= 3 or used - began > SECONDS:
                    how = "waits without end" if waited >= 3 else f"no end within {SECONDS:g} s of CPU"
                    yield Outcome("hang", how, self._kill())
                    return
                continue
            received = os.read(self.read, 1 << 16)
            if not received:
                _, status = os.waitpid(self.pid, 0)
                self.pid = 0
                how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
                said = self.errors.read_text(errors="replace")[-4000:]
                yield Outcome("crash", f"{how}: {said[-400:]}", f"{how} {_own_place(said)}")
                return
            buffer += received
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                began, waited = self._cpu(), 0
                count += 1
                yield Outcome(**json.loads(line))

    def _cpu(self) -> float:
        """Return the CPU time of the child in seconds; a process that waits for a processor counts as busy."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        running = time.monotonic() * 1e-9 if fields[0] == "R" else 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + running

    def _kill(self) -> str:
        """End the child, and return where its Python code was."""
        os.kill(self.pid, signal.SIGUSR1)  # faulthandler writes the stack
        time.sleep(0.3)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0
        return _own_place(self.errors.read_text(errors="replace"))

    def end(self) -> None:
        os.close(self.read)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _own_place(text: str) -> str:
    """Return the innermost line of our package in a stack of faulthandler."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "/blt_kernels/" in line]
    place = (own or lines or [""])[0]
    return place.rpartition("/blt_kernels/")[2].replace('"', "") or place


def _child(files: Files, cases: Sequence[Case], write: int, errors: Path) -> None:
    import faulthandler

    null = os.open(os.devnull, os.O_RDWR)
    error = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, target in ((0, null), (1, null), (2, error)):
        os.dup2(target, number)
    faulthandler.enable(error)
    faulthandler.register(signal.SIGUSR1, file=error)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    gc.freeze()
    watch = _Watch(files.root)
    sys.addaudithook(watch.hook)
    for case in cases:
        outcome = judge(files, case, watch)
        os.write(write, json.dumps(vars(outcome)).encode() + b"\n")


class _Watch:
    """Notes what Python code writes outside of a case's folder, starts, or connects to."""

    def __init__(self, root: Path) -> None:
        self.root, self.noted = str(root), None

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.noted is None:
            return
        if event in _STARTS:
            self.noted.append(f"{event} {args!r:.200}")
        elif event == "open":
            path, _, flags = args
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not self._is_own(path):
                self.noted.append(f"open {path!r} to write")
        elif event in _WRITES and not self._is_own(args[0]):
            self.noted.append(f"{event} {args!r:.200}")

    def _is_own(self, path: object) -> bool:
        if isinstance(path, int) or path is None:
            return True
        place = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
        return place.startswith((self.root + "/work/", "/dev/null", "/proc/self/"))


def judge(files: Files, case: Case, watch: _Watch | None = None) -> Outcome:
    """Mutate the files of a case, load them, and say what it ended in."""
    loader, work = LOADERS[case.loader], files.root / "work"
    folder = files.copy(case.loader, work)
    mutations: list[str] = []
    for seed in case.seeds:
        mutations.append(mutate(folder, random.Random(seed), loader.without))
    size = sum(file.lstat().st_blocks * 512 for file in work.rglob("*"))
    _reset_peak()
    before, began, cpu = _resident(), time.perf_counter(), time.process_time()
    if watch is not None:
        watch.noted = []
    try:
        kind, detail, where = _load(loader, folder)
    finally:
        noted: list[str] = []
        if watch is not None:
            noted, watch.noted = watch.noted or [], None
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = max(_peak() - before, 0)
    if (work / CANARY).exists():
        kind, detail, where = "code", "the file has run code", "canary"
    elif noted:
        kind, detail, where = "effect", noted[0], noted[0].split()[0]
    elif kind in ("accepted", "refused") and peak > MEMORY + 4 * size and not loader.own_sizes:
        kind, detail, where = "memory", f"{peak >> 20} MiB for files of {size} bytes: {detail}", where
    elif kind in ("accepted", "refused") and cpu > SECONDS / 4 and not loader.own_sizes:
        kind, detail, where = "slow", f"{cpu:.1f} s of CPU: {detail}", where
    return Outcome(kind, detail[:1000], where, mutations, seconds, peak)


def _load(loader: Loader, folder: Path) -> tuple[str, str, str]:
    stage = "load"
    try:
        loaded = loader.load(folder)
        stage = "use"
        loader.use(loaded)
        return "accepted", "", ""
    except BaseException as error:
        message = _message(error)
        where = f"{type(error).__name__} in {_place(error)}"
        if isinstance(error, MemoryError) or ("can't allocate memory" in message and not loader.own_sizes):
            return "memory", f"{stage}: {type(error).__name__}: {message}", where
        clear = isinstance(error, (ValueError, OSError, ImportError, RefusedError))
        if stage == "use":
            clear = isinstance(error, ValueError)
        if not clear or isinstance(error, UnicodeError):
            return "exception", f"{stage}: {type(error).__name__}: {message}", where
        if len(message) > MESSAGE:
            return "long message", f"{len(message)} characters: {message[:200]}", where
        if stage == "load" and str(folder) not in message:
            return "nameless", f"{type(error).__name__}: {message}", where
        return "refused", message, where


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as other:
        return f"<no message: {other!r}>"


def _place(error: BaseException) -> str:
    """Return the innermost line of our package, and where it led."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [f"{frame.filename.rpartition('/blt_kernels/')[2]}:{frame.name}" for frame in frames]
    own = [name for name, frame in zip(names, frames, strict=True) if "/blt_kernels/" in frame.filename]
    return f"{own[-1] if own else '?'} > {Path(frames[-1].filename).name}:{frames[-1].name}"


def _reset_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


torch.set_num_threads(1)
