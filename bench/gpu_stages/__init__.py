"""The stages of ``python bench/gpu.py``: what is measured on a machine with a GPU that is at hand for minutes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from timing import Row

from gpu_stages.target import Target

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """Measures one thing. If it raises, hangs or ends the process, it costs one row, and the next case follows.

    Attributes
    ----------
    name : what a row about its failure is called
    run : yields rows, each of which is written at once
    """

    name: str
    run: Callable[[Target], Iterable[Row]]


@dataclass(frozen=True)
class Stage:
    """Describes cases that run in a process of their own.

    Attributes
    ----------
    module : of `gpu_stages`; has ``<name>_cases(target) -> list of cases``, most informative first
    seconds : budget of the stage
    case_seconds : budget of one case, after which the process is killed and starts anew behind it
    """

    name: str
    module: str
    seconds: float
    case_seconds: float

    def cases(self, target: Target) -> list[Case]:
        """Return the cases; making the list takes no inputs and no GPU memory."""
        make = getattr(importlib.import_module(f"gpu_stages.{self.module}"), f"{self.name}_cases")
        return make(target)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("ceilings", "ceilings", 30, 25),
        Stage("smoke", "smoke", 80, 30),
        Stage("timings", "timings", 110, 30),
        Stage("attention", "timings", 75, 45),
        Stage("search", "search", 55, 20),
        Stage("counters", "counters", 60, 60),
        Stage("generation", "generation", 30, 15),
        Stage("memcheck", "checks", 50, 50),
        Stage("racecheck", "checks", 50, 50),
        Stage("suite", "checks", 60, 60),
    )
}
CALLS = {  # each has its stages and its budget in seconds, without the machine's start
    1: (("ceilings", "smoke", "timings", "attention", "search", "generation", "counters"), 430.0),
    2: (("smoke", "memcheck", "racecheck", "suite", "timings"), 240.0),
}
