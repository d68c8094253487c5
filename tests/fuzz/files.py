"""Fuzzes the loaders of files for a given time, and prints counts by loader and every find once.

Where atheris is installed, a quarter of the time is for `fuzz.guided`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from fuzz.children import Case, Files, judge, run
from fuzz.loaders import LOADERS

BATCH = 20  # cases of one loader in a child


def main(seconds: float, seed: int, only: tuple[str, ...] = ()) -> int:
    """Run cases of all loaders in turn, print a table and the finds, and return the number of different finds."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    guided = 0
    if find_spec("atheris") is None:
        print("atheris is not installed: no reader is fuzzed by coverage")
    elif not only:
        guided = run_guided(seconds / 4, seed)
        seconds *= 3 / 4
    files, counts = Files(), Counter[tuple[str, str]]()
    finds, spent = Counter[tuple[str, ...]](), Counter[str]()
    names = [name for name in LOADERS if name in only or not only]
    try:
        for name in names:
            check_valid(files, name)
        end, first = time.monotonic() + seconds, {name: count(seed * 1_000_000) for name in names}
        while time.monotonic() < end:
            name = min(names, key=lambda name: spent[name])
            began = time.monotonic()
            cases = [Case.drawn(name, next(first[name])) for _ in range(BATCH)]
            for case, outcome in run(files, cases):
                counts[name, outcome.kind] += 1
                if outcome.is_find:
                    key = (name, outcome.kind, outcome.where)
                    finds[key] += 1
                    if finds[key] == 1:
                        print(f"{outcome.kind}: {case}\n    {outcome.mutations} {outcome.where}", flush=True)
                        print(f"    {outcome.detail[:300]!r}", flush=True)
            spent[name] += time.monotonic() - began
    finally:
        files.remove()
    _print_counts(names, counts, spent)
    return len(finds) + guided


def run_guided(seconds: float, seed: int) -> int:
    """Run `fuzz.guided` in a process of its own, print what it reports, and return its number of finds."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        report = Path(folder, "report")
        command = [sys.executable, "-m", "fuzz.guided", str(int(seconds)), str(seed), str(report)]
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": folder})
        if not report.exists():
            raise RuntimeError(f"the part that is guided by coverage did not run: {ended.stderr[-2000:]}")
        told = json.loads(report.read_text())
    finds = dict(told["finds"])
    if ended.returncode:
        finds[f"exit code {ended.returncode}"] = ended.stderr[-2000:]
    print(f"guided by coverage: {told['counts']}")
    for place, what in finds.items():
        print(f"{place}\n    {what}", flush=True)
    return len(finds)


def check_valid(files: Files, name: str) -> None:
    """Raise RuntimeError unless the files that no mutation has touched are accepted, in this process and in a child."""
    outcome = judge(files, Case(name, ()))  # what it imports, the children have
    if outcome.kind == "accepted":
        ((_, outcome),) = run(files, [Case(name, ())])
    if outcome.kind != "accepted":
        raise RuntimeError(f"{name}: the valid files are not accepted: {outcome}")


def _print_counts(names: list[str], counts: Counter[Any], spent: Counter[str]) -> None:
    print(f"{'loader':24} {'files':>8} {'accepted':>9} {'refused':>8} {'finds':>6} {'seconds':>8}")
    total = Counter[str]()
    for name in [*names, "all"]:
        of = {kind: number for (loader, kind), number in counts.items() if loader == name} if name != "all" else total
        for kind, number in of.items() if name != "all" else ():
            total[kind] += number
        finds = sum(number for kind, number in of.items() if kind not in ("accepted", "refused"))
        seconds = spent[name] if name != "all" else sum(spent.values())
        numbers = f"{sum(of.values()):8} {of.get('accepted', 0):9} {of.get('refused', 0):8} {finds:6} {seconds:8.0f}"
        print(f"{name:24} {numbers}")
