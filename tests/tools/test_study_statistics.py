"""The statistics of the study, against values worked by hand."""

from __future__ import annotations

import math
import random
import statistics
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study.statistics import (
    STUDENT,
    Estimate,
    log_flops_at,
    log_ratio,
    log_ratio_at_equal_bits,
    mean_of,
    paired_difference,
    pooled_deviation,
    saved,
    slope_of,
    text_lead,
    with_errors,
)


def test_means_and_differences() -> None:
    assert mean_of([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)), 2)
    assert Estimate(5.0, 3.0) - Estimate(1.0, 4.0) == Estimate(4.0, 5.0)
    # The differences are 1, 2, 3, however far apart the pairs are.
    pairs = [11.0, 2.0, 103.0], [10.0, 0.0, 100.0]
    assert paired_difference(*pairs) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)), 2)
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0])


def test_what_may_be_claimed() -> None:
    assert Estimate(-2.1, 1.0).is_clear
    assert not Estimate(2.0, 1.0).is_clear
    alone = mean_of([5.0])
    assert alone.value == 5.0
    assert math.isnan(alone.error)
    assert not alone.is_clear
    assert not (alone - Estimate(0.0, 0.1)).is_clear


def test_pooled_deviation() -> None:
    # Squares: 2 of the first, 8 of the second; 2 + 1 degrees of freedom, and none of the third.
    assert pooled_deviation([[1.0, 2.0, 3.0], [10.0, 14.0], [7.0]]) == pytest.approx(math.sqrt(10 / 3))
    assert math.isnan(pooled_deviation([[1.0], [2.0]]))


def test_few_values_need_a_larger_difference() -> None:
    assert Estimate(0.0, 1.0).limit == 2.0
    assert Estimate(4.2, 1.0, 4).is_clear
    assert not Estimate(4.2, 1.0, 2).is_clear
    assert [Estimate(0.0, 1.0, df).limit for df in STUDENT] == pytest.approx(list(STUDENT.values()))
    limits = [Estimate(0.0, 1.0, df).limit for df in (0.5, 1.0, 1.7, 2.5, 3.9, 5.0, 7.0, 12.0, 40.0, 1e9)]
    assert limits == sorted(limits, reverse=True)
    assert limits[6] == pytest.approx(2.365, abs=0.01)  # of 7 degrees of freedom
    # Equal errors of three values each have four degrees of freedom, and a known error does not lower them.
    assert with_errors(1.0, Estimate(0.0, 3.0, 2), Estimate(0.0, 3.0, 2)).freedom == pytest.approx(4)
    assert with_errors(1.0, Estimate(0.0, 3.0, 2), Estimate(0.0, 1e-9, 2)).freedom == pytest.approx(2)
    assert with_errors(1.0, Estimate(0.0, 3.0, 2), Estimate(0.0, 4.0)) == Estimate(
        1.0, 5.0, pytest.approx(2 * (25 / 9) ** 2)
    )


def test_chance_passes_one_in_twenty() -> None:
    """Two models with the same mean, whose seeds differ by different amounts, and an error over many excerpts."""
    draw, clear = random.Random(0), 0
    for _ in range(4000):
        a = mean_of([draw.gauss(0.0, 1.0) for _ in range(3)])
        b = mean_of([draw.gauss(0.0, 0.3) for _ in range(3)])
        text = Estimate(0.0, 0.3)
        clear += with_errors(a.value - b.value + draw.gauss(0.0, text.error), a, b, text).is_clear
    assert 0.03 < clear / 4000 < 0.08


def test_errors_over_text_are_those_of_a_bootstrap() -> None:
    draw = random.Random(0)
    sizes = [draw.randint(100, 1000) for _ in range(80)]
    hard = [draw.uniform(1.0, 3.0) for _ in sizes]
    a = [size * h * draw.gauss(1.0, 0.05) for size, h in zip(sizes, hard, strict=True)]
    b = [size * (h * draw.gauss(1.0, 0.05) + 0.3) for size, h in zip(sizes, hard, strict=True)]
    differences, ratios = [], []
    for _ in range(2000):
        chosen = draw.choices(range(80), k=80)
        sum_a, sum_b, size = (sum(values[i] for i in chosen) for values in (a, b, sizes))
        differences.append((sum_a - sum_b) / size)
        ratios.append(math.log(sum_a / sum_b))
    lead, ratio = text_lead(a, b, sizes), log_ratio(a, b)
    assert lead == Estimate(
        pytest.approx((sum(a) - sum(b)) / sum(sizes)), pytest.approx(statistics.stdev(differences), rel=0.1), 79
    )
    assert ratio == Estimate(
        pytest.approx(math.log(sum(a) / sum(b))), pytest.approx(statistics.stdev(ratios), rel=0.1), 79
    )
    # A difficulty that both share does not count.
    assert text_lead(a, [x + 0.1 * size for x, size in zip(a, sizes, strict=True)], sizes).error < 1e-12
    assert log_ratio(a, [2 * x for x in a]).error < 1e-12
    assert math.isnan(text_lead([1.0], [2.0], [3.0]).error)


def test_flops_at_equal_bits() -> None:
    # Half way from e^1 to e^3, where bits fall from 4 to 2: slope 1. The errors are 0.5 * 0.2, 0.5 * 0.4 and 0.2.
    points = [
        (math.exp(3.0), Estimate(2.0, 0.4)),
        (math.exp(1.0), Estimate(4.0, 0.2)),
        (math.exp(9.0), Estimate(1.0, 0)),
    ]
    found = log_flops_at(points, Estimate(3.0, 0.2))
    assert found == Estimate(pytest.approx(2.0), pytest.approx(0.3))
    assert log_flops_at(points, Estimate(1.5, 0.0)).value == pytest.approx(6.0)
    assert log_flops_at(points, Estimate(4.1, 0.0)) is None
    assert log_flops_at(points, Estimate(0.9, 0.0)) is None
    assert log_flops_at(points[:1], Estimate(2.0, 0.0)) is None
    assert saved(Estimate(0.5, 0.3)) == Estimate(pytest.approx(1 - math.exp(-0.5)), pytest.approx(math.exp(-0.5) * 0.3))


def test_ratio_at_equal_bits_is_taken_where_both_curves_are() -> None:
    ours = [(math.exp(1.0), Estimate(3.0, 0.1)), (math.exp(3.0), Estimate(1.0, 0.1))]
    theirs = [(math.exp(1.0), Estimate(4.0, 0.1)), (math.exp(3.0), Estimate(2.0, 0.1))]
    # Ours has 2 bits at e^2, with errors of 0.05, 0.05 and 0.1; theirs at e^3.
    error = math.sqrt(0.05**2 + 0.05**2 + 0.1**2)
    known = Estimate(0.0, 0.0)
    assert log_ratio_at_equal_bits(ours, theirs, known) == Estimate(pytest.approx(1.0), pytest.approx(error))
    assert log_ratio_at_equal_bits(theirs, ours, known) == Estimate(pytest.approx(-1.0), pytest.approx(error))
    assert log_ratio_at_equal_bits(ours, theirs, Estimate(0.0, 0.3)).error == pytest.approx(math.hypot(error, 0.3))
    assert log_ratio_at_equal_bits(ours, [(1.0, Estimate(9.0, 0.1))], known) is None


def test_slope() -> None:
    # The line is y = x; residuals are 1, -2, 1; their squares over one degree of freedom are 6, and x has squares of 2.
    assert slope_of([0.0, 1.0, 2.0], [1.0, -1.0, 3.0]) == Estimate(pytest.approx(1.0), pytest.approx(math.sqrt(3)), 1)
