"""Reads the results of the study from a folder, and chooses the runs that are compared.

``runs.csv`` has one line a run, ``scores.csv`` one line for each run, kind of text and group, ``excerpts.csv`` the bits
of every excerpt by run, ``curves.csv`` the training loss in equal parts. Runs of one model, budget and learning rate
that differ in the seed are a group.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from study.families import FAMILIES, SIZES
from study.statistics import Estimate, log_ratio_error, mean_of, pooled_deviation, share_of, text_error

ALL = "all"  # all groups
CLEAN = "clean"  # the name of the text that gets noise, without it


@dataclass(frozen=True)
class Facts:
    """Describes a run. FLOPs are of a byte forward, in millions, on training text, and the patcher's are apart.

    `tflops` are of training, without the patcher. Embeddings are all parameters that are only looked up, those of hash
    tables included. `patch_size` is the mean number of bytes of a patch or of a token.
    """

    run: str
    model: str
    family: str
    size: str
    seed: int
    tflops: float
    learning_rate: float
    parameters: int
    embedding_parameters: int
    patch_size: float
    mflops: float
    patcher_mflops: float
    trained_bytes: int
    cpu_seconds: float


@dataclass(frozen=True)
class Run(Facts):
    """Describes a finished run. `bits` are the bits per byte of `Outcome.bits_per_byte`."""

    bits: float

    @property
    def paid_tflops(self) -> float:
        """TFLOP of training, with one forward of the patcher for every byte."""
        return self.tflops * (1 + self.patcher_mflops / (3 * self.mflops))

    @property
    def inference_mflops(self) -> float:
        """MFLOP of a byte forward, with the patcher."""
        return self.mflops + self.patcher_mflops


@dataclass(frozen=True)
class Score:
    """Describes what a run scored on a kind of text: "text", "noise", "task" or "misspelling".

    `name` is that of the noise, task or edit. `count` are excerpts or questions, `right` the questions answered right,
    and `bits` those of all `bytes`. What a kind of text has not is 0.
    """

    run: str
    kind: str
    name: str
    group: str
    count: int
    bytes: int = 0
    bits: float = 0.0
    right: int = 0


Row = TypeVar("Row", Run, Score)


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Return the lines of a file. Columns that `kind` lacks are left out."""
    if not path.exists():
        return []
    types: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            kind(**{field.name: types[str(field.type)](row[field.name]) for field in fields(kind)})
            for row in csv.DictReader(file)
        ]


