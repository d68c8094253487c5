"""The parts of the study, and the runs of each. Later parts build on what earlier ones found.

(rates) Every family tries learning rates with the smallest budget, then lower ones with the middle budget. The best is
    used everywhere.
(a) Sizes at three budgets. At each, the best size of a family by seed 0 gets the other seeds. The largest budget tries
    the best size of the middle budget and the next larger one. (d) is measured on all of these.
(c) Noise and spelling, measured with the best models of the largest budget.
(b) BLT-Entropy of one inference budget with patches of 4.5, 6 and 8 bytes.
(e) BLT-Entropy that begins as a trained transformer over tokens, against one from scratch.
(f) BLT-Entropy with one part changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from study.families import (
    FAMILIES,
    PATCHER,
    SIZES,
    Model,
    entropy_of,
    longer_patches,
    over_layers_of_tokens,
    variants,
)
from study.measuring import make_suite, measure
from study.results import Score
from study.runs import EXCERPTS, Job, Lab, Outcome, for_all, perform, score_excerpts

PARTS = ("rates", "a", "c", "f", "b", "e")
RATES = (2e-3, 4e-3, 8e-3)  # more are tried where the best is the first or the last
RATE_OF = {"tokens 32k": "tokens 4k"}  # families that begin with the learning rate of another
PATCHER_RATE = 4e-3
MARGIN = 0.02  # a lower learning rate has to be better by so many bits per byte, which is what seeds differ by


@dataclass(frozen=True)
class Budgets:
    """Has TFLOP of training of a run, and seeds."""

    small: float = 1.5
    middle: float = 5.0
    large: float = 15.0
    patcher: float = 6.0
    seeds: int = 3

    def scaled(self, factor: float, seeds: int) -> Budgets:
        small, middle, large, patcher = (x * factor for x in (self.small, self.middle, self.large, self.patcher))
        return Budgets(small, middle, large, patcher, seeds)


SHORT = Budgets().scaled(1 / 8, 2)


class Plan:
    """Runs the parts of the study.

    Attributes
    ----------
    outcomes, jobs, scores, excerpts : dict
        By the name of a run, in the order in which runs were asked for. Only the best models have scores, and only the
        first seed has the bits of excerpts.
    rates : dict from family to float
    best : dict from family to str
        The best size at the largest budget.
    """

    def __init__(self, lab: Lab, budgets: Budgets, processes: int) -> None:
        self.lab, self.budgets, self.processes = lab, budgets, processes
        self.outcomes: dict[str, Outcome] = {}
        self.jobs: dict[str, Job] = {}
        self.scores: dict[str, list[Score]] = {}
        self.excerpts: dict[str, dict[str, list[float]]] = {}
        self.rates: dict[str, float] = {}
        self.best: dict[str, str] = {}

    def run(self, part: str) -> None:
        """Run a part. `prepare` comes before all of them, and "rates" before the others."""
        functions: dict[str, Callable[[], None]] = {
            "rates": self.find_rates,
            "a": self.compare_families,
            "b": self.lengthen_patches,
            "c": self.measure_best,
            "e": self.begin_as_tokens,
            "f": self.change_parts,
        }
        if part != "rates" and not self.rates:
            self.find_rates()
        functions[part]()
        self.find_excerpts()

    def prepare(self) -> None:
        """Train the patcher, and compute what all runs share before processes do."""
        job = Job(PATCHER, self.budgets.patcher, 0, PATCHER_RATE)
        self.perform([job])
        self.lab.patcher = self.lab.folder(job) / "weights.pt"
        assert self.lab.entropies
        for vocabulary in (4096, 32768):
            self.lab.reader(vocabulary)

    def perform(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run jobs, the largest first, and return their outcomes in order."""
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].tflops)
        found = for_all(perform, self.lab, [jobs[i] for i in order], self.processes)
        outcomes = [found[order.index(i)] for i in range(len(jobs))]
        for job, outcome in zip(jobs, outcomes, strict=True):
            self.outcomes[outcome.run], self.jobs[outcome.run] = outcome, job
        return outcomes

    def job(self, model: Model, tflops: float, seed: int) -> Job:
        """Return the job of a model with the learning rate of its family."""
        return Job(model, tflops, seed, self.rates[model.family])

    def bits(self, outcome: Outcome) -> float:
        return outcome.bits_per_byte(self.lab.corpus)

    def find_rates(self) -> None:
        """Choose learning rates by runs of size B with the small budget, then lower them with the middle budget."""
        families = [family for family in FAMILIES if family not in RATE_OF]
        tried: dict[str, dict[float, float]] = {family: {} for family in families}
        wanted = [(family, rate) for family in families for rate in RATES]
        while wanted:
            jobs = [Job(FAMILIES[family]("B"), self.budgets.small, 0, rate) for family, rate in wanted]
            for (family, rate), outcome in zip(wanted, self.perform(jobs), strict=True):
                tried[family][rate] = self.bits(outcome)
            further = [(family, next_rate(tried[family])) for family in families]
            wanted = [(family, rate) for family, rate in further if rate is not None]
        self.rates = {family: min(bits, key=bits.__getitem__) for family, bits in tried.items()}
        self.rates |= {family: self.rates[other] for family, other in RATE_OF.items() if family in FAMILIES}
        self.lower_rates()

    def lower_rates(self) -> None:
        """Halve the learning rate of a family while that is better for its best size of the middle budget."""
        best = self._sizes(dict.fromkeys(FAMILIES, SIZES), self.budgets.middle)
        jobs = {family: self.job(FAMILIES[family](size), self.budgets.middle, 0) for family, size in best.items()}
        bits = dict(zip(jobs, map(self.bits, self.perform([*jobs.values()])), strict=True))
        while jobs:
            jobs = {family: replace(job, learning_rate=job.learning_rate / 2) for family, job in jobs.items()}
            found = dict(zip(jobs, map(self.bits, self.perform([*jobs.values()])), strict=True))
            jobs = {family: job for family, job in jobs.items() if found[family] < bits[family] - MARGIN}
            bits |= {family: found[family] for family in jobs}
            self.rates |= {family: job.learning_rate for family, job in jobs.items()}

    def compare_families(self) -> None:
        """Find the best size of every family at each budget, and run it with all seeds."""
        budgets = self.budgets
        small = self._sizes(dict.fromkeys(FAMILIES, SIZES[:3]), budgets.small)
        middle = self._sizes(dict.fromkeys(FAMILIES, SIZES), budgets.middle)
        larger = {f: SIZES[SIZES.index(size) : SIZES.index(size) + 2] for f, size in middle.items()}
        self.best = self._sizes(larger, budgets.large)
        jobs = []
        for tflops, best in ((budgets.large, self.best), (budgets.middle, middle), (budgets.small, small)):
            for family, size in best.items():
                jobs += [self.job(FAMILIES[family](size), tflops, seed) for seed in range(1, budgets.seeds)]
        self.perform(jobs)

    def _sizes(self, tried: dict[str, str], tflops: float) -> dict[str, str]:
        """Return the best of the sizes that are tried for each family."""
        pairs = [(family, size) for family, sizes in tried.items() for size in sizes]
        outcomes = self.perform([self.job(FAMILIES[family](size), tflops, 0) for family, size in pairs])
        best: dict[str, tuple[float, str]] = {}
        for (family, size), outcome in zip(pairs, outcomes, strict=True):
            best[family] = min(best.get(family, (float("inf"), "")), (self.bits(outcome), size))
        return {family: size for family, (_, size) in best.items()}

    def measure_best(self) -> None:
        """Measure noise, tasks and misspellings with the best models of the largest budget."""
        if not self.best:
            self.compare_families()
        seeds = range(self.budgets.seeds)
        jobs = [
            self.job(FAMILIES[f](size), self.budgets.large, seed) for f, size in self.best.items() for seed in seeds
        ]
        measured = partial(measure, suite=make_suite(self.lab.corpus))
        for job, scores in zip(jobs, for_all(measured, self.lab, jobs, self.processes), strict=True):
            self.scores[self.lab.folder(job).name] = scores

    def find_excerpts(self) -> None:
        """Collect the bits of excerpts: how models differ from excerpt to excerpt is much the same for every seed."""
        jobs = [job for job in self.jobs.values() if job.seed == 0 and job.model is not PATCHER]
        jobs = [job for job in jobs if job == self.job(job.model, job.tflops, 0) or job.init is not None]
        folders = [self.lab.folder(job) for job in jobs]
        missing = [job for job, path in zip(jobs, folders, strict=True) if not (path / EXCERPTS).exists()]
        for_all(score_excerpts, self.lab, missing, self.processes)
        self.excerpts |= {path.name: json.loads((path / EXCERPTS).read_text()) for path in folders}

    def lengthen_patches(self) -> None:
        """Train models with longer patches, and for comparison transformers over tokens with one seed."""
        budgets = (self.budgets.small, self.budgets.middle, self.budgets.large)
        models, seeds = longer_patches(), range(self.budgets.seeds)
        jobs = [self.job(model, tflops, seed) for tflops in budgets for model in models for seed in seeds]
        tokens = [model for make in FAMILIES.values() if (model := make("B")).vocabulary is not None]
        self.perform(jobs + [self.job(model, tflops, 0) for tflops in budgets for model in tokens])

    def begin_as_tokens(self) -> None:
        """Train BLT-Entropy from scratch, and from the layers of a transformer over tokens of the largest budget."""
        budgets, (tokens, blt) = self.budgets, over_layers_of_tokens()
        seeds = range(budgets.seeds)
        sources = [self.job(tokens, budgets.large, seed) for seed in seeds]
        self.perform(sources)
        jobs = [self.job(blt, budgets.middle, seed) for seed in seeds]
        begun = replace(blt, name=f"{blt.name} from tokens")
        slow = replace(blt, name=f"{blt.name} from tokens, a tenth of the rate")
        for source, job in zip(sources, list(jobs), strict=True):
            init = self.lab.folder(source) / "weights.pt"
            jobs += [replace(job, model=begun, init=init), replace(job, model=slow, init=init, global_scale=0.1)]
        self.perform(jobs)

    def change_parts(self) -> None:
        seeds = range(self.budgets.seeds)
        models = [entropy_of("B"), FAMILIES["bytes"]("B"), *variants("B")]
        self.perform([self.job(model, self.budgets.middle, seed) for seed in seeds for model in models])


def next_rate(tried: dict[float, float]) -> float | None:
    """Return the learning rate to try next: half the lowest or twice the highest if it is the best so far."""
    best, rates = min(tried, key=tried.__getitem__), sorted(tried)
    if len(rates) >= len(RATES) + 2:
        return None
    return {rates[0]: best / 2, rates[-1]: best * 2}.get(best)
