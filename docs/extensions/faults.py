"""The directive ``{faults} KIND``: faults that tests/fault_check.py planted, and the check that finds each."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

TABLE = Path(__file__).resolve().parents[1] / "contribute" / "faults.csv"


class Faults(SphinxDirective):
    """Lists each fault with its file, the first check that fails, and what that says."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a definition list: messages are too long for the cells of a table."""
        self.env.note_dependency(str(TABLE))
        with TABLE.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["kind"] == self.arguments[0]]
        lines: list[str] = []
        for row in rows:
            by = row["found_by"]
            check = by if by == "the compiler" else f"`{by}`"
            said = [f"{check} says", "", f"  > `` {row['message']} ``"] if by else ["No check finds it."]
            lines += [f"**{row['fault'][0].upper()}{row['fault'][1:]}**", f": {said[0]}", *said[1:], ""]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("faults", Faults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
