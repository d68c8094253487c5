"""Runs commands of blt-kernels that meet a fault at a chosen moment: a signal, or an error of the file system.

`Launcher` starts one process, which imports the package once and forks a child for each command. In the child, an
audit hook and a wrapper of `os.fsync` count the events of the file system below one folder. The fault happens at the
event with a given number. No code of the package knows of it.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Arguments of audit events that are paths. A replacement is "os.rename" too.
_PATHS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1}
_PIPES = ("trace", "out", "err")  # events of the file system and steps of training; standard output and error
_ALLOCATES = ("open", "os.mkdir", "fsync", "os.rename")  # these can find the disk full


@dataclass(frozen=True)
class Fault:
    """Describes a fault at event number `at` below `folder`.

    `action` is the name of a signal, which the process sends to itself; the name of an error number, which the event
    fails with; "full", from then on every event that takes space fails with ENOSPC; "limit", no file can grow beyond
    `size` bytes from then on; "cut", the process dies when a file grows beyond `size` bytes; "clock", the clock goes
    back by `size` seconds; "lose", where files that are read count too, the file `victim` is removed; or "none".
    """

    folder: str = ""
    at: int = 0
    action: str = "none"
    size: int = 0
    victim: str = ""


@dataclass
class Command:
    """One command: the words after ``blt-kernels``, its fault, and where its pipes may be."""

    words: Sequence[str]
    trace: Path  # the beginning of the names of the pipes
    fault: Fault = Fault()
    environment: dict[str, str] = field(default_factory=dict)
    stdout: str = ""  # a file, or "pipe", one that nobody reads
    finalize: bool = False  # whether Python ends as always, which takes a second in a child


@dataclass(frozen=True)
class Ended:
    """Holds the end of a command. `code` is negative for a signal, as in `subprocess`."""

    code: int
    stdout: str
    stderr: str
    events: list[str]
    steps: list[int]
    seconds: float


class Launcher:
    """Starts commands, quickly, and waits for them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._commands: dict[int, tuple[list[int], float]] = {}
        assert self._ask({"op": "ready"}) == "ready"

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request, default=str) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, command: Command) -> int:
        """Start a command and return its process, which leads a session of its own."""
        ends = []
        for name in _PIPES:  # no limit of the size of files is for pipes
            Path(f"{command.trace}.{name}").unlink(missing_ok=True)
            os.mkfifo(f"{command.trace}.{name}")
            ends.append(os.open(f"{command.trace}.{name}", os.O_RDONLY | os.O_NONBLOCK))
        pid = self._ask({"op": "start", **asdict(command)})
        self._commands[pid] = (ends, time.monotonic())
        return pid

    def wait(self, pid: int, seconds: float = 60.0) -> Ended:
        """Wait for the end of a command; AssertionError if it takes longer than `seconds`, or leaves a process."""
        status = self._ask({"op": "wait", "pid": pid, "seconds": seconds})
        ends, began = self._commands.pop(pid)
        took = time.monotonic() - began
        trace, *told = (_drain(end) for end in ends)
        lines = trace.splitlines()
        assert status is not None, f"it has not ended after {seconds} s: {told[1][-2000:]}"
        deadline = time.monotonic() + 15  # a worker of DataLoader looks for its parent every 5 s
        while left := session(pid):
            assert time.monotonic() < deadline, f"it left the processes {left}"
            time.sleep(0.05)
        steps = [int(line.split()[1]) for line in lines if line.startswith("step ")]
        return Ended(status, *told, [line for line in lines if not line.startswith("step ")], steps, took)

    def run(self, command: Command, seconds: float = 60.0) -> Ended:
        """Start a command and wait for its end."""
        return self.wait(self.start(command), seconds)


def _drain(end: int) -> str:
    """Return what is in a pipe, which holds 64 KiB, and close it."""
    content = b""
    with suppress(BlockingIOError):
        while part := os.read(end, 1 << 16):
            content += part
    os.close(end)
    return content.decode(errors="replace")


