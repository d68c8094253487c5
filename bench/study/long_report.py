"""Reads and writes what `study.long_context` measured, and turns it into sentences and tables.

Times are CPU times of one thread. The deviation of one sample, as a part of it, is pooled over all points that have
several; so a ratio has a standard error even where a point has one sample, and so has an exponent of time. Other
exponents have that of their fit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tables import names_of, read_rows, write_rows

from study.statistics import Estimate, pooled_deviation, slope_of
from study.wording import page, table

OK = "ok"
FITTED_FROM = 16384  # exponents are fitted to rows of at least so many bytes
TRANSFORMERS, RULE = ("transformer", "transformer, window 512"), "MegaByte T^(1/3)"


@dataclass(frozen=True)
class Point:
    """Holds one line of the results.

    Attributes
    ----------
    model, context, run : name of the model, bytes of the row, and "forward" or "step"
    patch_size : bytes, on average
    parameters : without embeddings, hash tables and the entropy model
    gflop : FLOPs of the pass over the row, in 1e9
    us_a_byte : CPU time of each sample
    peak_mb : most memory that a sample held above what was there before
    load : largest load average of the machine before a sample
    status : "ok", or why there is no time
    """

    model: str
    context: int
    run: str
    patch_size: float
    parameters: int
    gflop: float
    us_a_byte: tuple[float, ...] = ()
    peak_mb: float = math.nan
    load: float = math.nan
    status: str = OK

    @property
    def key(self) -> tuple[str, int, str, int]:
        return self.model, self.context, self.run, self.parameters

    @property
    def median(self) -> float:
        """Microseconds a byte, NaN if it was not run."""
        return statistics.median(self.us_a_byte) if self.us_a_byte else math.nan


def write(points: Iterable[Point], path: Path) -> None:
    """Write the results."""
    write_rows(path, names_of(Point), map(asdict, points), digits=5)


def read(path: Path) -> list[Point]:
    """Return the points of a file, none if there is no file."""
    return read_rows(path, Point)


# --- estimates --------------------------------------------------------------------------------------------------------


def exponent(sizes: Sequence[float], values: Sequence[float], errors: Sequence[float] | None = None) -> Estimate:
    """Return the slope of log values over log sizes by least squares, with its standard error.

    `errors` are those of the log values, if they are known. Otherwise the error is that of the fit: two points have
    none. Fewer than two have no slope.
    """
    if len(sizes) < 2:
        return Estimate(math.nan, math.nan)
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    if errors is None and len(x) > 2:
        return slope_of(x, y)
    mean = statistics.fmean(x)
    parts = [math.nan] if errors is None else [(a - mean) * error for a, error in zip(x, errors, strict=True)]
    error = math.hypot(*parts) / sum((a - mean) ** 2 for a in x)
    return Estimate(statistics.linear_regression(x, y).slope, error)


def exponent_of(points: Iterable[Point], value: Callable[[Point], float]) -> Estimate:
    """Return the exponent of a quantity of the whole row, in its bytes, from `FITTED_FROM` on."""
    found = [point for point in points if point.context >= FITTED_FROM and value(point) > 0]
    return exponent([point.context for point in found], list(map(value, found)))


def exponent_of_time(points: Iterable[Point], deviation: float) -> Estimate:
    """Return the exponent of the time of the whole row, with the error of its samples."""
    found = [point for point in points if point.context >= FITTED_FROM and point.us_a_byte]
    errors = [deviation / math.sqrt(len(point.us_a_byte)) for point in found]
    return exponent([point.context for point in found], list(map(time_of, found)), errors)


def deviation(points: Iterable[Point]) -> float:
    """Return the deviation of the logarithm of one sample, pooled over the points that have several."""
    return pooled_deviation([[math.log(x) for x in point.us_a_byte] for point in points if point.us_a_byte])


def ratio(a: Point, b: Point, deviation: float) -> Estimate:
    """Return how many times as long a byte takes in `a` as in `b`."""
    times = a.median / b.median
    return Estimate(times, times * deviation * math.sqrt(1 / len(a.us_a_byte) + 1 / len(b.us_a_byte)))


# --- sentences and tables ---------------------------------------------------------------------------------------------


def report(points: Sequence[Point], run: str) -> str:
    """Return what came out for one pass."""
    found = {(point.model, point.context): point for point in points if point.run == run}
    if not found:
        return "This pass was not measured."
    contexts = sorted({context for _, context in found})
    models = list(dict.fromkeys(model for model, _ in found))
    name = {"step": "A training step", "forward": "A forward pass"}[run]
    rows = {model: [found[model, context] for context in contexts if (model, context) in found] for model in models}
    return page(
        [
            *against_transformers(found, contexts, deviation(points), name),
            cost_of_length(rows, deviation(points), name),
            *growth(rows, deviation(points), name),
            longest(rows, name),
            left_out(rows, name),
        ],
        *tables(rows, contexts, deviation(points), run),
    )


def against_transformers(
    found: dict[tuple[str, int], Point], contexts: Sequence[int], deviation: float, name: str
) -> Iterator[str]:
    """Say what transformers cost beside MegaByte by the rule, with the shortest and the longest row that both have."""
    for other in TRANSFORMERS:
        pairs = [(found[other, c], found[RULE, c]) for c in contexts if {(other, c), (RULE, c)} <= found.keys()]
        flops = {name_of(a.context): f"{a.gflop / b.gflop:,.1f}" for a, b in pairs[:1] + pairs[-1:]}
        run = [(a, b) for a, b in pairs if a.us_a_byte and b.us_a_byte]
        times = {name_of(a.context): with_error(ratio(a, b, deviation)) for a, b in run[:1] + run[-1:]}
        for what, values in (("FLOPs", flops), ("time", times)):
            if values:
                each = " and ".join(f"{value} times with {context} bytes" for context, value in values.items())
                yield f"{name} of {other} over one of {RULE}, in {what}: {each}."


def cost_of_length(rows: dict[str, list[Point]], deviation: float, name: str) -> str:
    """Say how much longer a byte takes in the longest row that was run than in the shortest."""
    each = []
    for model, points in rows.items():
        run = [point for point in points if point.us_a_byte]
        if len(run) > 1:
            times, (first, *_, last) = with_error(ratio(run[-1], run[0], deviation)), run
            each.append(f"{model} {times} times ({name_of(last.context)} over {name_of(first.context)} bytes)")
    return f"{name}, time of a byte in the longest row over that in the shortest: {'; '.join(each)}." if each else ""


def growth(rows: dict[str, list[Point]], deviation: float, name: str) -> Iterator[str]:
    """Say which times and which memory grow faster than the row."""
    for what, fit in (
        ("time", lambda points: exponent_of_time(points, deviation)),
        ("peak memory", lambda points: exponent_of(points, lambda point: point.peak_mb)),
    ):
        kinds: dict[str, list[str]] = {"Faster": [], "Slower": [], "No clear difference": []}
        for model, points in rows.items():
            fitted = fit(points)
            if not math.isnan(fitted.error):
                above = replace(fitted, value=fitted.value - 1)
                kind = "No clear difference" if not above.is_clear else "Faster" if above.value > 0 else "Slower"
                kinds[kind].append(f"{model} {power(fitted)}")
        each = " ".join(f"{kind}: {'; '.join(models)}." for kind, models in kinds.items() if models)
        if each:
            yield f"{name}, growth of {what} compared with linear, from {name_of(FITTED_FROM)} bytes on. {each}"


def longest(rows: dict[str, list[Point]], name: str) -> str:
    """Say what the longest row takes."""
    context = max(point.context for points in rows.values() for point in points)
    ran = [p for points in rows.values() for p in points if p.context == context and p.us_a_byte]
    each = "; ".join(f"{p.model} {time_of(p) / 1e6:.3g} s and {p.peak_mb / 1e3:.2g} GB" for p in ran)
    return f"{name} on {context:,} bytes takes {each}." if ran else ""


def left_out(rows: dict[str, list[Point]], name: str) -> str:
    """Say where models have no time, and why."""
    failed = {model: next((point for point in points if not point.us_a_byte), None) for model, points in rows.items()}
    each = "; ".join(f"{model} from {name_of(p.context)} on ({p.status})" for model, p in failed.items() if p)
    return f"{name} has no time here for: {each}." if each else ""


def tables(rows: dict[str, list[Point]], contexts: Sequence[int], deviation: float, run: str) -> list[str]:
    """Return tables of FLOPs, time and memory: a line a model, a column a length, and the exponents."""
    made = []
    for title, cell, fit in (
        ("MFLOP a byte", lambda p: f"{1e3 * p.gflop / p.context:.3g}", lambda row: exponent_of(row, lambda p: p.gflop)),
        (
            "µs a byte",
            lambda p: f"{p.median:.3g}" if p.us_a_byte else "–",
            lambda row: exponent_of_time(row, deviation),
        ),
        (
            "peak GB",
            lambda p: f"{p.peak_mb / 1e3:.2g}" if p.us_a_byte else "–",
            lambda row: exponent_of(row, lambda p: p.peak_mb),
        ),
    ):
        lines = []
        for model, points in rows.items():
            at = {point.context: cell(point) for point in points}
            lines.append([model, *(at.get(context, "") for context in contexts), power(fit(points))])
        made.append(table([f"{run}, {title}", *map(name_of, contexts), "grows as"], lines))
    return made


def time_of(point: Point) -> float:
    """Return microseconds of the whole row, NaN if it was not run."""
    return point.median * point.context


def power(exponent: Estimate) -> str:
    return "" if math.isnan(exponent.value) else f"T^{with_error(exponent)}"


def with_error(estimate: Estimate) -> str:
    """Return a value with its standard error, if that is known."""
    return f"{estimate.value:.2f}" + ("" if math.isnan(estimate.error) else f" ± {estimate.error:.2f}")


def name_of(context: int) -> str:
    return f"{context >> 20}M" if context >= 1 << 20 else f"{context >> 10}k" if context >= 1 << 10 else f"{context}"
