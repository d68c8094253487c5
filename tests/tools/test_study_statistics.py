"""The statistics of the study, against values worked by hand."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study.statistics import (
    Estimate,
    bootstrap_difference,
    log_flops_at,
    mean_of,
    paired_difference,
    pooled_deviation,
    saved,
    share_of,
)


def test_means_and_differences() -> None:
    assert mean_of([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_of([1.0, 2.0], deviation=4.0) == Estimate(1.5, pytest.approx(4 / math.sqrt(2)))
    assert Estimate(5.0, 3.0) - Estimate(1.0, 4.0) == Estimate(4.0, 5.0)
    # The differences are 1, 2, 3, however far apart the pairs are.
    assert paired_difference([11.0, 2.0, 103.0], [10.0, 0.0, 100.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)))
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


def test_shares() -> None:
    assert share_of(1, 2) == Estimate(0.5, pytest.approx(0.25))
    assert share_of(10, 10).error == pytest.approx(math.sqrt(11 / 12 * 1 / 12 / 12))


def test_bootstrap_without_variation() -> None:
    even = bootstrap_difference([[2.0, 4.0]] * 2, [[1.0, 2.0]], [1.0, 2.0], rounds=50)
    assert even == Estimate(1.0, pytest.approx(0.0, abs=1e-12))


def test_bootstrap_has_the_error_of_seeds_and_of_excerpts() -> None:
    draw = random.Random(0)
    excerpts = [draw.gauss(0.0, 1.0) for _ in range(100)]
    zero = [[0.0] * 100]
    by_excerpt = bootstrap_difference([excerpts], zero, [1.0] * 100, rounds=400)
    mean = sum(excerpts) / 100
    deviation = math.sqrt(sum((x - mean) ** 2 for x in excerpts) / 100)
    assert by_excerpt.value == pytest.approx(mean)
    assert by_excerpt.error == pytest.approx(deviation / 10, rel=0.1)
    # What is hard for both does not count: the excerpts are paired.
    assert bootstrap_difference([excerpts], [[x + 1.0 for x in excerpts]], [1.0] * 100).error < 1e-12
    by_seed = bootstrap_difference([[float(seed)] * 100 for seed in range(9)], zero, [1.0] * 100, rounds=400)
    assert by_seed.value == pytest.approx(4.0)
    assert by_seed.error == pytest.approx(math.sqrt(60 / 9) / 3, rel=0.1)


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
    assert saved(math.exp(1.5), found) == Estimate(
        pytest.approx(1 - math.exp(-0.5)), pytest.approx(math.exp(-0.5) * 0.3)
    )
