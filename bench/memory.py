"""Measures the memory that a call holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """Return the peak of bytes that torch's CPU allocator held during a call beyond those before, outputs included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out = function()
    held = peak = 0
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del out
    return peak


def resident_bytes(name: str) -> int:
    """Return "VmRSS", the resident bytes of this process, or "VmHWM", their peak."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) << 10


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence stderr of C++, where the profiler reports its start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
