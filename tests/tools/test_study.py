"""The study of the models: that it runs, that nothing runs twice, and what it writes."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import matplotlib.image
import pytest

from blt_kernels.testing import real_text

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study import report
from study import run as study
from study import text as study_text

CHOSEN = ["byte 128", "entropy 4.5 small"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return a work directory, and the results beside it, of a study of a few steps."""
    root = tmp_path_factory.mktemp("study")
    (root / "files").mkdir()
    text = real_text(24000).replace(b"\0", b"")
    for number in range(150):
        (root / "files" / f"{number}.py").write_bytes(text[160 * number : 160 * (number + 1)])
    run(root, "out", "--jobs", "2")
    return root


def run(root: Path, out: str, *more: str) -> None:
    where = ["--paths", root / "files", "--work", root / "work", "--out", root / out]
    options = ["--tflops", "0.02", "--seeds", "2", "--jobs", "1", "--heldout-bytes", "1000", "--models", *CHOSEN]
    study.main([str(x) for x in [*where, *options, *more]])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_what_it_writes(finished: Path) -> None:
    rows = rows_of(finished / "out" / "runs.csv")
    assert [(row["model"], row["seed"]) for row in rows] == [(name, seed) for name in CHOSEN for seed in "01"]
    for row in rows:
        # Training FLOPs are equal, but for the rounding to whole steps.
        per_step = 3e6 * float(row["mflops"]) * study.BATCH
        assert int(row["steps"]) * per_step == pytest.approx(0.02e12, abs=0.51 * per_step)
        assert int(row["trained_bytes"]) == int(row["steps"]) * study.BATCH
        assert all(1 < float(row[f"bits {condition}"]) < 9 for condition in study_text.CONDITIONS)
    by_seed = {(row["model"], row["seed"]): row["bits clean"] for row in rows}
    assert all(by_seed[name, "0"] != by_seed[name, "1"] for name in CHOSEN)
    entropy = next(row for row in rows if row["model"] == "entropy 4.5 small")
    assert float(entropy["patch_size"]) == pytest.approx(4.5, rel=0.05)
    assert 0 < float(entropy["patcher_mflops"]) < 1

    table = (finished / "out" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table] == ["model", "---", *CHOSEN]
    assert matplotlib.image.imread(finished / "out" / "study.png").std() > 0.05
    settings = json.loads((finished / "out" / "settings.json").read_text())
    assert settings["seeds"] == [0, 1]
    assert settings["heldout_bytes"]["clean"] <= 1000
    assert settings["train_files"] + settings["heldout_files"] <= 150


@pytest.mark.slow
def test_runs_are_reused_and_options_tell_them_apart(finished: Path, monkeypatch) -> None:
    before = rows_of(finished / "out" / "runs.csv")
    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("trained again"))
    run(finished, "again")
    assert rows_of(finished / "again" / "runs.csv") == before
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run(finished, "again", "--fp32")


@pytest.mark.slow
def test_nothing_that_is_measured_on_is_learned(finished: Path) -> None:
    corpus = study_text.prepare([finished / "files"], finished / "work", 5000, 1000)
    learned = b"".join(source.path.read_bytes() for source in corpus.train)
    for source in corpus.heldout["clean"]:
        assert source.path.read_bytes() not in learned
    for source in corpus.sample:
        assert source.path.read_bytes() in learned
    assert sum(source.size for source in corpus.sample) == 5000


@pytest.mark.parametrize("noise", study_text.NOISES)
def test_noise(noise: str) -> None:
    text = real_text(20000)
    noised = study_text.noised(noise, text)
    assert noised == study_text.noised(noise, text) != text
    rate = study_text.RATE
    if noise == "random case":
        assert noised.lower() == text.lower()
        letters = [(a, b) for a, b in zip(text, noised, strict=True) if chr(a).isascii() and chr(a).isalpha()]
        assert sum(a != b for a, b in letters) / len(letters) == pytest.approx(0.5, abs=0.02)
    elif noise == "swapped":
        assert sorted(noised) == sorted(text)
        assert any(text[i : i + 2] == noised[i : i + 2][::-1] != noised[i : i + 2] for i in range(150))
    else:
        sign = -1 if noise == "dropped" else 1
        assert len(noised) / len(text) == pytest.approx(1 + sign * rate, abs=0.01)
        short, long = sorted((text, noised), key=len)
        rest = iter(long)
        assert all(byte in rest for byte in short)  # they come in this order


def test_spread() -> None:
    assert report.spread([1.0]) == (1.0, 0.0)
    assert report.spread([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))


def test_unknown_model() -> None:
    with pytest.raises(SystemExit):
        study.main(["--models", "byte 129"])
