"""The directive ``{commands}`` shows all commands, their arguments and options, from what ``--help`` prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from blt_kernels.cli import app

USAGE = (
    (r"[{}]", ""),
    (r"\.{4,}", "..."),
    (r"\[\[(\w+)\](\.\.\.)?\](\.\.\.)?", r"[\1]\2"),
)  # typer repeats brackets and dots
DEFAULT = re.compile(r"  \[default: (.*)]$")
TYPE = re.compile(r" <list\[.*\]>$| <\w+>$")  # what typer adds to the name of an argument


def text_of(command: Any, context: Any) -> Iterator[str]:
    """Yield the section of a command, in Markdown."""
    usage = " ".join(command.collect_usage_pieces(context))
    for pattern, replacement in USAGE:
        usage = re.sub(pattern, replacement, usage)
    yield f"## {context.info_name}\n\n{command.help}\n\n```text\nblt-kernels {context.info_name} {usage}\n```\n"
    for kind in ("argument", "option"):
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if parameter.param_type_name == kind and record is not None:
                name, about = record
                name = TYPE.sub("", name) if kind == "argument" else name
                about = DEFAULT.sub(r" Default: \1.", about.replace("  [required]", ""))
                yield f"`{name}`\n: {markdown(about)}\n"
    if command.epilog:
        yield f"{command.epilog}\n"


def markdown(text: str) -> str:
    """Put options into code, and keep what Markdown would read as its own from it."""
    text = re.sub(r"([*_<>|\[\]])", r"\\\1", text)
    return re.sub(r"(?<![\w-])(--[a-z][a-z0-9-]*)", r"`\1`", text)


class Commands(SphinxDirective):
    """The directive ``{commands}``."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each command."""
        group = typer.main.get_command(app)
        context = group.make_context("blt-kernels", [], resilient_parsing=True)
        lines: list[str] = []
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            lines += text_of(command, command.make_context(name, [], parent=context, resilient_parsing=True))
        self.env.note_reread()
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
