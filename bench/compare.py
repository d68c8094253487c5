"""Times another revision and the working tree in turn, and marks the rows that differ by more than noise.

    make bench-compare BASE=<revision> [OPS="patch_pool models"] [OPTIONS="--match bfloat16"]

The base is checked out and built below build/compare. Each of the two has a process, which loads its own package and
its own bench/bench_<op>.py, and runs our implementation alone. A round runs a comparison once in both processes, in
random order, so a drift of the machine reaches both. The table has the median of the ratios of the rounds with its
interval. A row whose interval lies beyond the threshold is measured twice more, with new inputs, and all rounds count:
the pages that inputs lie on move a time by 5%. The exit code is 1 if an interval lies above the threshold as a whole,
or if the working tree raises.

    make bench-compare BASE=<revision> OPTIONS="--clock instructions"

counts instructions instead, under callgrind, of the calls on one row of bench_latency.py if no bench is named. Counts
do not depend on what else the machine does. Both revisions are then built for AVX2, which Valgrind emulates.
"""

from __future__ import annotations

import argparse
import importlib
import math
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import instructions
from revision import Name, Revision, RevisionError
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 1e-2  # a shorter function is called in a loop
SLOW_SECONDS = 0.2  # a longer function is warm after one call
CONFIDENCE = 0.95
ATTEMPTS = 3  # so often a row is measured before it is called slower or faster
MIN_ROUNDS = 6  # fewer have no interval of this confidence


# --- measurement ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Holds a comparison: medians in ms or instructions, and the ratio of the new one to the base with its interval."""

    name: Name
    base: float
    new: float
    ratio: float
    low: float
    high: float
    rounds: int

    def verdict(self, threshold: float) -> str:
        return "slower" if self.low > 1 + threshold else "faster" if self.high < 1 - threshold else ""


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval of the sign test for the median: it holds for any distribution of independent values.

    The k-th value from below and the k-th from above are its ends, for the largest k with P(X < k) at most half of what
    the confidence leaves, where X ~ Binomial(n, 1/2) values are below the median.
    """
    ordered, count = sorted(values), len(values)
    k, below = 0, 0.5**count
    while 2 * below <= 1 - confidence:
        k += 1
        below += math.comb(count, k) / 2**count
    if k == 0:
        raise ValueError(f"values: expected enough for a confidence of {confidence}, got {count}")
    return ordered[k - 1], ordered[-k]


def measure(pair: Sequence[Revision], name: Name, *, rounds: int, budget: float, clock: str, threshold: float) -> Row:
    """Measure a comparison, and up to `ATTEMPTS` times, each with new inputs, if it is beyond the threshold."""
    times: tuple[list[float], list[float]] = [], []
    for attempt in range(ATTEMPTS):
        if attempt:
            for revision in pair:
                revision.find(name)
        sample(pair, times, rounds, budget, clock)
        ratios = [new / base for base, new in zip(*times, strict=True)]
        scale = 1 if clock == "instructions" else 1e3
        base, new = (statistics.median(x) * scale for x in times)
        row = Row(name, base, new, statistics.median(ratios), *interval(ratios), len(ratios))
        if not row.verdict(threshold):
            break
    return row


def sample(
    pair: Sequence[Revision], times: tuple[list[float], list[float]], rounds: int, budget: float, clock: str
) -> None:
    """Run the comparison that both have made in turn, until the rounds or the seconds of the budget are over."""
    draw, repeats = random.Random(0), instructions.REPEATS
    if clock == "instructions":
        for revision in pair:
            revision.ask("run", repeats, clock)
    else:
        repeats = max(1, math.ceil(SAMPLE_SECONDS / max(warm(pair, clock), 1e-9)))
    start = time.monotonic()
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.monotonic() - start > budget:
            break
        for which in draw.sample((0, 1), 2):
            times[which].append(pair[which].ask("run", repeats, clock))


def warm(pair: Sequence[Revision], clock: str) -> float:
    """Call the function of each revision up to three times, and return the shortest time in seconds."""
    seconds = []
    for revision in pair:
        for _ in range(3):
            seconds.append(revision.ask("run", 1, clock))
            if seconds[-1] > SLOW_SECONDS:
                break
    return min(seconds)


def title(name: Name) -> str:
    return ", ".join(name)


def compare(
    pair: tuple[Revision, Revision], op: str, *, small: bool, match: str, **settings: Any
) -> Iterator[Row | str]:
    """Yield the rows of an op, and a message for each comparison that only one of the two has or that fails."""
    base, new = pair
    for revision in pair:
        revision.load(op, small)
    for number in range(new.count):
        try:
            name = new.make(number)
            if match not in title(name):
                continue
            if base.find(name):
                yield measure(pair, name, **settings)
            else:
                yield f"only {new.name} has {title(name)}"
        except RevisionError as error:
            yield f"comparison {number} of {op}: {error}"
    for number in range(base.count):
        try:
            name = base.names.get(number) or base.make(number)
            if name not in new.names.values() and match in title(name):
                yield f"only {base.name} has {title(name)}"
        except RevisionError as error:
            yield f"comparison {number} of {op}: {error}"


# --- revisions and the command ----------------------------------------------------------------------------------------


def build(revision: str, isa: str) -> Path:
    """Check a revision out below build/compare, build its CPU kernels for `isa`, and return its folder."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--short=12", f"{revision}^{{commit}}"], check=True, stdout=subprocess.PIPE, text=True
    )
    root = ROOT / "build" / "compare" / found.stdout.strip()
    if not root.exists():
        subprocess.run([*git, "worktree", "add", "--quiet", "--force", "--detach", root, root.name], check=True)
    compile_kernels(root, root, isa)
    return root


