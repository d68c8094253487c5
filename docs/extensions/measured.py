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
        tables = readme()
        self.env.note_dependency(tables.__file__)
        ops, text = self.arguments[0].split(), []
        for kind in ("cpu", "gpu"):
            path = tables.newest(ROOT / "bench" / "results", kind)
            if path:
                self.env.note_dependency(str(path))
                text.append(tables.table(path, ops))
        missing = f"No results are stored; `blt-kernels bench {' '.join(ops)}` in a checkout measures this machine."
        return self.parse_text_to_nodes("\n\n".join(filter(None, text)) or missing)


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
