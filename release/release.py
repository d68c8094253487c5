"""Compares the files that name the version, and prints what the changelog says of it.

``python release/release.py check [TAG]`` is ``make release-check``, and ``python release/release.py notes`` is
``make release-notes``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Section(NamedTuple):
    """A section of the changelog; `version` is "Unreleased" in the first one, which has no date."""

    version: str
    date: str
    text: str


def sections(changelog: str) -> list[Section]:
    """Return the sections of a changelog, newest first."""
    parts = re.split(r"^## \[(.*?)\](?: - (\S+))?\n", changelog, flags=re.MULTILINE)[1:]
    return [Section(parts[i], parts[i + 1] or "", parts[i + 2].strip()) for i in range(0, len(parts), 3)]


def field(citation: str, name: str) -> str:
    """Return a field of one line of CITATION.cff; an empty string if it is not there."""
    found = re.search(rf"^{name}: *(\S+) *$", citation, re.MULTILINE)
    return found[1] if found else ""


def differences(version: str, citation: str, changelog: str) -> list[str]:
    """Say where the version of the package, the citation and the newest release of the changelog differ."""
    first, *released = sections(changelog)
    newest = released[0] if released else Section("none", "", "")
    found = []
    if first.version != "Unreleased":
        found.append(f"CHANGELOG.md: expected the section Unreleased first, got {first.version}")
    if newest.version != version:
        found.append(f"CHANGELOG.md: expected a section of {version}, as in _version.py, first, got {newest.version}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", newest.date) or not newest.text:
        found.append(f"CHANGELOG.md: expected a date and some text for {newest.version}")
    for name, expected in (("version", version), ("date-released", newest.date)):
        if field(citation, name) != expected:
            found.append(f"CITATION.cff: {name}: expected {expected}, got {field(citation, name) or 'none'}")
    return found


def blockers(version: str, changelog: str, tag: str | None) -> list[str]:
    """Say what has to be done before the version is released as `tag`."""
    found = []
    if sections(changelog)[0].text:
        found.append("CHANGELOG.md: expected nothing under Unreleased: move it to the section of the release")
    if tag is not None and tag != f"v{version}":
        found.append(f"tag: expected v{version}, got {tag}")
    return found


def main() -> None:
    """Run the command in the arguments."""
    command, *rest = sys.argv[1:]
    found = re.search(r'^__version__ = "(.*)"$', (ROOT / "blt_kernels/_version.py").read_text(), re.MULTILINE)
    assert found is not None
    version, changelog = found[1], (ROOT / "CHANGELOG.md").read_text()
    if command == "notes":
        print(next(section.text for section in sections(changelog) if section.version == version))
        return
    problems = differences(version, (ROOT / "CITATION.cff").read_text(), changelog)
    problems += blockers(version, changelog, rest[0] if rest else None)
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"{version} can be released")


if __name__ == "__main__":
    main()
