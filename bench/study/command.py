"""``python bench/study`` trains and measures the models of the study, and writes what came out.

The long study is estimated at 4 hours of two cores, ``--short`` takes 19 minutes. Either may be killed at any moment:
the same command goes on where it was. ``python bench/study long`` is figure (g): `study.long_context`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from tables import write_rows
from timing import RESULTS, csv_path, device_name

from blt_kernels._files import write_text
from study import report
from study.corpus import Corpus, prepare
from study.families import PATCHER
from study.plan import PARTS, SHORT, Plan, Scope
from study.results import Score
from study.runs import BATCH, CONTEXT, Lab
from study.scoring import num_bytes

MIN_GROUP_BYTES = 16000  # a group with fewer bytes of held-out text is measured as if it had so many


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python bench/study", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--short", action="store_true", help="a first look: small budgets, two seeds, and the parts a, c and f"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all budgets")
    parser.add_argument("--seeds", type=int, help="runs of a model, 3 or with --short 2 if not given")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="parts of the study; results hold these and the runs that they need"
    )
    parser.add_argument("--no-languages", action="store_true", help="the standard library alone: nothing is downloaded")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where text and runs lie")
    parser.add_argument("--out", type=Path, help="where results go, and replace what is there")
    given = parser.parse_args(arguments)
    if given.scale <= 0 or given.jobs < 1 or (given.seeds is not None and given.seeds < 1):
        parser.error("--scale, --jobs and --seeds: expected numbers above 0")
    scope = (SHORT if given.short else Scope()).scaled(given.scale)
    parts = tuple(part for part in PARTS if part in (given.parts or scope.parts))
    scope = replace(scope, seeds=given.seeds or scope.seeds, parts=parts)
    out = given.out or RESULTS / f"study-{'short-' if given.short else ''}{csv_path().stem}"
    corpus = shortened(prepare(given.work, languages=not given.no_languages), scope.measured)
    study(corpus, given.work, scope, given.jobs, out)


def shortened(corpus: Corpus, measured: float) -> Corpus:
    """Return the corpus with the share `measured` of the held-out texts of each group, more of small ones.

    Texts are in an order without meaning, so the first ones are a fair sample.
    """
    heldout = {}
    for group, texts in corpus.heldout.items():
        ends = list(accumulate(map(num_bytes, texts)))
        limit = measured * max(ends[-1], MIN_GROUP_BYTES)
        heldout[group] = [text for text, end in zip(texts, ends, strict=True) if end <= limit]
    return replace(corpus, heldout=heldout, measured=measured)


def study(corpus: Corpus, work: Path, scope: Scope, processes: int, out: Path) -> None:
    """Run the parts, and write results after each of them."""
    plan = Plan(Lab(work, corpus), scope, processes)
    plan.prepare()
    for part in scope.parts:
        plan.run(part)
        write(plan, out)
    print(f"written to {out}")


def settings(plan: Plan) -> dict[str, Any]:
    """Return all that the results depend on."""
    lab, models = plan.lab, {job.model.name: job.model for job in plan.jobs.values()}
    return {
        "scope": asdict(plan.scope),
        "batch": BATCH,
        "context": CONTEXT,
        "learning_rates": plan.rates,
        "corpus": lab.corpus.record,
        "shares": lab.corpus.shares,
        "heldout_bytes": {group: sum(map(num_bytes, texts)) for group, texts in lab.corpus.heldout.items()},
        "models": {name: asdict(model) | {"threshold": lab.cost(model).threshold} for name, model in models.items()},
        "processes": plan.processes,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("blt_kernels", "numpy", "tokenizers", "torch")},
        "device": device_name(),
    }


def write(plan: Plan, out: Path) -> None:
    """Write the files that `study.results` reads, ``settings.json``, and their report."""
    out.mkdir(parents=True, exist_ok=True)
    corpus = plan.lab.corpus
    sizes = {group: (len(texts), sum(map(num_bytes, texts))) for group, texts in corpus.heldout.items()}
    runs, scores, curves, noised, answers = [], [], [], [], []
    excerpts = [{"run": "bytes"} | dict(enumerate(map(num_bytes, chain(*corpus.heldout.values()))))]
    for run, outcome in plan.outcomes.items():
        values = asdict(outcome) | {"bits": outcome.bits_per_byte(corpus)}
        curves.append({"run": run} | dict(enumerate(values.pop("curve"))))
        bits = list(chain(*values.pop("excerpts").values()))
        # One seed is enough: how two models differ from excerpt to excerpt is much the same for every seed.
        if outcome.seed == 0 and outcome.family != PATCHER.family:
            excerpts.append({"run": run} | dict(enumerate(bits)))
        runs.append(values)
        scores += [Score(run, "text", "", group, *sizes[group], bits) for group, bits in outcome.bits.items()]
    for run, said in plan.answered.items():
        scores += said.scores(run, plan.suite)
        noised += [{"run": run, "noise": name} | dict(enumerate(bits)) for name, bits in said.noises.items()]
        for kind, tasks in said.questions.items():
            for name, right in tasks.items():
                answers.append({"run": run, "kind": kind, "name": name} | dict(enumerate(map(int, right))))
    for name, rows in (
        ("runs.csv", runs),
        ("scores.csv", list(map(asdict, scores))),
        ("excerpts.csv", excerpts),
        ("noised.csv", noised),
        ("answers.csv", answers),
        ("curves.csv", curves),
    ):
        if rows:
            write_rows(out / name, list(max(rows, key=len)), rows)
        else:
            (out / name).unlink(missing_ok=True)
    write_text(out / "settings.json", json.dumps(settings(plan), indent=2) + "\n")
    report.write(out)
