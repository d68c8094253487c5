"""The report of the study, on made-up runs whose answers are known."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study import report, sections
from study.families import FAMILIES, variants
from study.results import Results, Run, load
from study.statistics import Estimate
from study.tasks import EDITS
from study.wording import marked, shown, table, trend, verdict, versus
from study_results import ERROR, SHARES, made_up


@pytest.fixture(scope="module")
def results() -> Results:
    return made_up()


def test_claims(results: Results) -> None:
    lines = dict(line.strip("| ").split(" | ") for line in report.claims(results).splitlines())
    assert len(lines) == 13
    assert lines["BLT matches a model over tokens at equal training FLOPs"] == (
        "At 16 TFLOP: BLT-Entropy B is ahead of tokens 4k B by 0.100 ± 0.003 bits per byte."
    )
    assert (
        "No clear difference between MegaByte B and bytes B"
        in lines["MegaByte is better than a transformer over bytes"]
    )
    assert "4k by 8.7 ± 0.0% in noised over clean bits." in lines["Noise costs BLT less"]
    assert lines["BLT is better at questions about characters"] == (
        "No clear difference between BLT-Entropy and tokens 4k: 0.0 ± 2.1% in right answers."
        " No model is clearly above chance."
    )
    assert "4k by 15.0 ± 1.1% in right choices." in lines["BLT tells words from misspellings"]
    assert "At 4 TFLOP: BLT-Entropy 128 from tokens is ahead of BLT-Entropy 128 by 0.030" in "".join(lines.values())
    # The tokens with the fewest bits are those that BLT is compared with.
    better = [replace(run, bits=run.bits - 0.5) if run.family == "tokens 32k" else run for run in results.runs]
    assert "BLT-Entropy B is behind tokens 32k B by 0.400 ± 0.003" in report.claims(Results(better))


def test_words() -> None:
    assert shown(Estimate(1.23456, 0.01)) == "1.235 ± 0.010"
    assert shown(Estimate(0.0123, math.nan), "%", signed=True) == "+1.2%"
    assert shown(None) == ""
    assert marked(Estimate(-0.5, 0.2)) == "**-0.500 ± 0.200**"
    assert marked(Estimate(-0.5, 0.3)) == "-0.500 ± 0.300"
    assert verdict("A", "B", Estimate(0.5, 0.2)) == "A is ahead of B by 0.500 ± 0.200 bits per byte."
    assert verdict("A", "B", Estimate(-0.5, 0.2)) == "A is behind B by 0.500 ± 0.200 bits per byte."
    assert "No clear difference" in verdict("A", "B", Estimate(-0.5, 0.3))
    leads = {"A": Estimate(0.5, 0.2), "C": Estimate(-0.5, 0.2), "D": Estimate(0.5, 0.3), "E": None}
    assert versus("B", leads) == (
        "Compared with B, in bits per byte. Ahead: A +0.500 ± 0.200. Behind: C -0.500 ± 0.200."
        " No clear difference: D +0.500 ± 0.300."
    )
    assert versus("B", {"E": None}) == ""
    assert "in right answers. No error is known: A +50.0%." in versus(
        "B", {"A": Estimate(0.5, math.nan)}, "%", "right answers"
    )
    assert "one seed each" in verdict("A", "B", Estimate(5.0, math.nan))
    assert "grows by 0.300 ± 0.050" in trend("A over B", Estimate(0.1, 0.03), Estimate(0.4, 0.04))
    assert "not change clearly" in trend("A over B", Estimate(0.1, 0.3), Estimate(0.4, 0.4))
    assert table(["a", "b"], [["c", "d"]]) == "| a | b |\n| --- | ---: |\n| c | d |"


def test_which_runs_are_compared(results: Results) -> None:
    assert results.budgets == [1.0, 4.0, 16.0]
    assert results.patcher is not None
    assert results.rates["tokens 4k"] == 4e-3
    assert results.best("tokens 4k", 1.0) == "tokens 4k B"
    assert [run.seed for run in results.group("tokens 4k B", 1.0)] == [0, 1, 2]
    assert results.deviations[1.0] == pytest.approx(ERROR)
    assert results.bits("tokens 4k B", 4.0) == Estimate(pytest.approx(2.2), pytest.approx(ERROR / math.sqrt(3)))
    assert results.bits("tokens 4k C", 4.0) is None
    # Size C has three seeds too, but no scores.
    assert {family: runs[0].size for family, runs in results.measured.items()} == dict.fromkeys(FAMILIES, "B")
    paid = results.curve("BLT-Entropy", paid=True)
    assert [flops for flops, _, _ in paid] == pytest.approx([1.1, 4.4, 17.6])


def test_errors_over_text(results: Results) -> None:
    ours, theirs = (results.group(f"{family} B", 16.0) for family in ("BLT-Entropy", "bytes"))
    scores = [replace(score, count=2) if score.kind == "text" else score for score in results.scores]
    groups = list(SHARES)
    rows = {run.run: [2000.0] * 8 for run in ours}
    # Excerpts of the second group differ by 0.1 * (1, 2, 3) and 0 bits per byte: the error of their mean is 0.1.
    rows |= {run.run: [2000.0] * 2 + [2100.0 + 100 * run.seed, 2000.0] + [2000.0] * 4 for run in theirs}
    with_text = Results(results.runs, scores, {}, {"bytes": [1000.0] * 8} | rows, SHARES)
    assert with_text.places[groups[1]] == slice(2, 4)
    error = 0.1 * SHARES[groups[1]] / sum(SHARES.values())
    assert with_text.text_error("BLT-Entropy B", "bytes B", 16.0) == pytest.approx(error)
    lead = with_text.lead("BLT-Entropy B", "bytes B", 16.0)
    assert lead == Estimate(pytest.approx(0.2), pytest.approx(math.hypot(error, ERROR * math.sqrt(2 / 3))))
    assert with_text.lead("MegaByte B", "bytes B", 16.0) == results.lead("MegaByte B", "bytes B", 16.0)
    assert with_text.lead("BLT-Entropy B", "nothing B", 16.0) is None
    text = sections.families(with_text)
    assert f"BLT-Entropy {lead.value:+.3f} ± {lead.error:.3f}" in text


def test_families(results: Results) -> None:
    text = sections.families(results)
    assert (
        "- Compared with tokens 4k at 16 TFLOP, in bits per byte. Ahead: BLT-Space +0.100 ± 0.003;"
        " BLT-Entropy +0.100 ± 0.003. Behind: bytes -0.100 ± 0.003; MegaByte -0.100 ± 0.003."
        " No clear difference: tokens 32k +0.000 ± 0.003.\n"
    ) in text
    # A lead of 0.1 is half of what a budget four times as large gives: half of the FLOPs. The patcher adds a tenth.
    assert "without the patcher, BLT-Entropy needs 50.0 ±" in text
    assert "with the patcher counted, BLT-Entropy needs 45.0 ±" in text
    same = "No clear difference between tokens 4k and tokens 32k in training FLOPs at equal bits per byte: "
    assert f"{same}+0.0 ±" in sections.savings(results, "tokens 4k", "tokens 32k", False, "without the patcher")[0]
    assert "| tokens 32k | 2.400 ± 0.002 (B, 1.00, 1.0) | 2.200" in text
    assert "| BLT-Entropy over bytes | **+0.200 ± 0.003** |" in text


def test_overview(results: Results) -> None:
    text = sections.overview(results)
    count = len(results.runs)
    assert f"- {count} runs, which trained for {count / 100:.1f} hours of one core in all.\n" in text
    assert "- Budgets of 1, 4, 16 TFLOP of training; 3 seeds of the models that are compared.\n" in text
    assert "0.0040 at 1 TFLOP; 0.0040 at 4 TFLOP; 0.0040 at 16 TFLOP." in text
    assert "Errors are over seeds alone" in text
    assert "trained for 6 TFLOP more" in text
    assert "| tokens 4k A | 1.00 | 0.10 | 4.50 | 1.00 |  |\n| tokens 4k B |" in text
    assert "choice of held-out excerpts" in sections.overview(Results(results.runs, excerpts={"bytes": [1.0]}))


def test_rates(results: Results) -> None:
    small, middle = sections.rates(results).split("\n\n")
    assert small.startswith("| 1 TFLOP, bits per byte at a learning rate of | 0.004 | 0.01 |")
    assert "| MegaByte B | **2.496** | 3.396 |" in small
    assert middle.startswith("| 4 TFLOP, bits per byte at a learning rate of | 0.002 | 0.004 |")
    assert "| bytes B | 2.346 | **2.296** |" in middle
    assert not sections.rates(Results([run for run in results.runs if run.tflops == 16.0]))


def test_the_smallest_size(results: Results) -> None:
    assert "the smallest size" not in sections.families(results)
    smaller = [replace(run, model="bytes S", size="S") if run.model == "bytes B" else run for run in results.runs]
    text = sections.families(Results([run for run in smaller if run.family == "bytes"]))
    assert "At 16 TFLOP, of bytes the smallest size is the best: a smaller one may be better still." in text


def test_patches(results: Results) -> None:
    text = sections.patches(results)
    assert "At 1 TFLOP: BLT-Entropy B, patches of 8 is behind BLT-Entropy B by 0.040 ± 0.003 bits per byte." in text
    assert "At 16 TFLOP: BLT-Entropy B, patches of 8 is ahead of BLT-Entropy B by 0.040 ± 0.003 bits per byte." in text
    assert "the lead of BLT-Entropy B, patches of 8 over BLT-Entropy B grows by 0.080 ± 0.005 bits per byte." in text
    # All models cost 1 MFLOP a byte, and those with a patcher 1.3.
    assert "At 16 TFLOP, no BLT-Entropy cheaper forward than tokens 32k B has as few bits per byte." in text
    assert "| BLT-Entropy B | 4.50 | 1.00 + 0.30 | 2.300 ± 0.002 (1.0) |" in text


def test_inference(results: Results) -> None:
    def cheaper(run: Run) -> Run:
        costs = {"BLT-Entropy A": 0.2, "BLT-Entropy B": 0.3}
        return replace(run, mflops=costs.get(run.model, 0.8)) if run.family == "BLT-Entropy" else run

    # B costs 0.6 of tokens with its patcher, and is ahead by 0.1. The others are behind, or cost more.
    found = sections.inference(Results([cheaper(run) for run in results.runs]), "tokens 4k")
    assert found == (
        "At 16 TFLOP, BLT-Entropy B spends 40% fewer FLOPs a byte forward than tokens 4k B, patcher included."
        " It is ahead of tokens 4k B by 0.100 ± 0.003 bits per byte."
    )


def test_noise(results: Results) -> None:
    text = sections.noise(results)
    lead = 100 * math.log(1.2 / 1.1)
    assert "Compared with tokens 32k, in noised over clean bits, the mean over noises. Ahead: bytes" in text
    assert f"; BLT-Entropy +{lead:.1f} ± 0.0%.\n" in text
    assert "Behind" not in text
    assert f"| bytes |{f' **+{lead:.1f} ± 0.0%** |' * 7}" in text


def test_tasks(results: Results) -> None:
    text = sections.tasks(results)
    assert (
        "Compared with chance, in right answers, the mean over tasks. No clear difference: bytes +0.9 ± 1.5%;" in text
    )
    assert "Compared with tokens 4k, in words told from their misspellings. Ahead: bytes +15.0 ±" in text
    assert "| chance | 25% | 25% | 50% |" in text
    share = results.shares_right("misspelling", list(EDITS))["bytes"]
    assert share.value == pytest.approx(0.95)
    # The error is that of 1600 questions, not of three times as many.
    assert share.error == pytest.approx(math.sqrt(0.95 * 0.05 / 1600), rel=0.05)


def test_languages(results: Results) -> None:
    text = sections.languages(results)
    assert "Of 4 groups of text, BLT-Entropy is clearly ahead of tokens 4k in 4, behind in 0." in text
    # The lead is the same in all groups.
    assert "The lead of BLT-Entropy over tokens 4k has no clear trend" in text
    assert [line.split(" ")[1] for line in text.splitlines() if line.startswith("| ")][2:] == [
        "python",
        "german",
        "hindi",
        "amharic",
    ]


def test_errors_of_a_group_are_those_of_its_excerpts(results: Results) -> None:
    measured = [run for runs in results.measured.values() for run in runs]
    scores = [replace(score, count=2) if score.kind == "text" else score for score in results.scores]
    excerpts = {run.run: [100.0, 100.0] * 4 for run in measured} | {"bytes": [50.0] * 8}
    for run in results.measured["bytes"]:
        excerpts[run.run] = [100.0, 100.0, 150.0, 50.0, *[100.0] * 4]  # the second group is german
    leads = Results(results.runs, scores, excerpts=excerpts).log_leads("BLT-Entropy", "bytes")
    alone = Results(results.runs, scores).log_leads("BLT-Entropy", "bytes")
    assert leads["python"].error == pytest.approx(alone["python"].error)
    # Parts are 1/4 and -1/4; n / (n - 1) is 2.
    assert leads["german"].error == pytest.approx(math.hypot(alone["german"].error, math.sqrt(2 * 2 / 16)))


def test_from_tokens(results: Results) -> None:
    text = sections.from_tokens(results)
    assert (
        "BLT-Entropy 128 from scratch at 4 TFLOP, in bits per byte. Ahead: BLT-Entropy 128 from tokens +0.030 ±" in text
    )
    assert "No clear difference: BLT-Entropy 128 from tokens, slowly +0.001 ± 0.003." in text


def test_ablations(results: Results) -> None:
    text = sections.ablations(results)
    assert (
        "Compared with bytes B, in bits per byte. Ahead: BLT-Entropy B +0.200 ± 0.003;"
        " BLT-Entropy B, without tables +0.050 ± 0.003; bytes B with tables +0.200 ± 0.003;"
        " bytes B with a window of 512 +0.200 ± 0.003.\n"
    ) in text
    assert "Tables make 75.0 ± 1.5% of the lead of BLT-Entropy B over bytes B.\n" in text
    assert "Behind: BLT-Entropy B, without tables -0.150 ± 0.003. No clear difference: BLT-Entropy B, a quarter" in text
    assert text.count("| +0.000 ± 0.003 |") == len(variants()) - 1
    worse = [replace(r, bits=r.bits + 0.2) if r.model.endswith("without tables") else r for r in results.runs]
    text = sections.ablations(Results(worse))
    assert re.search(r"Tables make 175\.0 ± 2\..% of the lead .* Without them it is behind bytes B\.\n", text)


@pytest.mark.parametrize("part", report.PARTS.values(), ids=list(report.PARTS))
def test_a_part_without_runs_is_empty(part: Callable[[Results], str], results: Results) -> None:
    assert part(Results([])) == ""
    # Some runs are there, one a model, no scores: nothing is claimed.
    some = [run for run in results.runs if run.seed == 0]
    random.Random(0).shuffle(some)
    text = part(Results(some[: len(some) // 2]))
    assert not re.search("ahead|behind|fewer|grows|shrinks|loses", text, re.IGNORECASE)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_files(results: Results, tmp_path: Path) -> None:
    assert results.patcher is not None
    write_csv(tmp_path / "runs.csv", [asdict(run) | {"steps": 1} for run in [results.patcher, *results.runs]])
    write_csv(tmp_path / "scores.csv", list(map(asdict, results.scores)))
    (tmp_path / "curves.csv").write_text("run,0,1\n7,2.5,1.5\n")
    (tmp_path / "excerpts.csv").write_text("run,0,1\nbytes,900,1000\n7,12.5,13\n")
    (tmp_path / "settings.json").write_text(json.dumps({"shares": SHARES}))
    again = load(tmp_path)
    assert again.runs == results.runs
    assert again.scores == results.scores
    assert again.curves == {"7": [2.5, 1.5]}
    assert again.excerpts == {"bytes": [900.0, 1000.0], "7": [12.5, 13.0]}
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {part.__doc__}" for part in report.PARTS.values()
    ]
    assert sections.families(results) in text
