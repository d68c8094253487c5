"""Counts the instructions of a function with Valgrind's callgrind, for ``bench/compare.py``.

A process that runs under callgrind starts without instrumentation, so that imports take seconds. A library of two
functions, compiled here, switches it on and off by callgrind's client requests, and callgrind then writes a file that
holds the count. Counts do not depend on what else the machine does. Neither the address space nor Python's hashes are
randomised: two processes of one revision differ by up to 0.8%, since dictionaries are ordered by addresses.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SOURCE = """
#include <valgrind/callgrind.h>
void count_start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void count_stop(void) { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; }
"""
NEWEST_ISA = "v3"  # Valgrind emulates a processor without AVX-512
REPEATS = 20  # calls in one count


def prepare(folder: Path) -> Path:
    """Compile the library into `folder`, and write the program there that runs Python under callgrind; return it.

    Raises
    ------
    SystemExit
        Valgrind, its header or a C compiler is missing.
    """
    for tool in ("valgrind", "setarch", os.environ.get("CC", "cc")):
        if shutil.which(tool) is None:
            raise SystemExit(f"--clock instructions: expected {tool} in PATH, as Debian's package valgrind installs it")
    folder.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / "count.so")]
    if subprocess.run(command, input=SOURCE, text=True).returncode:
        raise SystemExit("--clock instructions: valgrind/callgrind.h could not be compiled")
    program = folder / "python"
    callgrind = f"valgrind -q --tool=callgrind --instr-atstart=no '--callgrind-out-file={folder}/count.%p'"
    program.write_text(
        f"#!/bin/sh\nPYTHONHASHSEED=0 exec setarch {platform.machine()} -R {callgrind} '{sys.executable}' \"$@\"\n"
    )
    program.chmod(0o755)
    return program


class Counter:
    """Counts in a process that the program of `folder` has started."""

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(folder / "count.so"))
        self.stem, self.dumps = folder / f"count.{os.getpid()}", 0

    def count(self, function: Callable[[], object], repeats: int) -> float:
        """Return the instructions of one call, the mean of `repeats`."""
        self.library.count_start()
        for _ in range(repeats):
            function()
        self.library.count_stop()
        self.dumps += 1
        path = self.stem.with_name(f"{self.stem.name}.{self.dumps}")
        found = re.search(r"^totals: (\d+)", path.read_text(), flags=re.MULTILINE)
        path.unlink()
        if found is None:
            raise ValueError(f"{path}: expected a line of totals, as callgrind writes it")
        return int(found.group(1)) / repeats
