"""The pages of the ops: there is one for each, and all have the same form."""

from __future__ import annotations

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
