"""The site: every public name has one entry."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from test_documentation import MODULES, public

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENTRY = re.compile(
    r"^\.\. auto(?P<kind>function|class|module):: (?P<name>\S+)\n(?P<options>(?:   :.*\n)*)", re.MULTILINE
)
MEMBERS = re.compile(r":members:(.*)")


def entries() -> Counter[str]:
    """Return the names that the pages document, and how often."""
    names = {module.__name__: public(module) for module in MODULES}
    found: Counter[str] = Counter()
    for page in DOCS.rglob("*.md"):
        for entry in ENTRY.finditer(page.read_text(encoding="utf-8")):
            if entry["kind"] != "module":
                found[entry["name"]] += 1
            elif members := MEMBERS.search(entry["options"]):
                listed = [name.strip() for name in members[1].split(",") if name.strip()]
                found.update(f"{entry['name']}.{name}" for name in listed or names[entry["name"]])
    return found


def test_every_public_name_has_one_entry() -> None:
    assert entries() == Counter(f"{module.__name__}.{name}" for module in MODULES for name in public(module))
