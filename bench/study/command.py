"""``python bench/study`` trains and measures the models of the study, and writes what came out.

The long study takes somewhat more than 3 hours of two cores. ``--short`` should take about half an hour, which has
not been measured. Either may be killed at any moment: the same command goes on where it was.
``python bench/study long`` is figure (g): `study.long_context`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from timing import RESULTS, csv_path

from blt_kernels._files import whole_file, write_text
from study import report
from study.corpus import Corpus, prepare
from study.families import FAMILIES, SIZES, longer_patches, over_layers_of_tokens, variants
from study.plan import PARTS, SHORT, Budgets, Plan
from study.results import Score
from study.runs import BATCH, CONTEXT, Lab, Outcome
from study.scoring import num_bytes

MEASURED, MEASURED_BYTES = 0.5, 8000  # this share of the held-out text of a group, or so many bytes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python bench/study", description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="an eighth of the budgets, and two seeds")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all budgets")
    parser.add_argument("--seeds", type=int, help="runs of a model, 3 or with --short 2 if not given")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts of the study")
    parser.add_argument("--no-languages", action="store_true", help="the standard library alone: nothing is downloaded")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where text and runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS / f"study-{csv_path().stem}", help="where results go")
    given = parser.parse_args(arguments)
    if given.scale <= 0 or given.jobs < 1 or (given.seeds is not None and given.seeds < 1):
        parser.error("--scale, --jobs and --seeds: expected numbers above 0")
    budgets = SHORT if given.short else Budgets()
    budgets = budgets.scaled(given.scale, given.seeds or budgets.seeds)
    corpus = shortened(prepare(given.work, languages=not given.no_languages))
    study(corpus, given.work, budgets, given.parts, given.jobs, given.out)


def shortened(corpus: Corpus) -> Corpus:
    """Return the corpus with `MEASURED` of the held-out texts of each group, more of small ones.

    Texts are in an order without meaning, so the first ones are a fair sample.
    """
    heldout = {}
    for group, texts in corpus.heldout.items():
        ends = list(accumulate(map(num_bytes, texts)))
        limit = max(MEASURED * ends[-1], MEASURED_BYTES)
        heldout[group] = [text for text, end in zip(texts, ends, strict=True) if end <= limit]
    return replace(corpus, heldout=heldout)


def study(corpus: Corpus, work: Path, budgets: Budgets, parts: Sequence[str], processes: int, out: Path) -> None:
    """Run the parts, and write results after each of them."""
    plan = Plan(Lab(work, corpus), budgets, processes)
    plan.prepare()
    for part in parts:
        plan.run(part)
        write(plan.outcomes, plan.scores, plan.excerpts, settings(plan), corpus, out)
    print(f"written to {out}")


def settings(plan: Plan) -> dict[str, Any]:
    """Return all that the results depend on."""
    corpus = plan.lab.corpus
    models = [make(size) for make in FAMILIES.values() for size in SIZES]
    models += [*longer_patches(), *over_layers_of_tokens(), *variants()]
    return {
        "budgets": asdict(plan.budgets),
        "batch": BATCH,
        "context": CONTEXT,
        "learning_rates": plan.rates,
        "corpus": corpus.record,
        "shares": corpus.shares,
        "heldout_bytes": {group: sum(map(num_bytes, texts)) for group, texts in corpus.heldout.items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "models": {model.name: asdict(model.config) for model in models},
    }


def write(
    outcomes: Mapping[str, Outcome],
    scores: Mapping[str, Sequence[Score]],
    excerpts: Mapping[str, Mapping[str, Sequence[float]]],
    settings: dict[str, Any],
    corpus: Corpus,
    out: Path,
) -> None:
    """Write ``runs.csv``, ``scores.csv``, ``excerpts.csv``, ``curves.csv``, ``settings.json``, and their report."""
    out.mkdir(parents=True, exist_ok=True)
    sizes = {group: (len(texts), sum(map(num_bytes, texts))) for group, texts in corpus.heldout.items()}
    runs, lines, curves = [], [], []
    for run, outcome in outcomes.items():
        values = asdict(outcome) | {"bits": outcome.bits_per_byte(corpus)}
        curves.append({"run": run} | dict(enumerate(values.pop("curve"))))
        runs.append(values)
        lines += [Score(run, "text", "", group, *sizes[group], bits) for group, bits in outcome.bits.items()]
        lines += scores.get(run, ())
    bits = {"bytes": {group: list(map(num_bytes, texts)) for group, texts in corpus.heldout.items()}, **excerpts}
    of_excerpts = [{"run": run} | dict(enumerate(chain(*groups.values()))) for run, groups in bits.items()]
    for name, rows, columns in (
        ("runs.csv", runs, list(runs[0])),
        ("scores.csv", map(asdict, lines), [field.name for field in fields(Score)]),
        ("excerpts.csv", of_excerpts, list(of_excerpts[0])),
        ("curves.csv", curves, max(map(list, curves), key=len)),
    ):
        write_rows(out / name, columns, rows)
    write_text(out / "settings.json", json.dumps(settings, indent=2) + "\n")
    report.write(out)


def write_rows(path: Path, columns: Sequence[Any], rows: Iterable[Mapping[Any, Any]]) -> None:
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