def build_working_tree(isa: str) -> Path:
    """Copy the package and the benches below build/compare, with CPU kernels for `isa`, and return the folder."""
    root = ROOT / "build" / "compare" / "working-tree"
    for name in ("blt_kernels", "bench"):
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    compile_kernels(ROOT, root, isa)
    return root


def compile_kernels(source: Path, root: Path, isa: str) -> None:
    """Build the CPU kernels of the checkout `source` for `isa`, in `root`, and put them into its package."""
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DBLT_KERNELS_ISAS={isa}", "-DBLT_KERNELS_CUDA=OFF"]
    if shutil.which("ccache"):
        options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    folder = root / "build" / "cmake"
    configure = ["cmake", "-S", source, "-B", folder, "-G", "Ninja", *options]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder, "--target", f"_C_{isa}"], check=True)
    part = shutil.copy(folder / f"_C_{isa}.abi3.so", root / "blt_kernels" / "part.so")
    part.replace(part.with_name(f"_C_{isa}.abi3.so"))  # another comparison may have loaded the file that was there


def table(op: str, rows: Sequence[Row], base: str, clock: str, threshold: float) -> Table:
    unit, digits = ("instructions", ",.0f") if clock == "instructions" else ("ms", ".4g")
    shown = Table(title=f"{op}: {unit} of {base} and of the working tree", title_justify="left")
    shown.add_column("")
    for column in ("base", "new", "ratio", f"{CONFIDENCE:.0%}", "rounds", ""):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        verdict = row.verdict(threshold)
        times = f"{row.base:{digits}}", f"{row.new:{digits}}"
        ratios = f"{row.ratio:.3f}", f"{row.low:.3f} to {row.high:.3f}"
        style = {"slower": "red", "faster": "green"}.get(verdict)
        shown.add_row(title(row.name), *times, *ratios, str(row.rounds), verdict, style=style)
    return shown


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="revision that the working tree is compared with")
    names = "benches to run; those that both have if not given, or latency for instructions"
    parser.add_argument("--op", nargs="+", metavar="OP", help=names)
    parser.add_argument("--match", default="", metavar="TEXT", help="only comparisons whose name contains this")
    parser.add_argument("--rounds", type=int, help=f"30, of instructions {MIN_ROUNDS}, which is the least")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a comparison, beyond the first rounds")
    parser.add_argument("--small", action="store_true", help="small inputs, to see that everything runs")
    clocks = "cpu time, wall time (for a machine at rest), or instructions, which Valgrind counts"
    parser.add_argument("--clock", choices=("cpu", "wall", "instructions"), default="cpu", help=clocks)
    parser.add_argument("--threads", type=int, default=1)
    lost = "part of the time or instructions that may be lost: 0.05, for instructions 0.02"
    parser.add_argument("--threshold", type=float, help=lost)
    options = parser.parse_args(arguments)
    counting = options.clock == "instructions"
    options.rounds = (MIN_ROUNDS if counting else 30) if options.rounds is None else options.rounds
    options.threshold = (0.02 if counting else 0.05) if options.threshold is None else options.threshold
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: expected at least {MIN_ROUNDS}, got {options.rounds}")
    if options.clock != "wall" and options.threads != 1:
        parser.error(f"--clock {options.clock}: expected one thread, got {options.threads}")
    if counting:
        options.op = options.op or ["latency"]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    isas, counting = importlib.import_module("blt_kernels._extension").runnable(), None
    out = Console(width=None if sys.stdout.isatty() else 140)
    isa = isas[0]
    if options.clock == "instructions":
        counting = instructions.prepare(ROOT / "build" / "compare")
        isa = instructions.NEWEST_ISA if instructions.NEWEST_ISA in isas else isas[0]
    root = build(options.base, isa)
    new = build_working_tree(isa) if counting else ROOT
    benches = [{path.stem[6:] for path in (folder / "bench").glob("bench_*.py")} for folder in (root, ROOT)]
    for op in options.op or ():
        if op not in benches[0] & benches[1]:
            raise SystemExit(f"--op: expected some of {', '.join(sorted(benches[0] & benches[1]))}, got {op!r}")
    names = {"base": root, "new": new}
    pair = tuple(Revision(name, folder, options.threads, isa, counting) for name, folder in names.items())
    keys = ("small", "match", "rounds", "budget", "clock", "threshold")
    settings, failed = {key: getattr(options, key) for key in keys}, False
    for op in options.op or sorted(benches[0] & benches[1]):
        found = list(compare(pair, op, **settings))
        rows = [row for row in found if isinstance(row, Row)]
        messages = [message for message in found if isinstance(message, str)]
        out.print(table(op, rows, root.name, options.clock, options.threshold))
        for message in messages:
            out.print(message, markup=False, soft_wrap=True)
        failed |= any(row.verdict(options.threshold) == "slower" for row in rows)
        failed |= any(": new: " in message for message in messages)
    for revision in pair:
        revision.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
