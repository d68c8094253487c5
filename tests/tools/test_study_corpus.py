"""The text of the study, made from a small folder and from made-up packages: what is held out, and what is reused."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from blt_kernels.testing import real_text

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study import corpus, packages
from study.packages import Package

HOW = ("old", "full", "shut", "new", "lost")
ENGLISH = [f"The file {name} is {how}." for name in "abcdefghijklmnopqrst" for how in HOW]
GERMAN = {text: text.replace("The file", "Über die Datei").replace(" is ", " heißt es ") for text in ENGLISH}


def catalogue(texts: dict[str, str]) -> bytes:
    """Return a compiled gettext catalogue: header, tables of (length, offset), strings that end with a zero byte."""
    pairs = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **texts}.items())
    count, strings, tables = len(pairs), b"", []
    for column in zip(*pairs, strict=True):
        for text in column:
            tables += [len(text.encode()), 28 + 16 * count + len(strings)]
            strings += text.encode() + b"\0"
    return (
        struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
        + struct.pack(f"<{len(tables)}I", *tables)
        + strings
    )


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """Return a folder like the standard library: 300 sources, of which two are equal, and topics."""
    folder = tmp_path / "lib"
    (folder / "pydoc_data").mkdir(parents=True)
    text = real_text(60000).decode("utf-8", "ignore")
    for number in range(299):
        (folder / f"m{number}.py").write_text(f"# {number}\n{text[200 * number : 200 * number + 200]}")
    (folder / "m299.py").write_bytes((folder / "m0.py").read_bytes())
    (folder / "latin.py").write_bytes(b"# \xe9\n")
    topics = {f"topic {number}": f"This is how topic number {number} works.\n" * 9 for number in range(90)}
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    return folder


def add_package(work: Path, name: str, files: dict[str, bytes], **more: bool) -> Package:
    """Write a wheel to where `fetch` looks for it."""
    path = work / "packages" / Package(name, "1", "MIT", "", "").file
    path.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(path, "w") as wheel:
        for file, content in files.items():
            wheel.writestr(file, content)
    return Package(name, "1", "MIT", hashlib.sha256(path.read_bytes()).hexdigest(), "messages", **more)


@pytest.fixture
def made_up(tmp_path: Path) -> list[Package]:
    """Return two packages: messages to train on, and held-out ones of which a third are in the first package too."""
    work = tmp_path / "work"
    german = [*GERMAN.items()]
    strings = {
        "app/translations/en.json": {"step": {"a": "Short one", "b": ENGLISH[1], "c": ENGLISH[2]}},
        "app/translations/de.json": {
            "step": {"a": "Kurz.", "b": ENGLISH[1], "c": GERMAN[ENGLISH[2]], "d": "Ohne Quelle"}
        },
    }
    files = {name: json.dumps(content).encode() for name, content in strings.items()}
    files["app/locale/de/LC_MESSAGES/app.mo"] = catalogue(dict(german[3:60]))
    held = {"web/locale/de/LC_MESSAGES/web.mo": catalogue(dict(german[40:]))}
    return [add_package(work, "made-up", files), add_package(work, "made.up-web", held, heldout=True)]


def test_files_of_the_standard_library_are_split(stdlib: Path, tmp_path: Path) -> None:
    found = corpus.prepare(tmp_path / "work", sample_bytes=8192, languages=False, stdlib=stdlib)
    assert list(found.heldout) == ["python", "prose"]
    assert found.record["packages"] == {}
    train = {source.path.read_text() for source in found.train}
    every = {path.read_text() for path in stdlib.glob("m*.py")}
    held = every - train
    assert len(every) == 299
    assert 5 < len(held) < 60
    for excerpt in found.heldout["python"]:
        assert any(excerpt in text for text in held)
        assert len(excerpt.encode()) <= corpus.EXCERPT
    assert found.shares == {
        group: sum(source.size for source in found.train if source.path.parent.name == group) for group in found.heldout
    }
    assert not any(excerpt in text for text in train for excerpt in found.heldout["prose"])
    assert 0 < sum(source.size for source in found.sample) <= 8192


def test_messages_are_held_out_by_package(stdlib: Path, tmp_path: Path, made_up: list[Package]) -> None:
    found = corpus.prepare(tmp_path / "work", stdlib=stdlib, packages=made_up)
    assert list(found.heldout) == ["python", "prose", "english", "german"]
    assert found.record["packages"] == {"made-up": "1", "made.up-web": "1"}
    train = {
        line
        for source in found.train
        if source.path.parent.name == "german"
        for line in source.path.read_text().splitlines()
    }
    held = [line for excerpt in found.heldout["german"] for line in excerpt.splitlines()]
    assert train == {GERMAN[source] for source in ENGLISH[2:60]}  # neither names nor English
    assert sorted(held) == sorted(GERMAN[source] for source in ENGLISH[60:])  # none of the 20 that both packages have
    assert all(len(excerpt.encode()) <= corpus.EXCERPT for excerpt in found.heldout["german"])


def test_text_is_made_again_only_if_an_input_changed(stdlib: Path, tmp_path: Path, monkeypatch) -> None:
    made: list[int] = []
    build = corpus.build
    monkeypatch.setattr(corpus, "build", lambda *args: made.append(1) or build(*args))

    def prepare() -> corpus.Corpus:
        return corpus.prepare(tmp_path / "work", languages=False, stdlib=stdlib)

    before = prepare()
    assert prepare() == before
    assert len(made) == 1
    (stdlib / "m0.py").write_text("# other text\n" * 9)
    after = prepare()
    assert len(made) == 2
    assert after.record["digest"] != before.record["digest"]


def test_packages_are_checked(tmp_path: Path, made_up: list[Package], monkeypatch) -> None:
    folder = tmp_path / "work" / "packages"
    assert packages.fetch(made_up[0], folder) == folder / "made_up-1-py3-none-any.whl"
    (folder / made_up[0].file).write_bytes(b"other")
    with pytest.raises(ValueError, match=f"expected SHA-256 {made_up[0].sha256}"):
        packages.fetch(made_up[0], folder)
    (folder / made_up[0].file).unlink()
    monkeypatch.setattr(packages.sys, "executable", "false")  # as if pip failed
    with pytest.raises(RuntimeError, match=r"cannot download made-up 1 .* languages=False"):
        packages.fetch(made_up[0], folder)


def test_catalogues_have_contexts_and_plurals() -> None:
    content = catalogue({"menu\4One file\0%d files": "Eine Datei\0%d Dateien", "Open": "Öffnen"})
    assert sorted(packages.catalogue(content)) == [("One file", "%d Dateien"), ("Open", "Öffnen")]


def test_excerpts_have_whole_characters_and_lines() -> None:
    assert corpus.cut("äöü", 3) == "ä"
    assert corpus.cut("a\nbcd\nefg", 7) == "a\nbcd\n"
    texts = ["é" * 4000, "one line\n" * 1000]
    for excerpt in corpus.spread(texts, 6, 501):
        assert 490 < len(excerpt.encode()) <= 501
        assert set(excerpt.splitlines()) == {"one line"} or set(excerpt) == {"é"}
    assert corpus.join(["a" * 5, "b" * 5, "c" * 30], 12) == ["aaaaa\nbbbbb\n", "c" * 30 + "\n"]


def test_every_package_has_a_row_and_a_free_licence() -> None:
    lines = packages.table().splitlines()
    assert len(lines) == 2 + len(packages.PACKAGES)
    for package in packages.PACKAGES:
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
        assert package.licence in ("Apache-2.0", "BSD-3-Clause", "GPL-2.0", "GPL-2.0-or-later")
