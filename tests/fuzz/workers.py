"""Runs numbered jobs in forked children: a crash, a hang or hunger for memory ends a child, and is told by its job."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 30.0  # a job that takes longer hangs
MEMORY = 3 << 30  # bytes that a child may have beside those of its parent


Job = Callable[[int], Iterator[dict[str, Any]]]


def run(job: Job, numbers: range, deadline: float | None = None) -> Iterator[dict[str, Any]]:
    """Yield a result for each number, until `deadline` on the monotonic clock.

    The result has all entries that the job has yielded until its end, or until its child has died: then ``"died"`` says
    how.
    """
    position = 0
    told: dict[str, Any] = {}
    while position < len(numbers):
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.close(reader)
            _work(job, numbers[position:], writer)
        os.close(writer)
        how = None
        with os.fdopen(reader) as lines:
            while position < len(numbers):
                if deadline is not None and time.monotonic() > deadline:
                    position = len(numbers)
                    break
                if not select.select([lines], [], [], SECONDS)[0]:
                    how = f"ran for more than {SECONDS:g} s"
                    break
                line = lines.readline()
                if not line.endswith("\n"):
                    how = "died"
                    break
                told |= json.loads(line)
                if told.pop("done", False):
                    yield {"number": numbers[position], **told}
                    told = {}
                    position += 1
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if how is not None:
            if how == "died":
                how = f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"left with {status >> 8}"
            yield {"number": numbers[position], **told, "died": how}
            told = {}
            position += 1


def _work(job: Job, numbers: range, writer: int) -> None:
    """Do the jobs, a line for whatever they yield, and leave the process without its parent's clean-up."""
    code = 1
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # the parent tells what ends this process
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        for number in numbers:
            for told in job(number):
                os.write(writer, (json.dumps(told) + "\n").encode())
            os.write(writer, b'{"done": true}\n')
        code = 0
    finally:
        os._exit(code)
