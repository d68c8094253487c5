"""The directive ``{printed} PATH`` runs a script when the site is built and shows what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from extensions.measured import ROOT


class Printed(SphinxDirective):
    """The directive ``{printed} PATH``. It runs again only when the page or the script has changed."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the output as a block of text."""
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise self.error(f"{relative} failed:\n{done.stderr}")
        return [nodes.literal_block(done.stdout, done.stdout.rstrip(), language="text")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("printed", Printed)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
