"""The site and the pages beside it: every public name has one entry, and links lead somewhere."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
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


def test_docstrings_link_the_names_of_all_public_modules() -> None:
    text = (DOCS / "extensions" / "names.py").read_text(encoding="utf-8")
    assert [module.__name__ for module in MODULES if f'"{module.__name__}"' not in text] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


# --- links ------------------------------------------------------------------------------------------------------------

PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / ".github").rglob("*.md"),
    *(ROOT / "bench" / "notes").glob("*.md"),
    *DOCS.rglob("*.md"),
]
PAGES = [path for path in PAGES if "_generated" not in path.parts]
CODE_BLOCK = re.compile(r"^(`{3,})[^\n]*\n.*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(rf"{CODE_BLOCK.pattern}|`[^`\n]+`", CODE_BLOCK.flags)
LINK = re.compile(r"\]\(<?([^)\s>]+)>?\)|<(https?://[^>\s]+)>|(?:src|srcset|href)=\"([^\"]+)\"")
HOST = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)+")


def links(page: Path) -> list[str]:
    """Return where the links and pictures of a page lead to."""
    found = LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    return [link for groups in found for link in groups if link]


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MyST name them."""
    headings = re.findall(r"^#+ +(.*)$", CODE_BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words} | set(re.findall(r"^\((.*)\)=$", page.read_text(), re.M))


def broken(page: Path) -> list[str]:
    """Return the links of a page that cannot work. What is on other hosts is not asked."""
    wrong = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            good = parts.scheme == "mailto" or (parts.scheme == "https" and HOST.fullmatch(parts.netloc) is not None)
        else:
            target = page if not parts.path else page.parent / parts.path
            good = target.exists() and (not parts.fragment or parts.fragment in anchors(target))
        if not good:
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, here\n[a](#a-heading-here) [b](#no) [c](no.md) [d](page.md#no) [e](http://a.org) [f](https://a)\n"
        '[g](https://a.org/x) `[h](no.md)`\n```\n[i](no.md)\n```\n<img src="no.png">'
    )
    assert broken(page) == ["#no", "no.md", "page.md#no", "http://a.org", "https://a", "no.png"]
