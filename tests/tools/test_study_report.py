"""The report of the study, on made-up runs whose answers are known."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study import report, scores, sections
from study.families import FAMILIES, variants
from study.noise import NOISES
from study.results import Results, Run, Score, load
from study.statistics import Estimate
from study.tasks import EDITS
from study.wording import marked, shown, table, trend, verdict, versus
from study_results import ERROR, RATES, RESTLESS_ERROR, SHARES, made_up, results_of
from tables import names_of, write_rows


@pytest.fixture(scope="module")
def results() -> Results:
    return made_up()


def test_claims(results: Results) -> None:
    lines = dict(line.strip("| ").split(" | ") for line in report.claims(results).splitlines())
    assert len(lines) == 13
    assert lines["Patches and tables of n-grams both make BLT better than bytes"] == (
        "At 4 TFLOP: BLT-Entropy B is ahead of bytes B by 0.200 ± 0.003 bits per byte. BLT-Entropy B, without tables is"
        " ahead of bytes B by 0.050 ± 0.003 bits per byte. BLT-Entropy B is ahead of BLT-Entropy B, without tables by"
        " 0.150 ± 0.003 bits per byte. bytes B with tables has no clear lead over BLT-Entropy B, nor the reverse:"
        " +0.000 ± 0.003 bits per byte."
    )
    assert lines["BLT matches a model over tokens at equal training FLOPs"] == (
        "At 16 TFLOP: BLT-Entropy B is ahead of tokens 4k B by 0.100 ± 0.003 bits per byte."
    )
    assert (
        "MegaByte B has no clear lead over bytes B, nor the reverse: +0.000 ± 0.003 bits per byte."
        in lines["MegaByte is better than a transformer over bytes"]
    )
    assert "4k by 8.7 ± 0.0% in noised over clean bits, the mean over noises." in lines["Noise costs BLT less"]
    assert lines["BLT is better at questions about characters"] == (
        "BLT-Entropy has no clear lead over tokens 4k, nor the reverse: +0.0 ± 0.0% in right answers."
        " No model is clearly above chance."
    )
    assert (
        "4k by 15.0 ± 1.8% in right choices, where an edit keeps the length (replace, swap)."
        in lines["BLT tells words from misspellings"]
    )
    assert "At 4 TFLOP: BLT-Entropy 128 from tokens is ahead of BLT-Entropy 128 by 0.030" in "".join(lines.values())
    # The tokens with the fewest bits are those that BLT is compared with.
    better = [replace(run, bits=run.bits - 0.5) if run.family == "tokens 32k" else run for run in results.runs]
    assert "BLT-Entropy B is behind tokens 32k B by 0.400 ± 0.003" in report.claims(Results(better, rates=RATES))


def test_words() -> None:
    assert shown(Estimate(1.23456, 0.01)) == "1.235 ± 0.010"
    assert shown(Estimate(0.0123, math.nan), "%", signed=True) == "+1.2%"
    assert shown(None) == ""
    assert marked(Estimate(-0.5, 0.2)) == "**-0.500 ± 0.200**"
    assert marked(Estimate(-0.5, 0.3)) == "-0.500 ± 0.300"
    assert verdict("A", "B", Estimate(0.5, 0.2)) == "A is ahead of B by 0.500 ± 0.200 bits per byte."
    assert verdict("A", "B", Estimate(-0.5, 0.2)) == "A is behind B by 0.500 ± 0.200 bits per byte."
    assert verdict("A", "B", Estimate(-0.5, 0.3)) == (
        "A has no clear lead over B, nor the reverse: -0.500 ± 0.300 bits per byte."
    )
    leads = {"A": Estimate(0.5, 0.2), "C": Estimate(-0.5, 0.2), "D": Estimate(0.5, 0.3), "E": None}
    assert versus("B", leads) == (
        "Compared with B, in bits per byte. Ahead: A +0.500 ± 0.200. Behind: C -0.500 ± 0.200."
        " No clear difference: D +0.500 ± 0.300."
    )
    assert versus("B", {"E": None}) == ""
    assert "in right answers. No error is known: A +50.0%." in versus(
        "B", {"A": Estimate(0.5, math.nan)}, "%", "right answers"
    )
    assert verdict("A", "B", Estimate(5.0, math.nan)) == (
        "No error is known for the lead of A over B: +5.000 bits per byte."
    )
    early, late = Estimate(0.1, 0.03), Estimate(0.4, 0.04)
    assert trend("A", "B", early, late) == "With more training, A gains 0.300 ± 0.050 bits per byte on B."
    assert trend("A", "B", late, early) == "With more training, A loses 0.300 ± 0.050 bits per byte to B."
    assert trend("A", "B", Estimate(0.1, 0.3), Estimate(0.4, 0.4)) == (
        "With more training, A neither gains clearly on B nor loses: +0.300 ± 0.500 bits per byte."
    )
    assert trend("A", "B", early, Estimate(0.4, math.nan)) == ""
    assert table(["a", "b"], [["c", "d"]]) == "| a | b |\n| --- | ---: |\n| c | d |"


def test_which_runs_are_compared(results: Results) -> None:
    assert results.budgets == [1.0, 4.0, 16.0]
    assert results.patcher is not None
    assert results.best("tokens 4k", 1.0) == "tokens 4k B"
    assert [run.seed for run in results.group("tokens 4k B", 1.0)] == [0, 1, 2]
    assert results.deviations[1.0] == pytest.approx([ERROR] * len(results.deviations[1.0]))
    assert results.deviations[4.0][-2:] == pytest.approx([ERROR, RESTLESS_ERROR])
    assert results.bits("tokens 4k B", 4.0) == Estimate(pytest.approx(2.2), pytest.approx(ERROR / math.sqrt(3)), 2)
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
    with_text = results_of(results.runs, scores, excerpts={"bytes": [1000.0] * 8} | rows)
    assert with_text.places[groups[1]] == slice(2, 4)
    error = 0.1 * SHARES[groups[1]] / sum(SHARES.values())
    of_text = with_text.text_lead("BLT-Entropy B", "bytes B", 16.0)
    assert of_text == Estimate(pytest.approx(error), pytest.approx(error), 1)  # two excerpts
    lead = with_text.lead("BLT-Entropy B", "bytes B", 16.0)
    assert (lead.value, lead.error) == pytest.approx((0.2, math.hypot(error, ERROR * math.sqrt(2 / 3))))
    assert 1 < lead.freedom < 4
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
    assert (
        "0.0040 (up to 0.0040) at 1 TFLOP; 0.0040 (up to 0.2000) at 4 TFLOP; 0.0040 (up to 0.0040) at 16 TFLOP." in text
    )
    assert "Errors are over seeds alone" in text
    assert "trained for 6 TFLOP more" in text
    assert "| tokens 4k A | 1.00 | 0.10 | 4.50 | 1.00 |  |\n| tokens 4k B |" in text
    assert "choice of held-out excerpts" in sections.overview(
        Results(results.runs, rates=RATES, excerpts={"bytes": [1.0]})
    )


def test_rates(results: Results) -> None:
    small, middle = sections.rates(results).split("\n\n")
    assert small.startswith("| 1 TFLOP, bits per byte at a learning rate of | 0.004 | 0.01 |")
    assert "| MegaByte B | **2.496** | 3.396 |" in small
    assert middle.startswith("| 4 TFLOP, bits per byte at a learning rate of | 0.002 | 0.004 |")
    assert "| bytes B | 2.346 | **2.296** |" in middle
    assert not sections.rates(Results([run for run in results.runs if run.tflops == 16.0], rates=RATES))


def test_the_smallest_size(results: Results) -> None:
    assert "the smallest size" not in sections.families(results)
    smaller = [replace(run, model="bytes S", size="S") if run.model == "bytes B" else run for run in results.runs]
    text = sections.families(Results([run for run in smaller if run.family == "bytes"], rates=RATES))
    assert "At 16 TFLOP, of bytes the smallest size is the best: a smaller one may be better still." in text


def test_patches(results: Results) -> None:
    text = sections.patches(results)
    assert "At 1 TFLOP: BLT-Entropy B, patches of 8 is behind BLT-Entropy B by 0.040 ± 0.003 bits per byte." in text
    assert "At 16 TFLOP: BLT-Entropy B, patches of 8 is ahead of BLT-Entropy B by 0.040 ± 0.003 bits per byte." in text
    assert "BLT-Entropy B, patches of 8 gains 0.080 ± 0.005 bits per byte on BLT-Entropy B." in text
    assert "| BLT-Entropy B | 4.50 | 1.00 + 0.30 | 2.300 ± 0.002 (1.0) |" in text


def test_inference(results: Results) -> None:
    costs = {"BLT-Entropy": 0.2, "BLT-Space": 0.4}
    runs = [replace(run, mflops=costs.get(run.family, run.mflops)) for run in results.runs]
    assert sections.inference(Results(runs, rates=RATES), "tokens 4k") == (
        "At 16 TFLOP: BLT-Entropy B costs 0.50 MFLOP a byte forward, 0.30 of them for the patcher, tokens 4k B 1.00."
        " BLT-Entropy B is ahead of tokens 4k B by 0.100 ± 0.003 bits per byte."
        " At 16 TFLOP: BLT-Space B costs 0.40 MFLOP a byte forward, tokens 4k B 1.00."
        " BLT-Space B is ahead of tokens 4k B by 0.100 ± 0.003 bits per byte."
    )


def test_a_lead_that_changes_with_training(results: Results) -> None:
    assert sections.change_of_lead(results, "MegaByte", "bytes") == (
        "With more training, MegaByte neither gains clearly on bytes nor loses: +0.000 ± 0.005 bits per byte."
    )
    better = [replace(r, bits=r.bits - 0.3) if r.family == "MegaByte" and r.tflops == 16.0 else r for r in results.runs]
    found = Results(better, rates=RATES)
    gains = "With more training, MegaByte gains 0.300 ± 0.005 bits per byte on bytes."
    assert sections.change_of_lead(found, "MegaByte", "bytes") == gains
    assert gains in sections.families(found)
    loses = "With more training, bytes loses 0.300 ± 0.005 bits per byte to MegaByte."
    assert sections.change_of_lead(found, "bytes", "MegaByte") == loses


def test_noise(results: Results) -> None:
    text = scores.noise(results)
    lead = 100 * math.log(1.2 / 1.1)
    assert "Compared with tokens 32k, in noised over clean bits, the mean over noises. Ahead: bytes" in text
    assert f"; BLT-Entropy +{lead:.1f} ± 0.0%.\n" in text
    assert "Behind" not in text
    assert f"| bytes |{f' **+{lead:.1f} ± 0.0%** |' * 7}" in text


def test_noise_has_the_error_of_its_excerpts(results: Results) -> None:
    """One of two noised excerpts costs BLT-Entropy three times what the other does; clean ones cost the same."""
    noised: dict[tuple[str, str], list[float]] = {}
    for family, runs in results.measured.items():
        for run in runs:
            noised |= {(run.run, name): [100.0, 100.0] for name in ("clean", *NOISES)}
            if family == "BLT-Entropy":
                noised[run.run, "drop"] = [150.0, 50.0]
    with_text = results_of(results.runs, results.scores, noised=noised)
    names = list(NOISES)
    # Parts of one noise are 1/4 and -1/4; n / (n - 1) is 2. The mean over noises has a sixth of it.
    assert with_text.noise_lead("BLT-Entropy", "tokens 4k", ["drop"]).error == pytest.approx(math.sqrt(2 * 2 / 16))
    mean = with_text.noise_lead("BLT-Entropy", "tokens 4k", names)
    assert mean.error == pytest.approx(math.sqrt(2 * 2 / 16) / len(names))
    assert mean.value == pytest.approx(math.log(1.2 / 1.1))
    assert mean.freedom == pytest.approx(1)
    assert with_text.noise_lead("BLT-Space", "tokens 4k", names).error == pytest.approx(0.0, abs=1e-9)


def test_noise_by_kind(results: Results) -> None:
    worse = [
        replace(score, bits=score.bits * 1.2) if score.name == "drop" and score.run in of_blt else score
        for of_blt in [{run.run for run in results.measured["BLT-Entropy"]}]
        for score in results.scores
    ]
    found = scores.noise_by_kind(results_of(results.runs, worse), "tokens 4k")
    assert (
        "ahead on antspeak, random case, repeat, swap, upper case. BLT-Entropy is clearly behind on drop. BLT-Space"
        in found
    )
    assert found.count("clearly") == 3


def test_tasks(results: Results) -> None:
    text = scores.tasks(results)
    assert (
        "Compared with chance, in right answers, the mean over tasks. No clear difference: bytes +0.9 ± 4.3%;" in text
    )
    assert (
        "Compared with tokens 4k, in words told from their misspellings, the mean over edits. Ahead: bytes +15.0 ± 1.8%"
        in text
    )
    assert "misspellings, where the edit keeps the length. Ahead: bytes +15.0 ± 1.8%" in text
    assert "| chance | 25% | 25% | 50% |" in text
    share = results.shares_right("misspelling", list(EDITS))["bytes"]
    assert share.value == pytest.approx(0.95)
    # The error is that of 400 words, not of four edits of each, nor of three seeds.
    assert share.error == pytest.approx(math.sqrt(0.95 * 0.05 / 399))
    # Of 400 words, 60 are told by the first model alone, with every edit and every seed.
    for edits in (["swap"], list(EDITS)):
        lead = results.right_lead("misspelling", "bytes", "tokens 4k", edits)
        assert lead.value == pytest.approx(0.15)
        assert lead.error == pytest.approx(math.sqrt(0.15 * 0.85 / 399))


def test_questions_that_nobody_answers_otherwise_have_no_error(results: Results) -> None:
    lead = results.right_lead("task", "bytes", "tokens 4k", results.names("task"))
    assert (lead.value, lead.error, lead.is_clear) == (0.0, 0.0, False)
    some = [
        replace(s, right=36) if s.kind == "task" and s.run in {r.run for r in results.measured["bytes"]} else s
        for s in results.scores
    ]
    better = results_of(results.runs, some)
    lead = better.right_lead("task", "bytes", "tokens 4k", ["spell"])
    assert (lead.value, lead.error) == pytest.approx((0.1, math.sqrt(0.1 * 0.9 / 99)))


def test_languages(results: Results) -> None:
    text = scores.languages(results)
    assert "Of 4 groups of text, BLT-Entropy is clearly ahead of tokens 4k in 4, behind in 0." in text
    # The lead is the same in all groups.
    assert "the lead of BLT-Entropy over tokens 4k changes by" in text
    assert [line.split(" ")[1] for line in text.splitlines() if line.startswith("| ")][2:] == [
        "python",
        "german",
        "hindi",
        "amharic",
    ]
    # Hindi and Amharic have less than a thousandth of the training text each.
    rare = results_of(results.runs, results.scores, shares=SHARES | {"python": 10**5})
    assert (
        "Of 2 languages with less than 0.1% of the training text, BLT-Entropy is clearly ahead of tokens 4k in"
        " amharic, hindi, and behind in none."
    ) in scores.languages(rare)


def test_the_trend_over_languages(results: Results) -> None:
    """Where a language has ten times less text, BLT is better by 2% of the bits, up to a little noise."""
    changed = []
    ours = {run.run for run in results.measured["BLT-Entropy"]}
    for score in results.scores:
        if score.kind == "text" and score.group in SHARES and score.run in ours:
            steps = -math.log10(results.share(score.group)) + {"hindi": 0.01}.get(score.group, 0.0)
            score = replace(score, bits=score.bits * math.exp(-0.02 * steps))
        changed.append(score)
    found = scores.language_trend(results_of(results.runs, changed), "tokens 4k")
    expected = "Where a language has ten times less training text, the lead of BLT-Entropy over tokens 4k changes by"
    assert found == f"{expected} +2.0 ± 0.0%."


def test_errors_of_a_group_are_those_of_its_excerpts(results: Results) -> None:
    measured = [run for runs in results.measured.values() for run in runs]
    scores = [replace(score, count=2) if score.kind == "text" else score for score in results.scores]
    excerpts = {run.run: [100.0, 100.0] * 4 for run in measured} | {"bytes": [50.0] * 8}
    for run in results.measured["bytes"]:
        excerpts[run.run] = [100.0, 100.0, 150.0, 50.0, *[100.0] * 4]  # the second group is german
    leads = results_of(results.runs, scores, excerpts=excerpts).log_leads("BLT-Entropy", "bytes")
    alone = results_of(results.runs, scores).log_leads("BLT-Entropy", "bytes")
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
        " BLT-Entropy B, without tables +0.050 ± 0.003; bytes B with tables +0.200 ± 0.003."
    ) in text
    assert "Behind: BLT-Entropy B, without tables -0.150 ± 0.003. No clear difference: BLT-Entropy B, a quarter" in text
    assert text.count("| +0.000 ± 0.003 |") == len(variants()) - 2
    # One model whose seeds differ much has no part in the errors of the others.
    assert "No clear difference: bytes B with a window of 512 +0.200 ± 0.115.\n" in text
    worse = [replace(r, bits=r.bits + 0.2) if r.model.endswith("without tables") else r for r in results.runs]
    text = sections.ablations(Results(worse, rates=RATES))
    assert "BLT-Entropy B, without tables is behind bytes B by 0.150 ± 0.003 bits per byte." in text


@pytest.mark.parametrize("part", report.PARTS.values(), ids=list(report.PARTS))
def test_one_seed_claims_nothing(part: Callable[[Results], str], results: Results) -> None:
    assert part(Results([], rates={})) == ""
    some = [run for run in results.runs if run.seed == 0]
    names = {run.run for run in some}
    one_seed = results_of([results.patcher, *some], [score for score in results.scores if score.run in names])
    claimed = r"ahead|behind|fewer|gains|loses|no clear|above chance\."
    assert not re.search(claimed, part(one_seed), re.IGNORECASE)


def test_parts_without_some_of_the_runs(results: Results) -> None:
    draw = random.Random(0)
    for _ in range(20):
        some = draw.sample(results.runs, len(results.runs) // 2)
        names = {run.run for run in some}
        found = results_of(some, [score for score in results.scores if score.run in names])
        for part in report.PARTS.values():
            assert "nan" not in part(found)


def test_files(results: Results, tmp_path: Path) -> None:
    assert results.patcher is not None
    runs = [asdict(run) | {"steps": 1} for run in [results.patcher, *results.runs]]
    write_rows(tmp_path / "runs.csv", [*names_of(Run), "steps"], runs, digits=17)
    write_rows(tmp_path / "scores.csv", names_of(Score), map(asdict, results.scores), digits=17)
    (tmp_path / "curves.csv").write_text("run,0,1\n7,2.5,1.5\n")
    (tmp_path / "excerpts.csv").write_text("run,0,1\nbytes,900,1000\n7,12.5,13\n")
    (tmp_path / "noised.csv").write_text("run,noise,0,1\n7,drop,3.5,4\n")
    (tmp_path / "answers.csv").write_text("run,kind,name,0,1\n7,task,spell,1,0\n")
    (tmp_path / "settings.json").write_text(json.dumps({"shares": SHARES, "learning_rates": RATES}))
    again = load(tmp_path)
    assert again.runs == results.runs
    assert again.scores == results.scores
    assert again.curves == {"7": [2.5, 1.5]}
    assert again.excerpts == {"bytes": [900.0, 1000.0], "7": [12.5, 13.0]}
    assert again.noised == {("7", "drop"): [3.5, 4.0]}
    assert again.answers == {("7", "task", "spell"): [1.0, 0.0]}
    assert again.rates == RATES
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {part.capitalize()}" for part in report.PARTS
    ]
    assert sections.families(results) in text
