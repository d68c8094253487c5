"""bench/generation_budget.py names every part of a step. No time is asserted."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.slow
def test_every_part_of_a_step_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("generation_budget")
    module.main(["--small", "--behind", "40", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert {line[19:] for line in lines[1:-1]} == {part for _, _, part in module.PARTS} | {module.REST}
    assert int(lines[-1].split()[0]) == pytest.approx(sum(int(line.split()[0]) for line in lines[1:-1]), abs=10)
