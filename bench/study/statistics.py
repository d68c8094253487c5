"""Means with standard errors, and what may be claimed from them.

The study claims a difference if it is larger than twice its standard error, and larger than Student's t allows where
few values give the error: with 95% of the t distribution (`Estimate.limit`), chance passes in one of 20 comparisons.
Models differ much in how their seeds differ, so every model has the error of its own seeds. Errors of independent parts
are joined with the degrees of freedom of Welch and Satterthwaite. The error over the choice of held-out text
(`text_lead`) is apart from that over seeds: all seeds are measured on the same excerpts.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

CLEAR = 2.0  # standard errors, at least
# By degrees of freedom, the standard errors between which are 95% of Student's t distribution.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 30: 2.042}


@dataclass(frozen=True)
class Estimate:
    """Has a value and its standard error, which is NaN if one run alone gave the value.

    `freedom` are the degrees of freedom of the error, infinite if the error is known.
    """

    value: float
    error: float
    freedom: float = math.inf

    @property
    def limit(self) -> float:
        """The number of standard errors beyond which a value differs from 0, interpolated in ``1 / freedom``."""
        if self.freedom <= 1:
            return STUDENT[1]
        points = [*STUDENT.items(), (math.inf, CLEAR)]
        for (low, above), (high, below) in itertools.pairwise(points):
            if self.freedom <= high:
                part = (1 / self.freedom - 1 / high) / (1 / low - 1 / high)
                return below + part * (above - below)
        return math.nan

    @property
    def is_clear(self) -> bool:
        """Says whether the value differs from 0 by more than `limit` standard errors; False for a NaN."""
        return abs(self.value) > self.limit * self.error

    def __sub__(self, other: Estimate) -> Estimate:
        """Return the difference of independent estimates."""
        return with_errors(self.value - other.value, self, other)

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.error * abs(factor), self.freedom)


def with_errors(value: float, *parts: Estimate) -> Estimate:
    """Return `value` with the independent errors of all parts, and degrees of freedom as Welch and Satterthwaite."""
    squares = [part.error**2 for part in parts]
    below = sum(square**2 / part.freedom for square, part in zip(squares, parts, strict=True))
    return Estimate(value, math.sqrt(sum(squares)), sum(squares) ** 2 / below if below else math.inf)


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), deviation / math.sqrt(len(values)), max(len(values) - 1, 1))


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
    """Return the mean of `a[i] - b[i]`, values of the same question, and its standard error."""
    return mean_of([x - y for x, y in zip(a, b, strict=True)])


def text_lead(theirs: Sequence[float], ours: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """Return ``sum(theirs) / sum(sizes) - sum(ours) / sum(sizes)``, with its error over the choice of excerpts.

    `theirs` and `ours` have the bits of two models for the same excerpts, `sizes` the bytes of these. The error is that
    of a ratio of sums: what is hard for both models does not count.
    """
    total, lead = sum(sizes), (sum(theirs) - sum(ours)) / sum(sizes)
    return of_parts(lead, [(x - y - lead * size) / total for x, y, size in zip(theirs, ours, sizes, strict=True)])


def log_ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return ``log(sum(a) / sum(b))``, with its error over the choice of excerpts."""
    return of_parts(
        math.log(sum(a) / sum(b)), [x - y for x, y in zip(fractions_of_sum(a), fractions_of_sum(b), strict=True)]
    )


def fractions_of_sum(values: Sequence[float]) -> list[float]:
    """Return the values over their sum: what each adds to the logarithm of the sum, to first order."""
    total = sum(values)
    return [value / total for value in values]


def of_parts(value: float, parts: Sequence[float]) -> Estimate:
    """Return a value with its error over the choice of excerpts; `parts` are what each adds to it, to first order."""
    if len(parts) < 2:
        return Estimate(value, math.nan)
    return Estimate(value, math.sqrt(len(parts) / (len(parts) - 1) * sum(x**2 for x in parts)), len(parts) - 1)


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
            parts = b0.times(slope * (1 - part)), b1.times(slope * part), bits.times(slope)
            return with_errors(l0 + (l1 - l0) * part, *parts)
    return None


def log_ratio_at_equal_bits(
    ours: Sequence[tuple[float, Estimate]], theirs: Sequence[tuple[float, Estimate]], text: Estimate
) -> Estimate | None:
    """Return ``log(FLOPs of theirs / FLOPs of ours)`` at the lowest bits per byte that both curves reach.

    `text` has the error over text of the difference of the two in bits per byte. Returns None if one curve does not
    cross the lowest point of the other.
    """
    (our_flops, our_best), (their_flops, their_best) = (min(c, key=lambda p: p[1].value) for c in (ours, theirs))
    if our_best.value <= their_best.value:
        found = log_flops_at(ours, with_errors(their_best.value, their_best, text))
        return found and replace(found, value=math.log(their_flops) - found.value)
    found = log_flops_at(theirs, with_errors(our_best.value, our_best, text))
    return found and replace(found, value=found.value - math.log(our_flops))


def saved(log_ratio: Estimate) -> Estimate:
    """Return the share of FLOPs that the logarithm of a ratio, theirs over ours, says that ours saves."""
    ratio = math.exp(-log_ratio.value)
    return replace(log_ratio.times(ratio), value=1 - ratio)


def slope_of(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Return the slope of the least-squares line through at least three points, with the error that residuals give."""
    line = statistics.linear_regression(x, y)
    residuals = sum((b - line.slope * a - line.intercept) ** 2 for a, b in zip(x, y, strict=True))
    mean = statistics.fmean(x)
    return Estimate(line.slope, math.sqrt(residuals / (len(x) - 2) / sum((a - mean) ** 2 for a in x)), len(x) - 2)
