"""Made-up results of the study, whose answers are known."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from study.families import longer_patches, variants
from study.noise import NOISES
from study.results import Results, Run, Score
from study.tasks import EDITS, TASKS

BUDGETS = (1.0, 4.0, 16.0)
ERROR = 0.004  # deviation over seeds, but for one model
RESTLESS, RESTLESS_ERROR = "bytes B with a window of 512", 0.2
RATES = dict.fromkeys(("patcher", "bytes", "tokens 4k", "tokens 32k", "MegaByte", "BLT-Space", "BLT-Entropy"), 4e-3)
LEAD = {"BLT-Entropy": 0.1, "BLT-Space": 0.1, "tokens 4k": 0.0, "tokens 32k": 0.0, "MegaByte": -0.1, "bytes": -0.1}
SHARES = {"python": 8000, "german": 1000, "amharic": 10, "hindi": 30}


def run_of(model: str, family: str, tflops: float, seed: int, lead: float, rate: float = 4e-3) -> Run:
    """Return a run whose bits fall by 0.2 where the budget quadruples."""
    error = RESTLESS_ERROR if model == RESTLESS else ERROR
    bits = 2.4 - 0.2 * math.log(tflops, 4) - lead + error * (-1, 0, 1)[seed]
    name = f"{model} {tflops} {seed} {rate}"
    patcher = 0.3 if family == "BLT-Entropy" else 0.0
    size = model.removeprefix(family).strip()[:1]
    return Run(
        name, model, family, size, seed, tflops, rate, 10**6, 10**5, 4.5, 1.0, patcher, int(tflops * 1e6), 36.0, bits
    )


def scores_of(run: Run) -> list[Score]:
    found = [Score(run.run, "text", "", group, 10, 1000, 1000 * run.bits, 0) for group in SHARES]
    is_bytes = not run.family.startswith("tokens")
    for name in ("clean", *NOISES):
        more = 1.0 if name == "clean" else 1.1 if is_bytes else 1.2
        found.append(Score(run.run, "noise", name, "all", 10, 1500, 1500 * run.bits * more, 0))
    found += [Score(run.run, "task", name, "all", 100, 0, 0.0, 26 if name != "contains" else 50) for name in TASKS]
    found += [Score(run.run, "misspelling", e, "all", 400, 0, 0.0, 380 if is_bytes else 320) for e in EDITS]
    return found


def answers_of(scores: list[Score]) -> dict[tuple[str, str, str], list[float]]:
    """Return answers of which the first are right."""
    questions = [score for score in scores if score.kind in ("task", "misspelling")]
    return {(s.run, s.kind, s.name): [float(i < s.right) for i in range(s.count)] for s in questions}


def noised_of(scores: list[Score]) -> dict[tuple[str, str], list[float]]:
    """Return the bits of equal excerpts."""
    return {(s.run, s.name): [s.bits / s.count] * s.count for s in scores if s.kind == "noise"}


@cache
def made_up() -> Results:
    """Return results of every part."""
    runs = [run_of("patcher", "patcher", 6.0, 0, 0.0)]
    for family, lead in LEAD.items():
        runs += [run_of(f"{family} B", family, t, seed, lead) for t in BUDGETS for seed in range(3)]
        runs.append(run_of(f"{family} A", family, 1.0, 0, lead + 0.05))  # one seed alone is not the best
        runs.append(run_of(f"{family} B", family, 1.0, 0, -1.0, rate=1e-2))
        runs.append(run_of(f"{family} B", family, 4.0, 0, lead - 0.05, rate=2e-3))
    for i, model in enumerate(longer_patches()[1:], 1):
        # Longer patches are behind at first, and ahead in the end.
        leads = [LEAD["BLT-Entropy"] + 0.02 * i * (k - 1) for k in range(len(BUDGETS))]
        runs += [
            run_of(model.name, model.family, t, s, x) for t, x in zip(BUDGETS, leads, strict=True) for s in range(3)
        ]
    for model in variants():
        lead = {"BLT-Entropy B, without tables": -0.05, "bytes B with tables": 0.1}.get(model.name, 0.1)
        runs += [run_of(model.name, model.family, 4.0, seed, lead) for seed in range(3)]
    for way, lead in (("", 0.0), (" from tokens", 0.03), (" from tokens, slowly", 0.001)):
        runs += [run_of(f"BLT-Entropy 128{way}", "BLT-Entropy", 4.0, seed, lead) for seed in range(3)]
    runs = [replace(run, run=f"{i}") for i, run in enumerate(runs)]
    scores = [score for run in runs if run.size == "B" and run.tflops == 16.0 for score in scores_of(run)]
    return results_of(runs, scores)


def results_of(runs: list[Run], scores: list[Score] = (), **others: Any) -> Results:
    """Return results with the answers and noised excerpts that scores are the sums of."""
    found = {"noised": noised_of(scores), "answers": answers_of(scores), "shares": SHARES, **others}
    return Results(runs, scores, rates=RATES, **found)
