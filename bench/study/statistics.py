"""Means with standard errors, and what may be claimed from them.

All errors are standard errors of normal estimates. The study claims a difference if it is larger than twice its
standard error. For a normal estimate with a known deviation, chance passes that rule once in 22 comparisons. With the
deviation of three seeds (t with 2 degrees of freedom), chance passes it once in 5.4. So the deviation over seeds is
pooled over models (`pooled_deviation`) where several models are compared.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Estimate:
    """Has a value and its standard error, which is NaN if one run alone gave the value."""

    value: float
    error: float

    @property
    def is_clear(self) -> bool:
        """Whether the value differs from 0 by more than twice its standard error; False for a NaN."""
        return abs(self.value) > CLEAR * self.error

    def __sub__(self, other: Estimate) -> Estimate:
        """Return the difference of independent estimates."""
        return Estimate(self.value - other.value, math.hypot(self.error, other.error))


def mean_of(values: Sequence[float], deviation: float | None = None) -> Estimate:
    """Return the mean of independent values; `deviation` is that of one value, if it is known from elsewhere."""
    if deviation is None:
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), deviation / math.sqrt(len(values)))


def pooled_deviation(groups: Iterable[Sequence[float]]) -> float:
    """Return the deviation of one value from the mean of its group, if it is the same in all groups.

    It is the root of the squared deviations from the means of the groups over the degrees of freedom, the number of
    values less that of groups. It is NaN if no group has two values.
    """
    squares, freedom = 0.0, 0
    for group in groups:
        mean = statistics.fmean(group)
        squares += sum((value - mean) ** 2 for value in group)
        freedom += len(group) - 1
    return math.sqrt(squares / freedom) if freedom else math.nan


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return the mean of `a[i] - b[i]`, values of the same seed, excerpt or question, and its standard error."""
    return mean_of([x - y for x, y in zip(a, b, strict=True)])


def share_of(right: int, count: int) -> Estimate:
    """Return the share of right answers. The error is binomial, for one answer more of either kind (Agresti, Coull)."""
    smoothed = (right + 1) / (count + 2)
    return Estimate(right / count, math.sqrt(smoothed * (1 - smoothed) / (count + 2)))


def bootstrap_difference(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    weights: Sequence[float],
    rounds: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return ``mean over seeds of sum(a[seed]) / sum(weights)`` minus that of `b`, with a bootstrapped standard error.

    `a` and `b` have the bits of every seed and excerpt, `weights` the bytes of the excerpts. Every round draws seeds of
    `a`, seeds of `b`, and excerpts, the same ones for both, with replacement. So the error contains what other seeds
    and what other text would change.
    """
    draw = random.Random(seed)
    excerpts = range(len(weights))

    def rate(seeds: Sequence[Sequence[float]], chosen: Iterable[int], total: float) -> float:
        chosen = list(chosen)
        return sum(row[i] for row in seeds for i in chosen) / (len(seeds) * total)

    found = []
    for _ in range(rounds):
        chosen = draw.choices(excerpts, k=len(weights))
        total = sum(weights[i] for i in chosen)
        found.append(rate(draw.choices(a, k=len(a)), chosen, total) - rate(draw.choices(b, k=len(b)), chosen, total))
    total = sum(weights)
    return Estimate(rate(a, excerpts, total) - rate(b, excerpts, total), statistics.stdev(found))


def log_flops_at(points: Sequence[tuple[float, Estimate]], bits: Estimate) -> Estimate | None:
    """Return the natural logarithm of the FLOPs at which a curve reaches `bits`, with the errors of all three values.

    Between two neighbouring points ``(flops, bits per byte)``, bits are linear in the logarithm of FLOPs:
    ``log F = l0 + (l1 - l0) (b0 - b) / (b0 - b1)``. Returns None outside the measured range: nothing is extrapolated.
    """
    ordered = sorted(points, key=lambda point: point[0])
    for (flops0, b0), (flops1, b1) in itertools.pairwise(ordered):
        if b0.value >= bits.value >= b1.value and b0.value > b1.value:
            l0, l1 = math.log(flops0), math.log(flops1)
            part = (b0.value - bits.value) / (b0.value - b1.value)
            slope = (l1 - l0) / (b0.value - b1.value)  # of the logarithm, a bit
            parts = slope * (1 - part) * b0.error, slope * part * b1.error, slope * bits.error
            return Estimate(l0 + (l1 - l0) * part, math.hypot(*parts))
    return None


def saved(ours: float, others: Estimate) -> Estimate:
    """Return the share of FLOPs that a model saves which needs `ours` where another needs exp(`others`)."""
    ratio = ours / math.exp(others.value)
    return Estimate(1 - ratio, ratio * others.error)
