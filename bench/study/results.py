"""Reads the results of the study from a folder, and chooses the runs that are compared.

``runs.csv`` has one line a run, ``scores.csv`` one line for each run, kind of text and group, ``excerpts.csv`` the bits
of every excerpt by run, ``noised.csv`` those by noise, ``answers.csv`` which questions were answered right, and
``curves.csv`` the training loss in equal parts. Runs of one model, budget and learning rate that differ in the seed are
a group.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tables import read_rows

from study.families import FAMILIES, SIZES
from study.statistics import (
    Estimate,
    fractions_of_sum,
    log_ratio,
    mean_of,
    of_parts,
    paired_difference,
    text_lead,
    with_errors,
)

BLT, BOTH_BLTS, TOKENS = "BLT-Entropy", ("BLT-Entropy", "BLT-Space"), ("tokens 4k", "tokens 32k")  # families
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


class Results:
    """Has the runs of a study.

    Parameters
    ----------
    runs : Sequence[Run]
    scores : Sequence[Score]
    curves : dict[str, list[float]]
        Training loss by run, in bits per byte.
    excerpts : dict[str, list[float]]
        Bits of every excerpt by run, in the order of groups; "bytes" has their sizes.
    noised : dict[tuple[str, str], list[float]]
        Bits of every noised excerpt by run and noise.
    answers : dict[tuple[str, str, str], list[float]]
        For every question, 1 if the answer was right; by run, kind and name as in `Score`.
    shares : dict[str, int]
        Bytes of training text by group.
    rates : dict[str, float]
        The learning rate of every family. Runs with another rate are not compared.

    Without excerpts, errors of bits per byte are over seeds alone.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        scores: Sequence[Score] = (),
        *,
        rates: Mapping[str, float],
        curves: Mapping[str, Sequence[float]] | None = None,
        excerpts: Mapping[str, Sequence[float]] | None = None,
        noised: Mapping[tuple[str, str], Sequence[float]] | None = None,
        answers: Mapping[tuple[str, str, str], Sequence[float]] | None = None,
        shares: Mapping[str, int] | None = None,
    ) -> None:
        self.scores, self.rates, self.shares, self.curves = list(scores), rates, shares or {}, curves or {}
        self.excerpts, self.noised, self.answers = excerpts or {}, noised or {}, answers or {}
        self.patcher = next((run for run in runs if run.family == "patcher"), None)
        self.runs = [run for run in runs if run.family != "patcher"]

    @cached_property
    def budgets(self) -> list[float]:
        """The budgets in TFLOP, the smallest first."""
        return sorted({run.tflops for run in self.runs})

    def group(self, model: str, tflops: float) -> list[Run]:
        """Return the runs of a model, one a seed, at a budget and the learning rate of its family."""
        found = [run for run in self.runs if run.model == model and run.tflops == tflops]
        found = [run for run in found if run.learning_rate == self.rates.get(run.family)]
        return sorted(found, key=lambda run: run.seed)

    @cached_property
    def deviations(self) -> dict[float, list[float]]:
        """By budget, the deviations of bits per byte over seeds of all models that have several; the smallest first."""
        found = {}
        for tflops in self.budgets:
            models = dict.fromkeys(run.model for run in self.runs if run.tflops == tflops)
            groups = [group for model in models if len(group := self.group(model, tflops)) > 1]
            found[tflops] = sorted(statistics.stdev(run.bits for run in group) for group in groups)
        return found

    def bits(self, model: str, tflops: float) -> Estimate | None:
        """Return bits per byte of all held-out text, None without runs."""
        group = self.group(model, tflops)
        return mean_of([run.bits for run in group]) if group else None

    def lead(self, ours: str, theirs: str, tflops: float) -> Estimate | None:
        """Return the bits per byte of `theirs` less those of `ours`, with the errors of seeds and of text."""
        a, b = self.bits(theirs, tflops), self.bits(ours, tflops)
        if a is None or b is None:
            return None
        return with_errors(a.value - b.value, a, b, self.text_lead(ours, theirs, tflops))

    def text_lead(self, ours: str, theirs: str, tflops: float) -> Estimate:
        """Return the lead of the seeds whose excerpts are known, with the error over the choice of excerpts, or 0."""
        a, b = (self.bits_of_excerpts(self.group(model, tflops)) for model in (theirs, ours))
        if not a or not b:
            return Estimate(0.0, 0.0)
        sizes = self.excerpts["bytes"]
        parts = [
            text_lead(a[at], b[at], sizes[at]).times(share) for g, at in self.places.items() if (share := self.share(g))
        ]
        return with_errors(math.fsum(part.value for part in parts), *parts)

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
                found[group] = with_errors(lead.value, lead, log_ratio(a[at], b[at])) if a and b else lead
        return found

    def by_family(self, value: Callable[[Run], float | None]) -> dict[str, Estimate]:
        """Return the means of a value over the seeds of the measured runs."""
        found = {f: [v for run in runs if (v := value(run)) is not None] for f, runs in self.measured.items()}
        return {family: mean_of(values) for family, values in found.items() if values}

    def noise_lead(self, ours: str, theirs: str, names: Sequence[str]) -> Estimate | None:
        """Return the `relative_loss` of `theirs` less that of `ours`, with the errors of seeds and of text.

        Without the bits of noised excerpts no error is known.
        """
        loss = self.by_family(lambda run: self.relative_loss(run, names))
        if not {ours, theirs} <= loss.keys():
            return None
        a, b = ([self._mean_noised(family, name) for name in (CLEAN, *names)] for family in (theirs, ours))
        lead = loss[theirs] - loss[ours]
        if not all(a) or not all(b):
            return replace(lead, error=math.nan)
        clean, *noised = (
            [x - y for x, y in zip(fractions_of_sum(p), fractions_of_sum(q), strict=True)]
            for p, q in zip(a, b, strict=True)
        )
        parts = [statistics.fmean(of_one) - base for *of_one, base in zip(*noised, clean, strict=True)]
        return with_errors(lead.value, lead, of_parts(0.0, parts))

    def _mean_noised(self, family: str, name: str) -> list[float]:
        """Return the bits of every excerpt with a noise, means over seeds; nothing if they are not known."""
        lists = [bits for run in self.measured[family] if (bits := self.noised.get((run.run, name)))]
        return [statistics.fmean(values) for values in zip(*lists, strict=True)]

    def relative_loss(self, run: Run, names: Sequence[str]) -> float | None:
        """Return the mean over noises of ``log(bits per noised byte / bits per clean byte)``."""
        clean = self.bits_per_byte(run, "noise", CLEAN)
        noised = [self.bits_per_byte(run, "noise", name) for name in names]
        if clean is None or None in noised:
            return None
        return sum(math.log(bits / clean) for bits in noised if bits is not None) / len(noised)

    def shares_right(self, kind: str, names: Sequence[str]) -> dict[str, Estimate]:
        """Return by family the share of right answers, the mean over `names`; errors are of seeds and questions."""
        found = self.by_family(lambda run: self._share_right(run, kind, names))
        for family, mean in found.items():
            # The seeds answer the same questions, so their number does not lower this part of the error.
            found[family] = with_errors(mean.value, mean, mean_of(self._mean_answers(family, kind, names)))
        return found

    def right_lead(self, kind: str, ours: str, theirs: str, names: Sequence[str]) -> Estimate | None:
        """Return the share of right answers of `ours` less that of `theirs`, the mean over `names`.

        The errors are those of seeds, and of the questions, which both answer. Edits of one word are one question.
        """
        found = self.by_family(lambda run: self._share_right(run, kind, names))
        if not {ours, theirs} <= found.keys():
            return None
        lead, a, b = found[ours] - found[theirs], *(self._mean_answers(f, kind, names) for f in (ours, theirs))
        return with_errors(lead.value, lead, paired_difference(a, b))

    def _share_right(self, run: Run, kind: str, names: Sequence[str]) -> float | None:
        """Return the mean over names of the share of right answers, None if some are not known."""
        lists = [self.answers.get((run.run, kind, name)) for name in names]
        return statistics.fmean(statistics.fmean(found) for found in lists if found) if lists and all(lists) else None

    def _mean_answers(self, family: str, kind: str, names: Sequence[str]) -> list[float]:
        """Return for every place in the lists of questions the mean answer over names and seeds."""
        keys = [(run.run, kind, name) for run in self.measured[family] for name in names]
        lists = [self.answers[key] for key in keys if self.answers.get(key)]
        return [statistics.fmean(values) for values in zip(*lists, strict=True)]


def read_lists(path: Path, num_names: int = 1) -> dict[Any, list[float]]:
    """Return the numbers of each line by its first cell, or by a tuple of its first `num_names` cells."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    names = [line[0] if num_names == 1 else tuple(line[:num_names]) for line in lines]
    return {name: [float(x) for x in line[num_names:] if x] for name, line in zip(names, lines, strict=True)}


def load(folder: Path) -> Results:
    """Return the results of a study in a folder."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    return Results(
        read_rows(folder / "runs.csv", Run),
        read_rows(folder / "scores.csv", Score),
        rates=settings["learning_rates"],
        curves=read_lists(folder / "curves.csv"),
        excerpts=read_lists(folder / "excerpts.csv"),
        noised=read_lists(folder / "noised.csv", 2),
        answers=read_lists(folder / "answers.csv", 3),
        shares=settings["shares"],
    )
