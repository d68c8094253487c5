"""The pictures of the study, of made-up results, of a part of them, and of none."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))
sys.path.append(str(Path(__file__).parents[2] / "docs"))

from extensions.figures import LIGHT, write
from study.results import Results
from study_results import RATES, made_up, results_of

NAMES = [path.stem for path in sorted((Path(__file__).parents[2] / "docs" / "figures").glob("study_*.py"))]
FIGURES = [name for name in NAMES if name != "study_long"]  # of another measurement


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"figures.{name}")
    whole = made_up()
    curves = {run.run: [3.0 - 0.01 * i for i in range(100)] for run in whole.runs}
    found = results_of([whole.patcher, *whole.runs], whole.scores, curves=curves)
    monkeypatch.setattr(module, "results", lambda: found)
    figure = module.draw(LIGHT)
    assert all(axes.containers or axes.lines for axes in figure.axes)
    light, dark = (path.read_text() for path in write(name, tmp_path))
    assert light != dark

    first = [run for run in whole.runs if run.tflops == whole.budgets[0] and run.seed == 0]
    for partial in (None, Results([], rates={}), Results(first, rates=RATES)):
        monkeypatch.setattr(module, "results", lambda partial=partial: partial)
        drawn = module.draw(LIGHT)
        assert drawn is None or (partial is not None and partial.runs)
    monkeypatch.setattr(module, "results", lambda: None)
    assert write(name, tmp_path) == []