class Results:
    """Has the runs of a study.

    Parameters
    ----------
    runs : Sequence[Run]
    scores : Sequence[Score]
    curves : dict[str, list[float]]
        Training loss by run, in bits per byte.
    excerpts : dict[str, list[float]]
        Bits of every excerpt by run, in the order of groups; "bytes" has their sizes. Without them, errors are over
        seeds alone.
    shares : dict[str, int]
        Bytes of training text by group.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        scores: Sequence[Score] = (),
        curves: dict[str, list[float]] | None = None,
        excerpts: dict[str, list[float]] | None = None,
        shares: dict[str, int] | None = None,
    ) -> None:
        self.scores, self.curves, self.excerpts, self.shares = list(scores), curves or {}, excerpts or {}, shares or {}
        self.patcher = next((run for run in runs if run.family == "patcher"), None)
        self.runs = [run for run in runs if run.family != "patcher"]
        self.rates: dict[str, float] = {}  # the learning rate that most runs of a family have
        for family in dict.fromkeys(run.family for run in self.runs):
            counts, best = Counter(), min((run for run in self.runs if run.family == family), key=lambda run: run.bits)
            counts.update(run.learning_rate for run in self.runs if run.family == family)
            self.rates[family] = max(counts, key=lambda rate: (counts[rate], rate == best.learning_rate))

    @cached_property
    def budgets(self) -> list[float]:
        """The budgets in TFLOP, the smallest first."""
        return sorted({run.tflops for run in self.runs})

    def group(self, model: str, tflops: float) -> list[Run]:
        """Return the runs of a model, one a seed, at a budget and the learning rate of its family."""
        found = [run for run in self.runs if run.model == model and run.tflops == tflops]
        return sorted((run for run in found if run.learning_rate == self.rates[run.family]), key=lambda run: run.seed)

    @cached_property
    def deviations(self) -> dict[float, float]:
        """The deviation of bits per byte over seeds at every budget, pooled over models."""
        return {tflops: pooled_deviation(self._bits_by_model(tflops)) for tflops in self.budgets}

    def _bits_by_model(self, tflops: float) -> list[list[float]]:
        models = dict.fromkeys(run.model for run in self.runs if run.tflops == tflops)
        groups = [self.group(model, tflops) for model in models]
        return [[run.bits for run in group] for group in groups if group]

    def bits(self, model: str, tflops: float) -> Estimate | None:
        """Return bits per byte of all held-out text, None without runs."""
        group = self.group(model, tflops)
        return mean_of([run.bits for run in group], self.deviations[tflops]) if group else None

    def lead(self, ours: str, theirs: str, tflops: float) -> Estimate | None:
        """Return the bits per byte of `theirs` less those of `ours`, with the errors of seeds and of text."""
        a, b = self.bits(theirs, tflops), self.bits(ours, tflops)
        return None if a is None or b is None else (a - b).with_error(self.text_error(ours, theirs, tflops))

    def text_error(self, ours: str, theirs: str, tflops: float) -> float:
        """Return the error of the difference in bits per byte over the choice of excerpts of every group."""
        a, b = (self.bits_of_excerpts(self.group(model, tflops)) for model in (ours, theirs))
        if not a or not b:
            return 0.0
        sizes = self.excerpts["bytes"]
        return math.hypot(
            *(self.share(g) * text_error(a[at], b[at], sizes[at]) for g, at in self.places.items() if self.share(g))
        )

    @cached_property
    def places(self) -> dict[str, slice]:
        """The excerpts of every group, among those of all."""
        counts = {score.group: score.count for score in self.scores if score.kind == "text"}
        ends = itertools.accumulate(counts.values())
        return {group: slice(end - count, end) for (group, count), end in zip(counts.items(), ends, strict=True)}

    def bits_of_excerpts(self, runs: Sequence[Run]) -> list[float]:
        """Return the mean over runs of the bits of every excerpt."""
        rows = [self.excerpts[run.run] for run in runs if run.run in self.excerpts]
        return [math.fsum(values) / len(rows) for values in zip(*rows, strict=True)]

    def best(self, family: str, tflops: float, among: Container[str] = ()) -> str | None:
        """Return the size of a family that is best at a budget: of those with the most seeds, by the mean.

        Where there are runs in `among`, only the sizes of these count.
        """
        groups = {name: group for size in SIZES if (group := self.group(name := f"{family} {size}", tflops))}
        if any(run.run in among for group in groups.values() for run in group):
            groups = {name: group for name, group in groups.items() if group[0].run in among}
        most = max(map(len, groups.values()), default=0)
        return min(
            (model for model, group in groups.items() if len(group) == most),
            key=lambda model: math.fsum(run.bits for run in groups[model]),
            default=None,
        )

    def curve(self, family: str, paid: bool = False) -> list[tuple[float, Estimate, Run]]:
        """Return FLOPs of training in TFLOP, bits per byte and a run, for the best size at every budget.

        `paid` counts the patcher.
        """
        found = []
        for tflops in self.budgets:
            model = self.best(family, tflops)
            if model is not None:
                first, bits = self.group(model, tflops)[0], self.bits(model, tflops)
                assert bits is not None
                found.append((first.paid_tflops if paid else tflops, bits, first))
        return found

    @cached_property
    def measured(self) -> dict[str, list[Run]]:
        """By family, the runs of the best size at the largest budget, one a seed; only those with noise, if any are."""
        noised = {score.run for score in self.scores if score.kind == "noise"}
        found = {}
        for family in FAMILIES if self.runs else ():
            model = self.best(family, self.budgets[-1], noised)
            if model is not None:
                found[family] = self.group(model, self.budgets[-1])
        return found

    # --- scores of the measured runs ----------------------------------------------------------------------------------

    @cached_property
    def _score_of(self) -> dict[tuple[str, str, str], list[Score]]:
        found: dict[tuple[str, str, str], list[Score]] = {}
        for score in self.scores:
            found.setdefault((score.run, score.kind, score.name), []).append(score)
        return found

    def names(self, kind: str) -> list[str]:
        """Return the noises, tasks or edits that the results have."""
        return [n for n in dict.fromkeys(score.name for score in self.scores if score.kind == kind) if n != CLEAN]

    def groups(self) -> list[str]:
        """Return the groups of held-out text."""
        return list(self.places)

    def bits_per_byte(self, run: Run, kind: str = "text", name: str = "", group: str = ALL) -> float | None:
        """Return the bits per byte of a run on one kind of text."""
        scores = [s for s in self._score_of.get((run.run, kind, name), []) if group in (ALL, s.group)]
        size = sum(score.bytes for score in scores)
        return sum(score.bits for score in scores) / size if size else None

    def share(self, group: str) -> float:
        """Return the share of a group in the training text."""
        return self.shares.get(group, 0) / sum(self.shares.values()) if self.shares else 0.0

    def log_leads(self, ours: str, theirs: str) -> dict[str, Estimate]:
        """Return by group ``log(bits of theirs / bits of ours)``, with the errors of seeds and of text."""
        found = {}
        a, b = (self.bits_of_excerpts(self.measured.get(family, ())) for family in (theirs, ours))
        for group, at in self.places.items():
            logs = self.by_family(lambda run, g=group: math.log(self.bits_per_byte(run, group=g) or math.nan))
            if ours in logs and theirs in logs:
                lead = logs[theirs] - logs[ours]
                found[group] = lead.with_error(log_ratio_error(a[at], b[at])) if a and b else lead
        return found

    def by_family(self, value: Callable[[Run], float | None]) -> dict[str, Estimate]:
        """Return the means of a value over the seeds of the measured runs, with the deviation of all families."""
        found = {}
        for family, runs in self.measured.items():
            values = [v for run in runs if (v := value(run)) is not None]
            if values:
                found[family] = values
        deviation = pooled_deviation(found.values()) if found else math.nan
        return {family: mean_of(values, deviation) for family, values in found.items()}

    def relative_loss(self, run: Run, names: Iterable[str]) -> float | None:
        """Return the mean over noises of ``log(bits per noised byte / bits per clean byte)``."""
        clean = self.bits_per_byte(run, "noise", CLEAN)
        noised = [self.bits_per_byte(run, "noise", name) for name in names]
        if clean is None or None in noised:
            return None
        return sum(math.log(bits / clean) for bits in noised if bits is not None) / len(noised)

    def shares_right(self, kind: str, names: Sequence[str]) -> dict[str, Estimate]:
        """Return by family the share of right answers, the mean over `names`; errors are of seeds and questions."""

        def right(run: Run, name: str) -> Estimate | None:
            scores = self._score_of.get((run.run, kind, name), [])
            count = sum(score.count for score in scores)
            return share_of(sum(score.right for score in scores), count) if count else None

        def mean(run: Run) -> Estimate | None:
            parts = [part for name in names if (part := right(run, name)) is not None]
            if len(parts) < len(names) or not parts:
                return None
            return Estimate(
                math.fsum(part.value for part in parts) / len(parts), math.hypot(*(p.error for p in parts)) / len(parts)
            )

        by_seed = self.by_family(lambda run: part.value if (part := mean(run)) is not None else None)
        found = {}
        for family, estimate in by_seed.items():
            questions = [part.error for run in self.measured[family] if (part := mean(run)) is not None]
            # The seeds answer the same questions, so their number does not lower this part of the error.
            found[family] = Estimate(estimate.value, math.hypot(estimate.error, math.fsum(questions) / len(questions)))
        return found


def read_lists(path: Path) -> dict[str, list[float]]:
    """Return the numbers of each line by its first cell."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {name: [float(value) for value in values if value] for name, *values in list(csv.reader(file))[1:]}


def load(folder: Path) -> Results:
    """Return the results of a study in a folder."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    curves, excerpts = read_lists(folder / "curves.csv"), read_lists(folder / "excerpts.csv")
    return Results(
        read(folder / "runs.csv", Run), read(folder / "scores.csv", Score), curves, excerpts, settings["shares"]
    )
