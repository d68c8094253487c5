"""Times implementations side by side: each once a round, in one process, with a limit measured in the same rounds.

A machine drifts while it is measured, so a time is a median, and a ratio is the median of the ratios within rounds. An
implementation that takes seconds drops out when its budget is spent; its ratios are over the rounds that it took part
in.
"""

from __future__ import annotations

import csv
import ctypes
import datetime
import math
import os
import platform
import re
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import peak_extra_bytes
from tables import cell_of, names_of, write_rows

OURS = "blt_kernels"
OK = "ok"
RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 2e-3  # a shorter function is called in a loop, so that the clock does not matter
SLOW_SECONDS = 0.2  # a longer function is warm after one call
MIN_SAMPLES = 3  # so many samples are taken even beyond the budget
BUDGET_SECONDS = 5.0
FLUSH_BYTES = 256 << 20  # no GPU has a larger L2


@dataclass(frozen=True)
class Comparison:
    """Describes one op on one input: its implementations, the check that they agree, and the limit of its speed.

    Attributes
    ----------
    op, shape, dtype : the name of the row
    implementations : name -> function without arguments; the others are compared with `OURS`
    work : bytes that the op must read and write; flops if `unit` is "flop"
    limits : name -> function without arguments; the fastest, scaled from `limit_work` to `work`, is the limit
    agree : raises if the results of the implementations, by name, are not the same
    failures : name of an implementation that cannot run here -> why
    """

    op: str
    shape: str
    dtype: str
    implementations: dict[str, Callable[[], Any]]
    work: int
    limits: dict[str, Callable[[], Any]]
    limit_work: int
    agree: Callable[[dict[str, Any]], None]
    unit: str = "byte"
    device: str = "cpu"
    failures: dict[str, str] = field(default_factory=dict)


Make = Callable[[], Comparison]
"""Benches yield these: a call makes the inputs of a comparison, which may take gigabytes."""


@dataclass(frozen=True)
class Row:
    """Holds one line of the results: the columns of the CSV files.

    Attributes
    ----------
    bytes : bytes that the op must move; none where the limit is arithmetic, and `gb_per_s` means GFLOP/s
    share_of_limit : speed as a part of the limit's
    ratio_to_best_peer : time of the best peer as a multiple of this one's
    extra_mb : most memory that was held during a call, outputs included
    rounds : number of samples of the median
    status : "ok"; or why there is no time, and then the figures are NaN
    """

    op: str
    shape: str
    dtype: str
    threads: int
    implementation: str
    median_ms: float
    bytes: int | None
    gb_per_s: float
    share_of_limit: float
    ratio_to_best_peer: float | None
    extra_mb: float | None
    rounds: int
    status: str = OK


def compare(
    comparison: Comparison, *, rounds: int, warmup: int = 3, budget: float = BUDGET_SECONDS, cpu_time: bool = False
) -> list[Row]:
    """Check that the implementations agree, then time them and the limits in turn.

    A peer that raises becomes a row without a time; the others are measured.

    Parameters
    ----------
    rounds
        Times that every implementation is measured.
    warmup
        Times that it is called before, after the call whose result is checked, which may compile; once if it is slow.
    budget
        Seconds of measurement after which an implementation that has `MIN_SAMPLES` is left out of later rounds.
    cpu_time
        Measure the CPU time of the process in place of the time of the wall clock.

    Raises
    ------
    Exception
        What our implementation or `agree` raises.
    """
    failures = dict(comparison.failures)
    functions = {**comparison.implementations, **{f"limit: {name}": f for name, f in comparison.limits.items()}}
    comparison.agree(run_each(comparison.implementations, failures))
    clock = _Clock(comparison.device, time.process_time if cpu_time else time.perf_counter)
    repeats: dict[str, int] = {}
    for name in [name for name in functions if name not in failures]:
        with failing(name, failures):
            repeats[name] = _warm_up(clock, functions[name], warmup)
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    names = list(repeats)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            spent = sum(samples[name]) * repeats[name]
            if name not in failures and (len(samples[name]) < MIN_SAMPLES or spent < budget):
                with failing(name, failures):
                    samples[name].append(clock.sample(functions[name], repeats[name]))
    measured = {name: times for name, times in samples.items() if name not in failures}
    return _rows(comparison, functions, measured) + [failed(comparison, *failure) for failure in failures.items()]