def session(leader: int) -> list[int]:
    """Return the processes, other than zombies, in the session of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


# --- the server -------------------------------------------------------------------------------------------------------


def _serve() -> bool:
    """Fork a child for each command on standard input; return in the child."""
    import safetensors.torch  # noqa: F401

    import blt_kernels.cli
    import blt_kernels.train.loop
    import blt_kernels.train.save_patches  # noqa: F401

    gc.collect()
    gc.freeze()  # the end of a child need not free what the server holds
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # the answers are on a descriptor of their own
    with open(requests) as file:
        for line in file:
            request = json.loads(line)
            answer: Any = "ready"
            if request["op"] == "start":
                answer = os.fork()
                if answer == 0:
                    os.close(answers)
                    os.dup2(0, requests)
                    _become(request)
                    return request["finalize"]
            elif request["op"] == "wait":
                answer = _wait(request["pid"], request["seconds"])
            os.write(answers, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _wait(pid: int, seconds: float) -> int | None:
    """Return the exit code of a child; kill it and return None if it does not end."""
    handle = os.pidfd_open(pid)
    try:
        ended = bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)
    if not ended:
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if ended else None


def _become(request: dict[str, Any]) -> None:
    """Turn this process into a command: its session, streams, environment and fault."""
    from blt_kernels.train import save_patches

    os.setsid()
    trace, *streams = (os.open(f"{request['trace']}.{name}", os.O_WRONLY) for name in _PIPES)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    if request["stdout"]:
        reader, target = os.pipe() if request["stdout"] == "pipe" else (0, os.open(request["stdout"], os.O_WRONLY))
        os.dup2(target, 1)
        os.close(target)
        os.close(reader)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.environ.update(request["environment"])
    sys.argv = ["blt-kernels", *request["words"]]
    save_patches._BLOCK_IDS = 1000
    _trace_steps(trace)
    _inject(Fault(**request["fault"]), trace)


def _trace_steps(trace: int) -> None:
    """Write a line to `trace` after every step that is recorded, its checkpoint included."""
    from blt_kernels.train import loop

    record = loop._Run.record

    def traced(run: Any, bits: float, speed: float) -> None:
        record(run, bits, speed)
        os.write(trace, b"step %d\n" % run.step)

    loop._Run.record = traced  # type: ignore[method-assign]


def _inject(fault: Fault, trace: int) -> None:
    """Count the events of the file system below a folder, and let the fault happen."""
    count, full, busy = 0, False, False

    def act(path: str) -> None:
        nonlocal full
        if fault.action.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault.action))
        elif fault.action == "full":
            full = True
        elif fault.action in ("limit", "cut"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))
        elif fault.action == "clock":
            now = time.time
            time.time = lambda: now() - fault.size
        elif fault.action == "lose":
            os.unlink(fault.victim)
        elif fault.action != "none":
            number = getattr(errno, fault.action)
            raise OSError(number, os.strerror(number), path)

    def event(kind: str, path: Any) -> None:
        nonlocal count, busy
        if busy or not isinstance(path, (str, bytes, os.PathLike)):
            return
        busy = True
        try:
            name = os.path.abspath(os.fsdecode(path))
            if not name.startswith(fault.folder + os.sep):
                return
            count += 1
            os.write(trace, f"{kind} {name[len(fault.folder) + 1 :]}\n".encode())
            if count == fault.at:
                act(name)
            if full and kind in _ALLOCATES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        finally:
            busy = False

    def audited(kind: str, arguments: tuple[Any, ...]) -> None:
        if kind == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if writes or fault.action == "lose":
                event(kind, path)
        elif kind in _PATHS:
            event(kind, arguments[_PATHS[kind] - 1])

    fsync: Callable[[Any], None] = os.fsync

    def synced(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        event("fsync", path)
        fsync(file)
        event("fsynced", path)

    if fault.action == "cut":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if fault.folder:
        os.fsync = synced
        sys.addaudithook(audited)


if __name__ == "__main__":
    finalize = _serve()
    from blt_kernels.cli import main

    try:
        main()
    except SystemExit as end:
        if finalize:
            raise
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
