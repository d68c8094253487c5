"""Tables of measurements, which a page takes from `bench/results` when the site is built.

The directive ``{results} KIND`` shows the newest file of a kind: "integrations" (``:op:`` is a regular expression that
the names of the operations match), "generation" (``:op:`` is the beginning of the names of models), "study" (``:op:``
is the part), "study-long" (``:op:`` is the pass), "speed" for the small table of README.md, "cpu" and "gpu" for that
of all ops, or "one-thread" for one of another CPU. The directive ``{replaced} MODULE`` shows what ``apply`` of an
integration replaces, and by what; ``{texts}`` shows the packages that the text of the study comes from.
"""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from extensions.measured import ROOT, readme

RESULTS = ROOT / "bench" / "results"


def newest(kind: str) -> Path | None:
    """Return the newest results of a kind, a file or a folder ``KIND-<date>-<device>``; of ops, without the kind."""
    if kind in ("cpu", "gpu", "speed"):
        return readme().newest(RESULTS, "gpu" if kind == "gpu" else "cpu")
    found = [path for path in RESULTS.glob(f"{kind}-[0-9]*") if path.suffix in (".csv", "")]
    return max(found, key=lambda path: path.name, default=None)


def of_integrations(path: Path, op: str) -> str:
    """Return one line for each operation and input: our time, the others', and our share of the limit."""
    ours_name, limit = readme().OURS, readme().LIMIT
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["median_ms"] and re.search(op, row["op"])]
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    if not groups:
        raise ValueError(f"op: expected operations of {path.name}, got none that match {op!r}")
    threads = ", ".join(sorted({row["threads"] for row in rows}))
    lines = [
        f"`{path.relative_to(ROOT)}`, {threads} threads: milliseconds, medians of rounds in turn, and how many times as"
        " long the others take. The limit is the fastest way to read or copy the data once, or a large matrix product,"
        " on the same machine.",
        "",
        "| what | input | ms | others | limit reached |",
        "|---|---|---:|---|---:|",
    ]
    for (name, shape, dtype), group in groups.items():
        times = {row["implementation"]: float(row["median_ms"]) for row in group}
        ours = next(row for row in group if row["implementation"] == ours_name)
        mine = float(ours["median_ms"])
        names = [name for name in times if name != ours_name and not name.startswith(limit)]
        others = [f"{name} {times[name] / mine:.2f}" for name in sorted(names, key=lambda name: ours_name in name)]
        what = name.replace(" fwd+bwd", ", forward + backward").replace(" fwd", ", forward")
        share = f"{float(ours['share_of_limit']):.0%}"
        lines.append(f"| {what} | {shape}, {dtype} | {readme().milliseconds(mine)} | {'; '.join(others)} | {share} |")
    return "\n".join(lines)


def study_module(name: str) -> ModuleType:
    """Return a module of bench/study."""
    readme()  # makes bench importable
    return importlib.import_module(f"study.{name}")


def of_study(folder: Path, part: str) -> str:
    """Return sentences and tables of one part of ``python bench/study``."""
    report = study_module("report")
    return report.PARTS[part](report.load(folder)) or "No runs of this part are stored yet."


def of_long_rows(path: Path, run: str) -> str:
    """Return sentences and tables of one pass that ``python bench/study long`` measured."""
    long_report = study_module("long_report")
    points = long_report.read(path)
    load = max((point.load for point in points if point.us_a_byte), default=0.0)
    head = f"`{path.relative_to(ROOT)}`, CPU time of one thread, with a load average of up to {load:.1f} beside it:"
    return f"{head}\n\n{long_report.report(points, run)}"


def of_generation(path: Path, model: str) -> str:
    """Return the table of generation, of the models whose names begin with `model`."""
    head, blank, title, rule, *lines = readme().table_of_generation(path).splitlines()
    return "\n".join([head, blank, title, rule, *(line for line in lines if line.startswith(f"| {model}"))])


def of_speed(path: Path, op: str) -> str:
    """Return the small table of README.md."""
    generation = newest("generation")
    return "" if generation is None else readme().table_of_speed(path, generation)


def of_ops(path: Path, op: str) -> str:
    """Return the table of all ops."""
    return readme().table(path)


KINDS: dict[str, Callable[[Path, str], str]] = {
    "cpu": of_ops,
    "gpu": of_ops,
    "one-thread": of_ops,
    "speed": of_speed,
    "integrations": of_integrations,
    "generation": of_generation,
    "study": of_study,
    "study-long": of_long_rows,
}


class Results(SphinxDirective):
    """The directive ``{results} KIND``."""

    required_arguments = 1
    option_spec = {"op": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Return the nodes of the table."""
        self.env.note_dependency(__file__)
        kind = self.arguments[0]
        path = newest(kind)
        if path is None:
            return self.parse_text_to_nodes("No results are stored yet.")
        files = path.iterdir() if path.is_dir() else [path]
        for file in files:
            self.env.note_dependency(str(file))
        return self.parse_text_to_nodes(KINDS[kind](path, self.options.get("op", "")))


class Replaced(SphinxDirective):
    """The directive ``{replaced} MODULE``, a module of `blt_kernels.integrations`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the nodes of the table."""
        module = importlib.import_module(f"blt_kernels.integrations.{self.arguments[0]}")
        self.env.note_dependency(module.__file__)
        lines = ["| replaced | computed by |", "|---|---|"]
        for name, by in module.REPLACES.items():
            is_name = re.fullmatch(r"\w+(, \w+)*", by)
            shown = re.sub(r"(\w+)", r"`\1`", by) if is_name else by
            lines.append(f"| `{name}` | {shown} |")
        return self.parse_text_to_nodes("\n".join(lines))


class Texts(SphinxDirective):
    """The directive ``{texts}``."""

    def run(self) -> list[nodes.Node]:
        """Return the nodes of the table."""
        readme()  # puts bench/ on the path
        packages = importlib.import_module("study.packages")
        self.env.note_dependency(packages.__file__)
        return self.parse_text_to_nodes(packages.table())


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("results", Results)
    app.add_directive("replaced", Replaced)
    app.add_directive("texts", Texts)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
