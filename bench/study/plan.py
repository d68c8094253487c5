"""The parts of the study, and the runs of each. Later parts build on what earlier ones found.

(rates) Every family tries learning rates with the smallest budget, then halves the best one with the middle budget
    while that is better. What it ends with is used everywhere.
(a) Sizes at three budgets. At each, the best size of a family by seed 0 gets the other seeds. The largest budget tries
    the best size of the middle budget, and larger ones while they are better. (d) is measured on all of these.
(c) Noise and spelling, measured with the best models of the largest budget.
(b) BLT-Entropy of one inference budget with patches of 4.5, 6 and 8 bytes.
(e) BLT-Entropy that begins as a trained transformer over tokens, against one from scratch.
(f) BLT-Entropy with one part changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

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
from study.measuring import Answers, Suite, make_suite, measure
from study.runs import Job, Lab, Outcome, for_all, perform

PARTS = ("rates", "a", "c", "f", "b", "e")
RATES = (2e-3, 4e-3, 8e-3)  # more are tried where the best is the first or the last
RATE_OF = {"tokens 32k": "tokens 4k"}  # families that begin with the learning rate of another
PATCHER_RATE = 4e-3


@dataclass(frozen=True)
class Scope:
    """Says how much of the study runs.

    `small`, `middle`, `large` and `patcher` are TFLOP of training of a run, `measured` is the share of the held-out
    text that is measured. `rates` are learning rates by family, for the case that `parts` has no "rates".
    """

    small: float = 1.5
    middle: float = 5.0
    large: float = 15.0
    patcher: float = 6.0
    seeds: int = 3
    measured: float = 0.5
    parts: Sequence[str] = PARTS  # in the order of `PARTS`
    rates: Mapping[str, float] = field(default_factory=dict)

    def scaled(self, factor: float) -> Scope:
        small, middle, large, patcher = (x * factor for x in (self.small, self.middle, self.large, self.patcher))
        return replace(self, small=small, middle=middle, large=large, patcher=patcher)


# A first look: half of the parts, with the learning rates that the whole study found.
SHORT = Scope(
    small=0.2,
    middle=0.75,
    large=2.0,
    patcher=0.5,
    seeds=2,
    measured=0.125,
    parts=("a", "c", "f"),
    rates={
        "bytes": 4e-3,
        "tokens 4k": 8e-3,
        "tokens 32k": 8e-3,
        "MegaByte": 4e-3,
        "BLT-Space": 8e-3,
        "BLT-Entropy": 8e-3,
    },
)


class Plan:
    """Runs the parts of the study.

    Attributes
    ----------
    outcomes, jobs, answered : dict
        By the name of a run, in the order in which runs were asked for. Only the best models have answers.
    rates : dict from family to float
    best : dict from family to str
        The best size at the largest budget.
    """

    def __init__(self, lab: Lab, scope: Scope, processes: int) -> None:
        self.lab, self.scope, self.processes = lab, scope, processes
        self.outcomes: dict[str, Outcome] = {}
        self.jobs: dict[str, Job] = {}
        self.answered: dict[str, Answers] = {}
        self.rates = dict(scope.rates)
        self.best: dict[str, str] = {}

    @cached_property
    def suite(self) -> Suite:
        """Noised text and questions for the best models."""
        return make_suite(self.lab.corpus)

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

    def prepare(self) -> None:
        """Train the patcher, and compute what all runs share before processes do."""
        job = Job(PATCHER, self.scope.patcher, 0, PATCHER_RATE)
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
            jobs = [Job(FAMILIES[family]("B"), self.scope.small, 0, rate) for family, rate in wanted]
            for (family, rate), outcome in zip(wanted, self.perform(jobs), strict=True):
                tried[family][rate] = self.bits(outcome)
            further = [(family, next_rate(tried[family])) for family in families]
            wanted = [(family, rate) for family, rate in further if rate is not None]
        self.rates = {family: min(bits, key=bits.__getitem__) for family, bits in tried.items()}
        self.rates |= {family: self.rates[other] for family, other in RATE_OF.items() if family in FAMILIES}
        self.lower_rates()

    def lower_rates(self) -> None:
        """Halve the learning rate of a family while that is better for its best size of the middle budget."""
        best = self._best_sizes(dict.fromkeys(FAMILIES, SIZES), self.scope.middle)
        jobs = {family: self.job(FAMILIES[family](size), self.scope.middle, 0) for family, size in best.items()}
        bits = dict(zip(jobs, map(self.bits, self.perform([*jobs.values()])), strict=True))
        while jobs:
            jobs = {family: replace(job, learning_rate=job.learning_rate / 2) for family, job in jobs.items()}
            found = dict(zip(jobs, map(self.bits, self.perform([*jobs.values()])), strict=True))
            jobs = {family: job for family, job in jobs.items() if found[family] < bits[family]}
            bits |= {family: found[family] for family in jobs}
            self.rates |= {family: job.learning_rate for family, job in jobs.items()}

    def compare_families(self) -> None:
        """Find the best size of every family at each budget, and run it with all seeds."""
        scope = self.scope
        small = self._best_sizes(dict.fromkeys(FAMILIES, SIZES[:3]), scope.small)
        middle = self._best_sizes(dict.fromkeys(FAMILIES, SIZES), scope.middle)
        tried = {family: size + larger(size) for family, size in middle.items()}
        self.best = self._best_sizes(tried, scope.large)
        while further := {f: larger(size) for f, size in self.best.items() if size == tried[f][-1] != SIZES[-1]}:
            tried = {family: sizes + further.get(family, "") for family, sizes in tried.items()}
            self.best = self._best_sizes(tried, scope.large)
        jobs = []
        for tflops, best in ((scope.large, self.best), (scope.middle, middle), (scope.small, small)):
            for family, size in best.items():
                jobs += [self.job(FAMILIES[family](size), tflops, seed) for seed in range(1, scope.seeds)]
        self.perform(jobs)

    def _best_sizes(self, tried: dict[str, str], tflops: float) -> dict[str, str]:
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
        seeds = range(self.scope.seeds)
        jobs = [self.job(FAMILIES[f](size), self.scope.large, seed) for f, size in self.best.items() for seed in seeds]
        measured = partial(measure, suite=self.suite)
        for job, answers in zip(jobs, for_all(measured, self.lab, jobs, self.processes), strict=True):
            self.answered[self.lab.folder(job).name] = answers

    def lengthen_patches(self) -> None:
        """Train models with longer patches, and for comparison transformers over tokens."""
        budgets = (self.scope.small, self.scope.middle, self.scope.large)
        tokens = [model for make in FAMILIES.values() if (model := make("B")).vocabulary is not None]
        models, seeds = [*longer_patches(), *tokens], range(self.scope.seeds)
        self.perform([self.job(model, tflops, seed) for tflops in budgets for model in models for seed in seeds])

    def begin_as_tokens(self) -> None:
        """Train BLT-Entropy from scratch, and from the layers of a transformer over tokens of the largest budget."""
        scope, (tokens, blt) = self.scope, over_layers_of_tokens()
        seeds = range(scope.seeds)
        sources = [self.job(tokens, scope.large, seed) for seed in seeds]
        self.perform(sources)
        jobs = [self.job(blt, scope.middle, seed) for seed in seeds]
        begun = replace(blt, name=f"{blt.name} from tokens")
        slow = replace(blt, name=f"{blt.name} from tokens, a tenth of the rate")
        for source, job in zip(sources, list(jobs), strict=True):
            init = self.lab.folder(source) / "weights.pt"
            jobs += [replace(job, model=begun, init=init), replace(job, model=slow, init=init, global_scale=0.1)]
        self.perform(jobs)

    def change_parts(self) -> None:
        seeds = range(self.scope.seeds)
        models = [entropy_of("B"), FAMILIES["bytes"]("B"), *variants("B")]
        self.perform([self.job(model, self.scope.middle, seed) for seed in seeds for model in models])


def larger(size: str) -> str:
    """Return the next larger size, nothing for the largest one."""
    return SIZES[SIZES.index(size) + 1 :][:1]


def next_rate(tried: dict[float, float]) -> float | None:
    """Return the learning rate to try next: half the lowest or twice the highest if it is the best so far."""
    best, rates = min(tried, key=tried.__getitem__), sorted(tried)
    if len(rates) >= len(RATES) + 2:
        return None
    return {rates[0]: best / 2, rates[-1]: best * 2}.get(best)
