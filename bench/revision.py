"""Runs our implementations of one revision in a process of its own, for ``bench/compare.py``.

Two revisions of a package cannot be imported by one process. The processes import this file of the working tree, so it
imports neither torch nor the package nor a bench before the path is that of the revision.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from instructions import Counter

OURS = "blt_kernels"
Name = tuple[str, str, str]
"""Names a comparison: op, shape and dtype."""


class Worker:
    """Runs the benches of one revision.

    It uses what every revision has: ``comparisons(small, compile_peers)`` of a bench, and of what that makes `op`,
    `shape`, `dtype` and `implementations`.
    """

    def __init__(self, root: Path, threads: int, isa: str | None, counting: Path | None) -> None:
        self.counter = Counter(counting.parent) if counting else None
        os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        if isa is not None:  # the package then raises, rather than running its references, if the kernels are missing
            os.environ["BLT_KERNELS_ISA"] = isa
        sys.path[:0] = [str(root), str(root / "bench")]
        package = importlib.import_module("blt_kernels")
        if Path(str(package.__file__)).resolve().parents[1] != root.resolve():
            raise ImportError(f"expected blt_kernels of {root}, got {package.__file__}")

    def load(self, op: str, small: bool) -> int:
        module = importlib.import_module(f"bench_{op}")
        self.makes = list(module.comparisons(small=small, compile_peers=False))
        return len(self.makes)

    def make(self, number: int) -> Name:
        self.function = None  # it may hold gigabytes
        comparison = self.makes[number]()
        self.function = comparison.implementations[OURS]
        return comparison.op, comparison.shape, comparison.dtype

    def run(self, repeats: int, clock: str) -> float:
        """Return the seconds or instructions of a call.

        The heap is trimmed before calls are timed, so that outputs are fresh pages in both processes.
        """
        if self.counter:
            return self.counter.count(self.function, repeats)
        now = time.process_time if clock == "cpu" else time.perf_counter
        with suppress(OSError, AttributeError):  # glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        start = now()
        for _ in range(repeats):
            self.function()
        return (now() - start) / repeats


def serve(connection: Connection, *arguments: Any) -> None:
    """Answer requests ``(method, *arguments)`` with ``(True, result)`` or ``(False, message)`` until None comes."""
    worker: Worker | None = None
    request: tuple[Any, ...] | None = ("start",)
    while request is not None:
        method, *rest = request
        try:
            if worker is None:
                worker, result = Worker(*arguments), None
            else:
                result = getattr(worker, method)(*rest)
            connection.send((True, result))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
        try:
            request = connection.recv()
        except EOFError:  # the parent has ended
            request = None


class RevisionError(Exception):
    """Says that a revision could not do what it was asked for."""


class Revision:
    """Starts the process of a revision and asks it to load benches, make comparisons and run them.

    With `counting`, the program that ``instructions.prepare`` returns, it runs under callgrind and counts instructions.
    """

    def __init__(self, name: str, root: Path, threads: int, isa: str | None, counting: Path | None = None) -> None:
        self.name, self.names = name, dict[int, Name]()
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, root, threads, isa, counting), daemon=True)
        context.set_executable(str(counting or sys.executable))
        self.process.start()
        context.set_executable(sys.executable)
        other.close()
        self._answer()

    def ask(self, *request: Any) -> Any:
        self.connection.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            succeeded, result = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name} ended, perhaps out of memory") from None
        if not succeeded:
            raise RevisionError(f"{self.name}: {result}")
        return result

    def load(self, op: str, small: bool) -> None:
        self.names = {}
        self.count = self.ask("load", op, small)

    def make(self, number: int) -> Name:
        self.names[number] = self.ask("make", number)
        return self.names[number]

    def find(self, name: Name) -> bool:
        """Make the comparison of this name, if there is one. Names are known only once a comparison was made."""
        for number in [n for n, known in self.names.items() if known == name]:
            self.make(number)
            return True
        for number in range(self.count):
            with suppress(RevisionError):  # another comparison may fail
                if number not in self.names and self.make(number) == name:
                    return True
        return False

    def close(self) -> None:
        with suppress(OSError):  # it may have ended
            self.connection.send(None)
        self.process.join()