def rows_of(make: Make, compare: Callable[[Comparison], list[Row]]) -> list[Row]:
    """Make a comparison and measure it, or say in a row why that failed. Its inputs are freed afterwards."""
    (op, shape), dtype = name_of_case(make), ""
    try:
        comparison = make()
        op, shape, dtype = comparison.op, comparison.shape, comparison.dtype
        return compare(comparison)
    except Exception as error:
        reason = reason_of(error)
    finally:
        comparison = None  # it may hold gigabytes: free them before the next inputs are made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [failed_row(op, shape, dtype, OURS, reason)]


def run_each(implementations: dict[str, Callable[[], Any]], failures: dict[str, str]) -> dict[str, Any]:
    """Return results by name; a peer that raises goes to `failures`."""
    results: dict[str, Any] = {}
    for name, function in implementations.items():
        with failing(name, failures):
            results[name] = function()
    return results


@contextmanager
def failing(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Note an exception of a peer or a limit in `failures`; one of ours is raised."""
    try:
        yield
    except Exception as error:  # a peer may fail, out of memory for example, and its row says why
        if name == OURS:
            raise
        failures[name] = reason_of(error)


def reason_of(error: BaseException) -> str:
    """Return the message of an exception as one short line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def failed(comparison: Comparison, implementation: str, reason: str) -> Row:
    """Return the row of an implementation that has no time."""
    return failed_row(comparison.op, comparison.shape, comparison.dtype, implementation, reason)


def failed_row(op: str, shape: str, dtype: str, implementation: str, reason: str) -> Row:
    """Return a row without a time."""
    nan = math.nan
    return Row(op, shape, dtype, torch.get_num_threads(), implementation, nan, None, nan, nan, None, None, 0, reason)


def name_of_case(make: Make) -> tuple[str, str]:
    """Name a comparison that could not be made, by its bench and its arguments."""
    if not isinstance(make, partial):
        return make.__module__, make.__name__
    arguments = [repr(x) for x in make.args] + [f"{name}={x!r}" for name, x in make.keywords.items()]
    return make.func.__module__.removeprefix("bench_"), ", ".join(textwrap.shorten(x[:1000], 100) for x in arguments)


def _warm_up(clock: _Clock, function: Callable[[], Any], times: int) -> int:
    """Call a function until it is warm, and return how many calls make a sample.

    A single call after the heap was trimmed takes much longer than those of a loop, so a loop is timed too.
    """
    for _ in range(times + 1):
        seconds = clock.sample(function, 1)
        if seconds > SLOW_SECONDS:
            break
    repeats = math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))
    if repeats > 1:
        repeats = math.ceil(SAMPLE_SECONDS / max(clock.sample(function, repeats), 1e-9))
    return max(1, repeats)


