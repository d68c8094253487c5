"""Means with standard errors, and what may be claimed from them.

All errors are standard errors of normal estimates. The study claims a difference if it is larger than twice its
standard error. For a normal estimate with a known deviation, chance passes that rule once in 22 comparisons. With the
deviation of three seeds (t with 2 degrees of freedom), chance passes it once in 5.4. So the deviation over seeds is
pooled over models (`pooled_deviation`) where several models are compared. The error over the choice of held-out text
(`text_error`) is apart from it: all seeds are measured on the same excerpts.
"""

from __future__ import annotations

import itertools
import math
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
        """Says whether the value differs from 0 by more than twice its standard error; False for a NaN."""
        return abs(self.value) > CLEAR * self.error

    def __sub__(self, other: Estimate) -> Estimate:
        """Return the difference of independent estimates."""
        return Estimate(self.value - other.value, math.hypot(self.error, other.error))

    def with_error(self, error: float) -> Estimate:
        """Return the same value with one more independent error."""
        return Estimate(self.value, math.hypot(self.error, error))


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


def text_error(a: Sequence[float], b: Sequence[float], sizes: Sequence[float]) -> float:
    """Return the standard error of ``sum(a) / sum(sizes) - sum(b) / sum(sizes)`` over the choice of excerpts.

    `a` and `b` have the bits of two models for the same excerpts, `sizes` the bytes of these. The error is that of a
    ratio of sums: what is hard for both models does not count.
    """
    total, lead = sum(sizes), (sum(a) - sum(b)) / sum(sizes)
    parts = [(x - y - lead * size) / total for x, y, size in zip(a, b, sizes, strict=True)]
    return math.sqrt(len(parts) / (len(parts) - 1) * sum(part**2 for part in parts)) if len(parts) > 1 else math.nan


def log_ratio_error(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the standard error of ``log(sum(a) / sum(b))`` over the choice of excerpts."""
    total_a, total_b = sum(a), sum(b)
    parts = [x / total_a - y / total_b for x, y in zip(a, b, strict=True)]
    return math.sqrt(len(parts) / (len(parts) - 1) * sum(part**2 for part in parts)) if len(parts) > 1 else math.nan


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


def log_ratio_at_equal_bits(
    ours: Sequence[tuple[float, Estimate]], theirs: Sequence[tuple[float, Estimate]], text_error: float = 0.0
) -> Estimate | None:
    """Return ``log(FLOPs of theirs / FLOPs of ours)`` at the lowest bits per byte that both curves reach.

    `text_error` is that of the difference of the two in bits per byte. Returns None if one curve does not cross the
    lowest point of the other.
    """
    (our_flops, our_best), (their_flops, their_best) = (min(c, key=lambda p: p[1].value) for c in (ours, theirs))
    if our_best.value <= their_best.value:
        found = log_flops_at(ours, their_best.with_error(text_error))
        return found and Estimate(math.log(their_flops) - found.value, found.error)
    found = log_flops_at(theirs, our_best.with_error(text_error))
    return found and Estimate(found.value - math.log(our_flops), found.error)


def saved(log_ratio: Estimate) -> Estimate:
    """Return the share of FLOPs that the logarithm of a ratio, theirs over ours, says that ours saves."""
    ratio = math.exp(-log_ratio.value)
    return Estimate(1 - ratio, ratio * log_ratio.error)


def share_of_lead(base: Estimate, without: Estimate, full: Estimate) -> Estimate:
    """Return ``(without - full) / (base - full)``: the part of the lead of `full` over `base` that `without` lacks."""
    lead, missing = base.value - full.value, without.value - full.value
    parts = without.error / lead, missing * base.error / lead**2, (missing - lead) * full.error / lead**2
    return Estimate(missing / lead, math.hypot(*parts))


def slope_of(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Return the slope of the least-squares line through at least three points, with the error that residuals give."""
    line = statistics.linear_regression(x, y)
    residuals = sum((b - line.slope * a - line.intercept) ** 2 for a, b in zip(x, y, strict=True))
    mean = statistics.fmean(x)
    return Estimate(line.slope, math.sqrt(residuals / (len(x) - 2) / sum((a - mean) ** 2 for a in x)))
