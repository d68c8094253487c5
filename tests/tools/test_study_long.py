"""The long rows of the study: equal models, exponents with errors, and what is measured, skipped and kept."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study import long_context, long_report
from study.long_context import MODELS
from study.long_report import Point


def options(**changes: object) -> Namespace:
    chosen = {"contexts": [64, 128], "models": ["transformer", "MegaByte 8"], "passes": ["forward", "step"]}
    return Namespace(**{**chosen, "rounds": 2, "max_tflop": 1.0, "max_gb": 4.0, "max_seconds": 100, **changes})


def test_models_have_equal_parameters() -> None:
    sizes = [long_context.parameters_of(make(context)) for make in MODELS.values() for context in (1 << 10, 1 << 20)]
    assert max(sizes) < 1.01 * min(sizes)


def test_patch_size_by_rule() -> None:
    for context in long_context.CONTEXTS:
        assert 2**-0.5 <= long_context.patch_size_by_rule(context) / context ** (1 / 3) <= 2**0.5


def test_exponent() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    exact = long_report.exponent(sizes, [3 * size**1.5 for size in sizes])
    assert exact.value == pytest.approx(1.5)
    assert exact.error == pytest.approx(0, abs=1e-6)
    # Residuals of +r, -r, -r, +r change no slope, and have the variance 4 r^2 / 2 with two degrees of freedom.
    bent = long_report.exponent(sizes, [size * math.exp(r) for size, r in zip(sizes, (1, -1, -1, 1), strict=True)])
    assert bent.value == pytest.approx(1)
    assert bent.error == pytest.approx(math.sqrt(2 / (5 * math.log(2) ** 2)))
    assert math.isnan(long_report.exponent(sizes[:2], [1, 2]).error)
    # Errors of 0.1 at both ends of log 2 give that of the difference over log 2.
    known = long_report.exponent(sizes[:2], [1, 2], [0.1, 0.1])
    assert (known.value, known.error) == pytest.approx((1, 0.1 * math.sqrt(2) / math.log(2)))
    assert math.isnan(long_report.exponent(sizes[:1], [1]).value)


def test_flops_grow_as_the_papers_say() -> None:
    def growth(model: str) -> float:
        points = [long_context.planned(model, 1 << bits, "forward") for bits in (18, 20)]
        return long_report.exponent_of(points, lambda point: point.gflop).value

    assert growth("transformer") == pytest.approx(2, abs=0.01)
    assert 1.5 < growth("MegaByte 8") < 2  # pairs of patches are most of it
    assert 1 < growth("MegaByte T^(1/3)") < 4 / 3
    assert growth("BLT-Entropy, window 256") == pytest.approx(1, abs=0.01)


def test_files_keep_points(tmp_path: Path) -> None:
    measured = Point("transformer", 1024, "step", 1, 10, 2.5, (1.25, 1.5), 12.5, 0.5)
    skipped = Point("MegaByte 8", 1024, "step", 8.0, 10, 2.5, status="not run: 13 TFLOP")
    long_report.write([measured, skipped], tmp_path / "out.csv")
    again = long_report.read(tmp_path / "out.csv")
    assert again[0] == measured
    assert repr(again[1]) == repr(skipped)  # NaN is not equal to itself


def test_a_sample_in_a_process_of_its_own() -> None:
    found, _ = long_context.in_process("BLT-Entropy", 256, ["forward", "step"], 4.0, 300)
    assert list(found) == ["forward", "step"]
    for us_a_byte, peak_mb in found.values():
        assert 0 < us_a_byte < 1e5
        assert 0 <= peak_mb < 500


@pytest.mark.slow
def test_limits_of_memory_and_time() -> None:
    enough = 100
    assert long_context.in_process("transformer, window 512", 1 << 16, ["forward", "step"], 0.6, enough)[1] == (
        "needs more than 0.6 GB"
    )
    assert long_context.in_process("transformer", 1 << 17, ["forward"], 4.0, 10) == ({}, "takes longer than 10 s")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_runs(model: str, monkeypatch) -> None:
    monkeypatch.setattr(long_context, "SAMPLE_CALLS", 1)
    (run, us_a_byte, peak_mb), *others = long_context.sample(model, 300, ["step"])
    assert (run, others) == ("step", [])
    assert us_a_byte > 0
    assert peak_mb >= 0


def test_points_are_measured_once_and_expensive_ones_only_counted(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def fake(model: str, context: int, runs: list[str], *_: float) -> tuple[dict[str, tuple[float, float]], str]:
        calls.append((model, context))
        passes = runs[:1] if model == "MegaByte 8" else runs
        return {run: (float(len(calls)), 100.0 - len(calls)) for run in passes}, "needs more than 4 GB"

    monkeypatch.setattr(long_context, "in_process", fake)
    out, said = tmp_path / "out.csv", []
    points = long_context.measure(options(), out, said.append)
    assert len(calls) == 2 * 4
    assert len(said) == 2 * 8 - 2  # a pass that fails is not tried again in the second round
    found = {point.key[:3]: point for point in points}
    first = found["transformer", 64, "step"]
    assert first.us_a_byte == (1.0, 5.0)
    assert (first.median, first.peak_mb) == (3.0, 99.0)
    assert found["MegaByte 8", 64, "forward"].us_a_byte == (2.0, 6.0)
    assert found["MegaByte 8", 64, "step"].status == "needs more than 4 GB"

    calls.clear()
    long_context.measure(options(models=["transformer"]), out, said.append)
    assert calls == []
    long_context.measure(options(models=["transformer"], contexts=[256], max_tflop=0.0), out, said.append)
    assert calls == []
    point = next(point for point in long_report.read(out) if point.context == 256)
    assert point.status.startswith("not run: ")
    assert len(long_report.read(out)) == 8 + 2


# --- what it says -----------------------------------------------------------------------------------------------------


def measured(model: str, exponent: float, contexts: list[int], samples: int = 3) -> list[Point]:
    """Return points that grow with an exponent, from 1 us a byte and 1 GB at 16k on; each second one is 5% above."""
    found = []
    for number, context in enumerate(contexts):
        size = (context / 16384) ** (exponent - 1) * (1.05 if number % 2 else 1)
        times, peak = tuple(size * (1 + 0.01 * i) for i in range(samples)), 1e3 * size * context / 16384
        found.append(Point(model, context, "step", 1, 10, size * context / 1e6, times, peak, 2.0))
    return found


def test_report() -> None:
    contexts = [16384, 1 << 16, 1 << 18]
    left_out = Point("transformer", 1 << 20, "step", 1, 10, 64 * 1.048576, status="not run: 67 TFLOP")
    fast = measured("MegaByte T^(1/3)", 1.0, [*contexts, 1 << 20], samples=1)
    lines = long_report.report([*measured("transformer", 2.0, contexts), left_out, *fast], "step").splitlines()
    head = "- A training step, growth of"
    assert lines[:7] == [
        "- A training step of transformer over one of MegaByte T^(1/3), in FLOPs: 1.0 times with 16k bytes and 61.0"
        " times with 1M bytes.",
        "- A training step of transformer over one of MegaByte T^(1/3), in time: 1.01 ± 0.01 times with 16k bytes and"
        " 16.16 ± 0.18 times with 256k bytes.",
        "- A training step, time of a byte in the longest row over that in the shortest: transformer 16.00 ± 0.13 times"
        " (256k over 16k bytes); MegaByte T^(1/3) 1.05 ± 0.01 times (1M over 16k bytes).",
        f"{head} time compared with linear, from 16k bytes on. Faster: transformer T^2.00 ± 0.00; MegaByte T^(1/3)"
        " T^1.01 ± 0.00.",
        f"{head} peak memory compared with linear, from 16k bytes on. Faster: transformer T^2.00 ± 0.02. No clear"
        " difference: MegaByte T^(1/3) T^1.01 ± 0.01.",
        "- A training step on 1,048,576 bytes takes MegaByte T^(1/3) 1.1 s and 67 GB.",
        "- A training step has no time here for: transformer from 1M on (not run: 67 TFLOP).",
    ]
    assert "| step, µs a byte | 16k | 64k | 256k | 1M | grows as |" in lines
    assert "| transformer | 1.01 | 4.24 | 16.2 | – | T^2.00 ± 0.00 |" in lines


def test_errors_of_ratios_come_from_points_with_several_samples() -> None:
    points = [*measured("transformer", 2.0, [1024], samples=2), *measured("MegaByte 8", 1.0, [1024], samples=1)]
    spread = long_report.deviation(points)
    assert spread == pytest.approx(math.log(1.01) / 2**0.5)
    assert long_report.ratio(*points, spread).error == pytest.approx(1.005 / 16 * spread * 1.5**0.5)


def test_what_is_not_measured() -> None:
    assert long_report.report([], "forward") == "This pass was not measured."
    assert math.isnan(long_report.deviation(measured("transformer", 2.0, [1024], samples=1)))
