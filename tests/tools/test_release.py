"""Version, citation and changelog agree; the files of the project and its workflows are what their readers expect."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blt_kernels._version import __version__
from blt_kernels.models.byte_lm import BUNDLED

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
SCHEMAS = {
    "CITATION.cff": "citation-file-format",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/ISSUE_TEMPLATE/[!c]*.yml": "github-issue-forms",
    ".github/workflows/*.yml": "github-workflows",
}
CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.0] - 2026-05-06

### Added

- A thing.

## [1.1.0] - 2026-01-02
"""
CITATION = "cff-version: 1.2.0\nversion: 1.2.0\ndate-released: 2026-05-06\n"


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / "release/release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_citation_and_changelog_agree(release):
    texts = [(ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md")]
    assert release.differences(__version__, *texts) == []


@pytest.mark.parametrize(
    ("version", "old", "new", "message"),
    [
        ("1.3.0", "", "", "CHANGELOG.md: expected a section of 1.3.0, as in _version.py, first, got 1.2.0"),
        ("1.2.0", "## [Unreleased]\n", "", "CHANGELOG.md: expected the section Unreleased first, got 1.2.0"),
        ("1.2.0", " - 2026-05-06", "", "CHANGELOG.md: expected a date and some text for 1.2.0"),
        ("1.2.0", "### Added\n\n- A thing.\n", "", "CHANGELOG.md: expected a date and some text for 1.2.0"),
        ("1.2.0", "\nversion: 1.2.0", "\nversion: 1.1.0", "CITATION.cff: version: expected 1.2.0, got 1.1.0"),
        ("1.2.0", "released: 2026-05-06", "released: 2026-05-07", "date-released: expected 2026-05-06, got 2026-05-07"),
    ],
)
def test_a_version_that_differs_is_named(release, version, old, new, message):
    found = release.differences(version, CITATION.replace(old, new), CHANGELOG.replace(old, new))
    assert message in "\n".join(found)


def test_what_blocks_a_release(release):
    assert release.differences("1.2.0", CITATION, CHANGELOG) == []
    assert release.blockers("1.2.0", CHANGELOG, "v1.2.0") == []
    open_changes = CHANGELOG.replace("## [Unreleased]\n", "## [Unreleased]\n\n- Another thing.\n")
    assert len(release.blockers("1.2.0", open_changes, "1.2.0")) == 2


def test_notes_of_the_release():
    command = [sys.executable, str(ROOT / "release/release.py"), "notes"]
    notes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert notes
    assert f"## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text().partition(notes)[0]


def test_the_entropy_model_never_changes():
    """assets/README.md says why: another model gets another name."""
    digest = hashlib.sha256(BUNDLED.read_bytes()).hexdigest()
    assert digest == "ae1313935760105e97189f0a728badc68f2bb18eaa5ca56742a720d2bda0d954"
    assert digest in (BUNDLED.parent / "README.md").read_text()
    models = [path for path in BUNDLED.parent.iterdir() if path.suffix != ".md" and path.name != "__pycache__"]
    assert max(path.stat().st_size for path in models) == BUNDLED.stat().st_size


@pytest.mark.parametrize("pattern", SCHEMAS)
def test_files_of_the_project_fit_their_schemas(pattern):
    pytest.importorskip("check_jsonschema")
    files = [str(path) for path in ROOT.glob(pattern)]
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{SCHEMAS[pattern]}", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def steps():
    """Yield the shell lines of all workflows, with every value that a matrix gives them."""
    for path in (*GITHUB.glob("workflows/*.yml"), *GITHUB.glob("actions/*/action.yml")):
        text = path.read_text()
        listed = ",".join(re.findall(r"targets: \[(.*)\]", text)).split(",")
        targets = [name.strip() for name in (*listed, *re.findall(r"targets: ([^\[\n]+)", text)) if name.strip()]
        for line in re.findall(r"\brun: (.*)", text):
            yield from (line.replace("${{ matrix.targets }}", name) for name in targets or [""])


def test_every_step_of_a_workflow_is_a_target():
    """So that whatever fails on a hosted runner can be run anywhere."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = set()
    for line in steps():
        command, *words = re.sub(r"\$\{\{.*?\}\}", "", line).split()
        assert command == "make", line
        named = {word for word in words if "=" not in word}
        assert named
        assert named <= targets
        found |= named
    assert {"lint", "test-fast", "test", "sanitize", "docs", "wheels", "wheel-try", "release-check"} <= found


def test_pythons_that_are_tried_are_those_that_are_supported():
    workflow, project = (GITHUB / "workflows/ci.yml").read_text(), (ROOT / "pyproject.toml").read_text()
    tried = re.findall(r"3\.\d+", re.search(r"python: \[(.*)\]", workflow)[1])
    assert tried == re.findall(r"Python :: (3\.\d+)", project)
    assert tried[0] == re.search(r'requires-python = ">=(.*)"', project)[1]
    assert re.search(r'torch>=(2\.\d+)"\]', project)[1] + ".0" in re.search(r"torch: \[(.*)\]", workflow)[1]


def test_a_report_of_lost_speed_asks_for_commands_that_exist():
    from typer.testing import CliRunner

    from blt_kernels.cli.base import app

    form = (GITHUB / "ISSUE_TEMPLATE/slower.yml").read_text()
    asked = {(command, option) for command, option in re.findall(r"`blt-kernels (\w+)[^`]*?(--[\w-]+)", form)}
    assert {("doctor", "--json"), ("bench", "--csv")} <= asked
    for command, option in asked:
        assert option in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
