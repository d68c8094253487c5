"""The benches run, measure what they say, and their peers compute what the ops do. No time is asserted."""

from __future__ import annotations

import csv
import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from blt_kernels import cli, patch_starts
from blt_kernels.tools import bench as tool

BENCHES = sorted(path.stem for path in tool.SOURCE.glob("bench_*.py"))


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(tool.SOURCE))
    return importlib.import_module("timing")


@pytest.mark.parametrize("name", BENCHES)
def test_implementations_agree_and_are_measured(timing: ModuleType, name: str) -> None:
    bench = importlib.import_module(name)
    rows = []
    for comparison in bench.comparisons(small=True, compile_peers=False):
        new = timing.compare(comparison, rounds=1, warmup=0)
        assert new[0].implementation == timing.OURS
        assert new[-1].implementation.startswith("limit: ")
        assert new[-1].share_of_limit == 1
        assert all(row.median_ms > 0 for row in new)
        rows += new
    assert all(isinstance(line, str) for line in bench.remarks(rows))


def test_a_wrong_result_is_not_timed(timing: ModuleType) -> None:
    def agree(results: dict[str, int]) -> None:
        assert results[timing.OURS] == results["peer"]

    wrong = timing.Comparison("op", "[]", "int", {timing.OURS: lambda: 1, "peer": lambda: 2}, 1, {}, 1, agree)
    with pytest.raises(AssertionError):
        timing.compare(wrong, rounds=1)


def test_figures(timing: ModuleType) -> None:
    """Shares and ratios from given times: 2 ms against 4 and 6, with a limit of 1 ms for half of the bytes."""
    functions = {timing.OURS: int, "slow": int, "slower": int}
    comparison = timing.Comparison(
        "op", "[1]", "int", functions, 8_000_000, {"copy": int}, 4_000_000, lambda _: None, device="x"
    )
    times = {timing.OURS: [2e-3] * 3, "slow": [4e-3, 4e-3, 1.0], "slower": [6e-3] * 3, "limit: copy": [1e-3] * 3}
    ours, slow, _, limit = timing._rows(comparison, functions, times)
    assert (ours.median_ms, ours.gb_per_s, ours.share_of_limit, ours.ratio_to_best_peer) == (2.0, 4.0, 1.0, 2.0)
    assert (slow.share_of_limit, slow.ratio_to_best_peer) == (0.5, 1.0)
    assert (limit.bytes, limit.gb_per_s, limit.ratio_to_best_peer) == (4_000_000, 4.0, None)


def test_peak_memory_counts_what_is_held_at_a_time(timing: ModuleType) -> None:
    def three() -> torch.Tensor:
        first = torch.ones(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first
        return second + 1  # 8000: second and the result

    assert 8000 <= timing.peak_extra_bytes(three) < 8100  # and a scalar or two
    entropy = torch.rand(5000)
    out_bytes = 4 * (5001 + 2 + 5000 + 5000) + 1
    assert out_bytes <= timing.peak_extra_bytes(lambda: patch_starts(entropy, threshold=0.5)) < out_bytes + 1000


def test_command_goes_on_after_a_wrong_result(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def agree(results: dict[str, int]) -> None:
        assert results[timing.OURS] == 1, "they differ"

    def comparisons(**_options: object) -> list[object]:
        make = partial(
            timing.Comparison, shape="[]", dtype="int", work=1, limits={"none": int}, limit_work=1, agree=agree
        )
        return [
            make(op="wrong", implementations={timing.OURS: int}),
            make(op="right", implementations={timing.OURS: lambda: 1}),
        ]

    monkeypatch.setattr(importlib.import_module("bench_entropy_patch"), "comparisons", comparisons)
    result = CliRunner().invoke(cli.app, ["bench", "entropy_patch", "--rounds", "1", "--threads", "1", "--no-save"])
    assert result.exit_code == 1
    assert "wrong [] int: they differ" in result.output
    assert "right  []  int  1 threads" in result.output


def test_exponent(timing: ModuleType) -> None:
    assert timing.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_command_writes_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    arguments = [
        "bench",
        "entropy_patch",
        "--small",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--no-compile",
        "--csv",
        str(path),
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "facebookresearch/blt" in result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} >= {"entropy_patch", "token_entropy", "patch_starts", "linear_entropy"}
    assert all(float(row["median_ms"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "nothing"), (["--rounds", "0"], "rounds"), (["--threads", "x"], "x"), (["--device", "tpu"], "tpu")],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert result.exit_code in (1, 2)
    assert message in result.output
