"""Tables of ops, generated at build: what was measured, and which files compute and test them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    ("Public function", "blt_kernels/ops/{op}.py"),
    ("Reference, which defines the op", "blt_kernels/reference/{op}.py"),
    ("CPU kernels", "csrc/cpu/{op}.cpp"),
    ("CUDA kernels", "csrc/cuda/{op}.cuh"),
    ("Triton kernels, for CUDA", "blt_kernels/triton/{op}"),
    ("Tests", "tests/ops/test_{op}.py"),
    ("Benchmark", "bench/bench_{op}.py"),
)


def readme() -> ModuleType:
    """Return bench/readme.py, which makes the tables."""
    if str(ROOT / "bench") not in sys.path:
        sys.path.append(str(ROOT / "bench"))
    return importlib.import_module("readme")


class Measured(SphinxDirective):
    """The directive ``{measured} OP...``: rows of the newest results for these ops, on the CPU and on GPUs."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the tables, or a sentence where no results are stored."""
        ops, text = self.arguments[0].split(), []
        self.env.note_dependency(readme().__file__ or "")
        for kind in ("cpu", "gpu"):
            path = readme().newest(ROOT / "bench" / "results", kind)
            if path:
                self.env.note_dependency(str(path))
                text += _table(path, ops)
        missing = f"No results are stored; `blt-kernels bench {' '.join(ops)}` in a checkout measures this machine."
        return self.parse_text_to_nodes("\n".join(text or [missing]))


def _table(path: Path, ops: list[str]) -> list[str]:
    """Return the lines of a table, one line a pass, of the rows whose op begins with one of these names."""
    tables = readme()
    threads, _alone, groups = tables.groups_of(path)
    lines = []
    for (op, inputs), passes in groups.items():
        name, _, variant = op.partition(" ")
        if name not in ops:
            continue
        first = op if len(ops) > 1 else variant
        for key, title in ((tables.FORWARD, "forward"), (tables.BACKWARD, "forward + backward")):
            ours, peer = tables.best_of(passes.get(key, []))
            if ours is None:
                continue
            ratio = f"{float(ours['ratio_to_best_peer']):.2g}" if peer else ""
            numbers = f"{float(ours['median_ms']):.3g} | {float(ours['share_of_limit']):.0%}"
            shown = f"`{first}` {inputs}" if first else inputs
            lines.append(f"| {shown} | {title} | {numbers} | {peer or ''} | {ratio} |")
    where = "a GPU" if tables.kind_of(path) == "gpu" else f"{threads} threads of a CPU"
    head = [
        f"Measured on {where}, in `{path.relative_to(ROOT)}`; the limit is that of the machine, in the same run:",
        "",
        "| input | pass | ms | share of the limit | best alternative | takes × as long |",
        "|---|---|---:|---:|---|---:|",
    ]
    return [*head, *lines, ""] if lines else []


class Sources(SphinxDirective):
    """The directive ``{sources} OP``: which files of the repository define, compute, test and measure the op."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a table of the files that exist."""
        rows = [(what, path.format(op=self.arguments[0])) for what, path in FILES]
        lines = [f"| {what} | `{path}` |" for what, path in rows if (ROOT / path).exists()]
        return self.parse_text_to_nodes("\n".join(["| | file |", "|---|---|", *lines]))


class Ops(SphinxDirective):
    """The directive ``{ops}``: all ops, what they do, and who computes them."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        return self.parse_text_to_nodes(readme().table_of_ops())


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("measured", Measured)
    app.add_directive("sources", Sources)
    app.add_directive("ops", Ops)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
