"""bench/compare.py finds a slower revision, and calls equal ones equal. The revisions are folders of a few lines."""

from __future__ import annotations

import importlib
import math
import random
import shutil
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from blt_kernels.cli import bench as tool

BENCH = """
from types import SimpleNamespace
from blt_kernels import work

def comparisons(*, small=False, device="cpu", compile_peers=True):
    for shape in {shapes}:
        def make(shape=shape):
            if shape == "broken":
                raise ValueError("no such shape")
            return SimpleNamespace(op="op", shape=shape, dtype="int64", implementations=dict(blt_kernels=work))
        yield make
"""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(tool.SOURCE))
    return importlib.import_module("compare")


@pytest.fixture
def revisions(compare: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start the process of a revision whose op takes `work` and which has comparisons of `shapes`."""
    started = []

    def start(
        name: str,
        work: str = "sum(range(200_000))",
        shapes: tuple[str, ...] = ("one", "two"),
        counting: Path | None = None,
    ) -> Any:
        for folder in ("blt_kernels", "bench"):
            (tmp_path / name / folder).mkdir(parents=True)
        (tmp_path / name / "blt_kernels" / "__init__.py").write_text(f"def work():\n    return {work}\n")
        (tmp_path / name / "bench" / "bench_op.py").write_text(BENCH.format(shapes=shapes))
        started.append(compare.Revision(name, tmp_path / name, 1, None, counting))
        return started[-1]

    yield start
    for revision in started:
        revision.close()


def run(compare: ModuleType, pair: tuple[Any, Any], **options: Any) -> list[Any]:
    settings = {"small": True, "match": "", "rounds": 7, "budget": 30.0, "clock": "cpu", "threshold": 0.05, **options}
    return list(compare.compare(pair, "op", **settings))


def test_a_slower_revision_is_found(compare: ModuleType, revisions: Callable[..., Any]) -> None:
    pair = revisions("base"), revisions("new", work="sum(range(400_000))")
    rows = run(compare, pair)
    assert [row.name for row in rows] == [("op", "one", "int64"), ("op", "two", "int64")]
    for row in rows:
        assert 1.5 < row.ratio < 2.7
        assert row.low <= row.ratio <= row.high
        assert row.verdict(0.05) == "slower"
        assert row.rounds == 21  # measured again with new inputs, since it looked slower
    assert [row.verdict(0.05) for row in run(compare, pair[::-1], match="op, two")] == ["faster"]


def test_the_command_fails_where_the_working_tree_is_slower(
    compare: ModuleType,
    revisions: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base is not built here: its folder is there."""
    folders = {"fast": tmp_path / "fast", "slow": tmp_path / "slow"}
    revisions("fast", shapes=("one",)), revisions("slow", work="sum(range(400_000))", shapes=("one",))
    monkeypatch.setattr(compare, "build", lambda revision, isa: folders[revision])
    for base, new, code, verdict in (("fast", "slow", 1, "slower"), ("slow", "fast", 0, "faster")):
        monkeypatch.setattr(compare, "ROOT", folders[new])
        assert compare.main([base, "--op", "op", "--rounds", "6"]) == code
        assert verdict in capsys.readouterr().out


def test_equal_revisions_are_equal(compare: ModuleType, revisions: Callable[..., Any]) -> None:
    rows = run(compare, (revisions("base"), revisions("new")), rounds=15, threshold=0.2)
    assert [row.verdict(0.2) for row in rows] == ["", ""]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_instructions_are_counted(compare: ModuleType, revisions: Callable[..., Any], tmp_path: Path) -> None:
    """Equal revisions differ by less than a thousandth, and a hundredth more is found, whatever else runs."""
    start = partial(revisions, shapes=("one",), counting=compare.instructions.prepare(tmp_path))
    base, equal, more = (
        start(name, work=f"sum(range({n}))")
        for name, n in zip(("base", "equal", "more"), (9_000, 9_000, 9_180), strict=True)
    )
    settings = {"clock": "instructions", "rounds": 6, "threshold": 0.01}
    (row,) = run(compare, (base, equal), **settings)
    assert 0.999 < row.low <= row.high < 1.001
    assert row.base > 9_000
    (row,) = run(compare, (base, more), **settings)
    assert 1.015 < row.low <= row.high < 1.025
    assert row.verdict(0.01) == "slower"


def test_a_missing_valgrind_is_told(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="expected valgrind in PATH"):
        compare.instructions.prepare(tmp_path)


def test_comparisons_are_paired_by_name(compare: ModuleType, revisions: Callable[..., Any]) -> None:
    pair = revisions("base", shapes=("broken", "old", "both")), revisions("new", shapes=("both", "young", "broken"))
    both, *messages = run(compare, pair, rounds=6)
    assert both.name[1] == "both"
    assert messages == [
        "only new has op, young, int64",
        "comparison 2 of op: new: ValueError: no such shape",
        "comparison 0 of op: base: ValueError: no such shape",
        "only base has op, old, int64",
    ]


def test_a_revision_loads_its_own_package(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a package gets what is installed: here, that of another folder."""
    (tmp_path / "other" / "blt_kernels").mkdir(parents=True)
    (tmp_path / "other" / "blt_kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    with pytest.raises(compare.RevisionError, match=r"ImportError: expected blt_kernels of .*, got "):
        compare.Revision("base", tmp_path / "base", 1, None)


def test_a_process_that_dies_is_told(compare: ModuleType, revisions: Callable[..., Any]) -> None:
    revision = revisions("base", work="__import__('os')._exit(3)")
    revision.load("op", True)
    revision.make(0)
    with pytest.raises(RuntimeError, match="the process of base ended"):
        revision.ask("run", 1, "cpu")


def test_interval(compare: ModuleType) -> None:
    assert compare.interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    with pytest.raises(ValueError, match="got 5"):
        compare.interval([1, 2, 3, 4, 5])
    values = [float(n) for n in range(1, 31)]  # 30 values give the 10th from both ends, as in tables of the sign test
    assert compare.interval(values) == (10, 21)


def test_interval_covers_the_median_as_often_as_it_says(compare: ModuleType) -> None:
    """The ratios are skewed, as times are: half of them lie above exp(0)."""
    draw, covered = random.Random(0), []
    for _ in range(2000):
        low, high = compare.interval([math.exp(draw.expovariate(1) - math.log(2)) for _ in range(20)])
        covered.append(low <= 1 <= high)
    assert 0.945 < statistics.mean(covered) < 0.975  # 20 values give 0.9586


@pytest.mark.parametrize(
    "arguments",
    [["HEAD", "--rounds", "5"], ["HEAD", "--threads", "2"], ["HEAD", "--clock", "instructions", "--threads", "2"]],
)
def test_options_are_checked(compare: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert "expected" in capsys.readouterr().err