def _rows(
    comparison: Comparison, functions: dict[str, Callable[[], Any]], samples: dict[str, list[float]]
) -> list[Row]:
    median = {name: statistics.median(s) for name, s in samples.items()}
    scale = comparison.work / comparison.limit_work
    limits = [name for name in samples if name.startswith("limit: ")]
    limit = min(limits, key=median.__getitem__)
    peers = [name for name in comparison.implementations if name != OURS and name in samples]
    best = min(peers, key=median.__getitem__) if peers else OURS
    rows = []
    for name in [*(name for name in comparison.implementations if name in samples), limit]:
        own_scale = 1.0 if name == limit else scale
        work = comparison.limit_work if name == limit else comparison.work
        rows.append(
            Row(
                comparison.op,
                comparison.shape,
                comparison.dtype,
                torch.get_num_threads(),
                name,
                median[name] * 1e3,
                work if comparison.unit == "byte" else None,
                work / median[name] / 1e9,
                own_scale * _ratio(samples[limit], samples[name]),
                None if name == limit or not peers else _ratio(samples[best], samples[name]),
                None if name == limit or comparison.device != "cpu" else peak_extra_bytes(functions[name]) / 1e6,
                len(samples[name]),
            )
        )
    return rows


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the ratio over the rounds that both were measured in; one that drops out is never measured again."""
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=False))


class _Clock:
    """Measures the seconds of a call: by the clock `now` on the CPU, by events with a cold L2 on a GPU.

    On the CPU the heap is trimmed before each sample. Otherwise large outputs are sometimes fresh pages and sometimes
    memory that was freed before, which differ by as much as most ops take.
    """

    def __init__(self, device: str, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None

    def sample(self, function: Callable[[], Any], repeats: int) -> float:
        if self.flush is None:
            _trim_heap()
            start = self.now()
            for _ in range(repeats):
                function()
            return (self.now() - start) / repeats
        total = 0.0
        for _ in range(repeats):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end) / 1e3
        return total / repeats


def _trim_heap() -> None:
    """Give free memory back to the system, where the C library can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# --- limits -----------------------------------------------------------------------------------------------------------


def reads(data: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return ways to read every byte of contiguous `data` once: the fastest is the limit of a reading op.

    A reduction of torch is not always the fastest reader, least of all in low precision, so the memory is also read as
    fp32 and by a dot product with itself.
    """
    words = data.detach().flatten().view(torch.float32)
    candidates: dict[str, Callable[[], Any]] = {
        "torch.sum": words.sum,
        "torch.amax": words.amax,
        "torch.dot": lambda: torch.dot(words, words),
    }
    if not data.is_cuda:
        try:
            array = words.numpy()
        except RuntimeError:  # torch works without numpy
            return candidates
        candidates["numpy.max"] = array.max
    return candidates


def copies(data: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return a copy of `data` into allocated memory, which reads and writes its size."""
    out = torch.empty_like(data)
    return {"copy": lambda: out.copy_(data)}


# --- results ----------------------------------------------------------------------------------------------------------


def device_name(device: str = "cpu") -> str:
    """Return the name of the device, as the names of result files have it."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
        model = found[1] if found else platform.processor() or platform.machine()
        name = f"{model} {torch.backends.cpu.get_cpu_capability()}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|\bcpu\b|processor|@.*ghz", "", name.lower())).strip("-")


def csv_path(device: str = "cpu") -> Path:
    """Return the file for results of today: ``bench/results/<date>-<device>.csv``."""
    return RESULTS / f"{datetime.date.today().isoformat()}-{device_name(device)}.csv"


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Add rows to a file. They replace the rows of the same comparisons."""
    new = [{k: _cell(v) for k, v in asdict(row).items()} for row in rows]
    measured = {_key(row) for row in new}
    old = [row for row in read_csv(path) if _key(row) not in measured]
    write_rows(path, names_of(Row), old + new)


def _cell(value: object) -> str:
    return "" if isinstance(value, float) and math.isnan(value) else cell_of(value, digits=4)


def append_csv(rows: Iterable[Row], path: Path) -> None:
    """Add rows at the end of a file and flush them, so that a process that is killed loses none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names_of(Row))
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: _cell(v) for k, v in asdict(row).items()})
        file.flush()
        os.fsync(file.fileno())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file, none if there is no file; ValueError if it holds something else."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if not {"op", "shape", "dtype", "threads"} <= set(reader.fieldnames or ()):
            raise ValueError(f"csv: expected a table of measurements, got {path}")
        return list(reader)


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return row["op"], row["shape"], row["dtype"], row["threads"]


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the slope of log time, or memory, over log size by least squares: 1 is linear."""
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in seconds]
    return statistics.linear_regression(x, y).slope
