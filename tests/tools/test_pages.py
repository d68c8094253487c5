"""The code on the pages runs: of README.md, CONTRIBUTING.md and the site, in an empty folder for each page.

Blocks of ``python`` run in order and share one namespace. Those of ``py`` need a GPU, minutes or a package that is not
on the package index: they have to compile. Of ``sh``, lines of ``blt-kernels`` run, where the files `text.txt` and
`corpus/*.txt` are; of others the target or the file has to exist. What is behind a prompt in ``console`` does not
run, but its options have to be those of the command.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import typer
from typer.testing import CliRunner

from blt_kernels.cli import app
from blt_kernels.integrations import Applied
from blt_kernels.testing import SCRIPTS, real_text

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[^`\n]*)\n(?P<code>.*?)^ *(?P=fence) *$", re.M | re.S)
LEFT_ALONE = ("pip", "git", "source", "cmake", "nvcc", "torchrun", "pre-commit")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def blocks(page: Path, *languages: str) -> list[tuple[str, int, str]]:
    """Return language, line and code of the blocks of a page."""
    text, found = page.read_text(encoding="utf-8"), []
    for block in FENCE.finditer(text):
        if block["language"] in languages:
            code = re.sub(f"^{block['indent']}", "", block["code"], flags=re.MULTILINE)
            found.append((block["language"], text.count("\n", 0, block.start("code")), code))
    return found


def with_blocks(*languages: str) -> list[Any]:
    """Return the pages that have such blocks, as parameters."""
    found = [page for page in PAGES if blocks(page, *languages)]
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in found]


def commands(code: str, prompt: str = "") -> Iterator[list[str]]:
    """Yield the words of each command, of those behind the prompt if there is one."""
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        if line.strip() and line.startswith(prompt):
            words: list[str] = []
            for word in [*shlex.split(line.removeprefix(prompt), comments=True), "&&"]:
                if word != "&&":
                    words += [word] if words or not re.fullmatch(r"[A-Z_]+=.*", word) else []
                elif words:
                    yield words
                    words = []


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the folder that commands run in, and take out what a page applies to other code bases."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    text = "\n".join([*SCRIPTS.values(), real_text(3000, 0).decode(errors="replace")])
    for name in ("text.txt", "corpus/one.txt", "corpus/two.txt", "corpus/three.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    matplotlib.use("Agg")
    applied: list[Applied] = []
    make = Applied.__init__
    monkeypatch.setattr(Applied, "__init__", lambda self, *args: (make(self, *args), applied.append(self))[0])
    torch.manual_seed(0)
    yield
    for one in reversed(applied):
        one.undo()


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_runs(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for _language, line, code in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("\n" * line + code, page, "exec"), names)


@pytest.mark.parametrize("page", with_blocks("py"))
def test_other_python_compiles(page: Path) -> None:
    for _language, line, code in blocks(page, "py"):
        compile("\n" * line + code, page, "exec")


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_commands_run(page: Path) -> None:
    for _language, _line, code in blocks(page, "sh"):
        for words in commands(code):
            check(words)


def check(words: list[str]) -> None:
    """Run a command of the package, and look up what another one names."""
    program, command = words[0].rpartition("/")[2], shlex.join(words)
    if program == "blt-kernels":
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"
    elif program == "make":
        named = [word for word in words[1:] if "=" not in word]
        assert set(named) <= TARGETS, f"{command}: no such target"
    elif program in ("python", "python3", "pytest"):
        named = [word.partition("::")[0] for word in words[1:] if "/" in word and not word.startswith("-")]
        assert named, f"{command}: expected a file, or a block of `console`"
        assert all((ROOT / path).exists() for path in named), f"{command}: no such file"
    else:
        path = ROOT / words[0]
        known = program in LEFT_ALONE or ("/" in words[0] and path.exists())
        assert known, f"{command}: expected a command of {LEFT_ALONE}, or a block of `console`"


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_targets_in_sentences_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`make ((?:[a-z-]+ ?)+)(?=[ `])", text)
    assert {target for targets in named for target in targets.split()} <= TARGETS


@pytest.mark.parametrize("page", with_blocks("console"))
def test_options_exist(page: Path) -> None:
    for _language, _line, code in blocks(page, "console"):
        for words in commands(code, prompt="$ "):
            start = next((i + 1 for i, word in enumerate(words) if word in ("blt-kernels", "blt_kernels")), None)
            if start is not None:
                parse(words[start:])


def parse(words: list[str]) -> None:
    """Parse a command line without its values: files may be the reader's own."""
    group = typer.main.get_command(app)
    context = group.make_context("blt-kernels", [], resilient_parsing=True)
    name = words[0]
    command = group.get_command(context, name)
    if name.startswith("-") and command is None:
        return
    assert command is not None, f"blt-kernels {name}: no such command"
    own = command.make_context(name, [], parent=context, resilient_parsing=True)
    own.resilient_parsing = False
    command.make_parser(own).parse_args(list(words[1:]))


def test_a_wrong_option_or_command_is_found(tmp_path: Path) -> None:
    parse(["patch", "--threshold", "1", "my.txt"])
    with pytest.raises(Exception, match="--treshold"):
        parse(["patch", "--treshold", "1", "my.txt"])
    with pytest.raises(AssertionError, match="no such command"):
        parse(["patches"])
    for words, match in (
        (["blt-kernels", "patch", "no.txt"], "no.txt"),
        (["make", "dem"], "no such target"),
        (["python", "bench/no.py"], "no such file"),
        (["wget"], "console"),
    ):
        with pytest.raises(AssertionError, match=match):
            check(words)
