"""The pages of the ops: there is one for each, of the same form; and the pictures of all pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from blt_kernels._extension import OPERATORS

PAGES = Path(__file__).resolve().parents[2] / "docs" / "ops"
SECTIONS = ("Shapes and dtypes", "Example", "What may surprise", "Cost", "Determinism, and where it runs", "Reference")


def test_every_op_has_a_page() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == {"index", *OPERATORS.values()}


def test_pages_have_the_same_sections() -> None:
    for page in PAGES.glob("*.md"):
        if page.stem != "index":
            text = page.read_text(encoding="utf-8")
            found = [title for title in re.findall(r"^## (.+)$", text, re.MULTILINE) if title in SECTIONS]
            assert found == list(SECTIONS), page.name
            assert f"```{{sources}} {page.stem}\n" in text, page.name


def test_every_picture_is_shown_once_and_has_alternative_text() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.parent.rglob("*.md"))
    drawn = sorted(re.findall(r"^```\{drawn\} (\S+)$", pages, re.MULTILINE))
    figures = [path for path in (PAGES.parent / "figures").glob("*.py") if path.stem[0] != "_"]
    assert drawn == sorted(path.stem for path in figures)
    for path in figures:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.name
