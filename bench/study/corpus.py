"""Makes the text of the study: groups of files to train on, and excerpts of others to measure on.

The groups are "python", the sources of the standard library; "prose", documentation in English; "english", messages of
programs; and one for each language of `LANGUAGES`, translations of these messages. Sources and documentation are held
out by file. Messages are held out by package: models train on those of some and are measured on those of others, so
every language is measured on translations of the same text. Held-out messages that occur in the training text are left
out, and so are excerpts of files at least half of whose lines do.

Training text is in ``<work>/text/train/<group>/NNN.txt``, excerpts in ``<work>/text/heldout/<group>/NNN.txt``.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blt_kernels._files import write_text
from blt_kernels.train import data
from study.packages import PACKAGES, Package, fetch, messages, services

PYTHON, PROSE, ENGLISH = "python", "prose", "english"
TRAIN_BYTES = {PYTHON: 11_500_000, PROSE: 2_000_000, ENGLISH: 1_000_000}
HELDOUT_BYTES = {PYTHON: 200_000, PROSE: 50_000}
LANGUAGE_BYTES = 20_000  # held-out bytes of each language, and of messages in English
HELDOUT = 0.08  # this share of the files of sources and documentation is held out
EXCERPT = 1000  # the most bytes of a held-out excerpt
SAMPLE_EXCERPT = 2048  # the bytes of an excerpt of the training text
DOCUMENT = 1 << 14  # messages of a language are joined to documents of about so many bytes
SERVICE = 6000  # so many bytes are read of the documentation of one service
WORDS = 3  # messages of fewer words are names and labels

# Thousands of bytes of training text of each language, and the codes that packages have for it.
LANGUAGES: dict[str, tuple[int, tuple[str, ...]]] = {
    "russian": (1300, ("ru",)),
    "german": (1000, ("de",)),
    "japanese": (900, ("ja",)),
    "french": (850, ("fr",)),
    "spanish": (800, ("es",)),
    "turkish": (500, ("tr",)),
    "korean": (450, ("ko",)),
    "finnish": (400, ("fi",)),
    "polish": (350, ("pl",)),
    "chinese": (300, ("zh-Hans", "zh_Hans", "zh_CN")),
    "greek": (250, ("el",)),
    "hebrew": (200, ("he",)),
    "vietnamese": (200, ("vi",)),
    "tamil": (150, ("ta",)),
    "arabic": (100, ("ar",)),
    "hindi": (100, ("hi",)),
    "basque": (50, ("eu",)),
    "thai": (50, ("th",)),
    "georgian": (35, ("ka",)),
    "icelandic": (40, ("is", "is_IS")),
    "irish": (20, ("ga",)),
    "uyghur": (20, ("ug",)),
    "armenian": (5, ("hy",)),
    "kannada": (5, ("kn",)),
    "mongolian": (5, ("mn",)),
    "marathi": (0, ("mr",)),
    "scottish gaelic": (0, ("gd",)),
}


@dataclass(frozen=True)
class Corpus:
    """Describes the text of the study.

    Attributes
    ----------
    train : list of Source
        Files to train on, in the order of their digests.
    sample : list of Source
        Excerpts of them from evenly spaced places, to measure FLOPs and choose thresholds on.
    heldout : dict from group to list of str
        Excerpts of at most `EXCERPT` bytes. The first ones are a fair sample of all.
    shares : dict from group to int
        Bytes of training text; 0 for languages that are only measured.
    record : dict
        The digest of all of it, and the versions of what it was made from.
    measured : float
        The share of the held-out text that `heldout` has.
    heldout_digest : str
        The digest of `heldout`.
    """

    train: list[data.Source]
    sample: list[data.Source]
    heldout: dict[str, list[str]]
    shares: dict[str, int]
    record: dict[str, Any]
    measured: float = 1.0

    @cached_property
    def heldout_digest(self) -> str:
        return hashlib.sha256(json.dumps(self.heldout).encode()).hexdigest()[:10]


def prepare(
    work: Path,
    *,
    sample_bytes: int = 1 << 17,
    languages: bool = True,
    stdlib: Path | None = None,
    packages: Sequence[Package] = PACKAGES,
) -> Corpus:
    """Make the text in ``<work>/text``, unless it is there.

    Parameters
    ----------
    work : Path
        Packages are downloaded to its folder ``packages``.
    sample_bytes : int
        The size of `Corpus.sample`.
    languages : bool
        Without, the text is the standard library's alone, and nothing is downloaded.
    stdlib : Path, optional
        The folder of the standard library; that of this Python by default.
    packages : sequence of Package

    Raises
    ------
    RuntimeError
        A package cannot be downloaded.
    ValueError
        A package has another digest than it should have, or there are no sources.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    wheels = [(package, fetch(package, work / "packages")) for package in packages] if languages else []
    sources = data.find_sources([stdlib], ("*.py", "*.txt", "*.rst"))
    code = [Path(__file__).read_bytes(), Path(__file__).with_name("packages.py").read_bytes()]
    inputs = [hashlib.sha256(text).hexdigest() for text in code]
    inputs += [source.digest for source in sources] + [package.sha256 for package, _ in wheels] + [str(sample_bytes)]
    key = hashlib.sha256(" ".join(inputs).encode()).hexdigest()
    folder = work / "text"
    if not (folder / "corpus.json").exists() or json.loads((folder / "corpus.json").read_text())["inputs"] != key:
        shutil.rmtree(folder, ignore_errors=True)
        train, heldout = build(stdlib, [source.path for source in sources], wheels)
        for name, made in (("train", train), ("heldout", heldout)):
            for group, texts in made.items():
                write(folder / name / group, texts)
        every = [text for texts in train.values() for text in texts]
        write(folder / "sample", spread(every, sample_bytes // SAMPLE_EXCERPT, SAMPLE_EXCERPT))
        found = sorted(path for path in folder.rglob("*.txt"))
        digests = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in found]
        record = {
            "digest": hashlib.sha256("".join(digests).encode()).hexdigest(),
            "python": platform.python_version(),
            "packages": {package.name: package.version for package, _ in wheels},
        }
        write_text(folder / "corpus.json", json.dumps({"inputs": key, "record": record}, indent=1))
    record = json.loads((folder / "corpus.json").read_text())["record"]
    train_sources = data.find_sources([folder / "train"])
    order = [PYTHON, PROSE, ENGLISH, *LANGUAGES]
    groups = sorted((path.name for path in (folder / "heldout").iterdir()), key=order.index)
    shares = {group: sum(x.size for x in train_sources if x.path.parent.name == group) for group in groups}
    excerpts = {
        group: [path.read_text(encoding="utf-8") for path in sorted((folder / "heldout" / group).iterdir())]
        for group in groups
    }
    return Corpus(train_sources, data.find_sources([folder / "sample"]), excerpts, shares, record)


Texts = dict[str, list[str]]


def build(stdlib: Path, paths: Sequence[Path], wheels: Sequence[tuple[Package, Path]]) -> tuple[Texts, Texts]:
    """Return the training documents and the held-out excerpts of each group."""
    documents: Texts = {PYTHON: [], PROSE: []}
    for path in paths:
        for group, text in of_file(path.relative_to(stdlib), path.read_bytes()):
            documents[group].append(text)
    for package, wheel in wheels:
        if package.prose:
            documents[PROSE] += [cut(text, SERVICE) for text in services(wheel)]
    train: Texts = {}
    heldout: Texts = {}
    for group, texts in documents.items():
        ordered = sorted(dict.fromkeys(filter(None, texts)), key=rank)
        held = [text for text in ordered if int(rank(text, "split")[:8], 16) < HELDOUT * 2**32]
        train[group] = list(first([text for text in ordered if text not in set(held)], TRAIN_BYTES[group]))
        heldout[group] = excerpts_of_files(held, train[group], HELDOUT_BYTES[group])
    if wheels:
        add_messages(train, heldout, wheels)
    return train, {group: texts for group, texts in heldout.items() if texts}


def of_file(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Yield the group and the text of the documents in a file of the standard library.

    Files that are not UTF-8, that depend on the machine, or that are tables of characters are left out.
    """
    try:
        text = content.decode("utf-8").replace("\0", "")
    except UnicodeDecodeError:
        return
    if path.parts[0].startswith(("config-", "_sysconfigdata")) or (path.parts[0] == "encodings" and len(text) > 8000):
        return
    if path.parts == ("pydoc_data", "topics.py"):
        yield from ((PROSE, topic) for topic in ast.literal_eval(text[text.index("{") :]).values())
    elif path.suffix == ".py":
        yield PYTHON, text
    elif sum(map(str.isalpha, text)) > 0.6 * len(text):
        yield PROSE, text


def add_messages(train: Texts, heldout: Texts, wheels: Sequence[tuple[Package, Path]]) -> None:
    """Add the groups of messages: English, and its translations."""
    names = {code: language for language, (_, codes) in LANGUAGES.items() for code in codes}
    found: dict[bool, dict[str, dict[str, str]]] = {
        held: {language: {} for language in (ENGLISH, *LANGUAGES)} for held in (False, True)
    }  # from the message to its source
    for package, wheel in wheels:
        if not package.prose:
            for code, source, text in messages(wheel):
                source, text = " ".join(source.split()), " ".join(text.split())
                if " " in source:  # other sources are keys, or words
                    found[package.heldout][ENGLISH].setdefault(source, source)
                if code in names:
                    found[package.heldout][names[code]].setdefault(text, source)
    english = {comparable(text) for held in (False, True) for text in found[held][ENGLISH]}
    taken: set[str] = set()  # what occurs in training text, in any language
    for language, translated in found[False].items():
        chosen = list(choose(translated, taken, english if language != ENGLISH else set()))
        size = TRAIN_BYTES[ENGLISH] if language == ENGLISH else 1000 * LANGUAGES[language][0]
        train[language] = join(first(chosen, size), DOCUMENT)
        taken.update(comparable(line) for text in train[language] for line in text.splitlines())
    for language, translated in found[True].items():
        short = {text: source for text, source in translated.items() if len(text.encode()) <= EXCERPT}
        chosen = list(choose(short, taken, english if language != ENGLISH else set()))
        heldout[language] = join(first(chosen, LANGUAGE_BYTES), EXCERPT)


def choose(translated: dict[str, str], *left_out: set[str]) -> Iterator[str]:
    """Yield sentences in the order of their sources' digests, each once, but for those that are `left_out`.

    Where the source is in English, its words are counted, since some languages are written without spaces.
    """
    taken: set[str] = set()
    for text in sorted(translated, key=lambda text: (rank(translated[text]), text)):
        key = comparable(text)
        letters = sum(c.isalpha() or ord(c) > 127 for c in text)  # vowel signs of many scripts are not letters
        counted = translated[text] if " " in translated[text] else text
        sentence = len(counted.split()) >= WORDS and letters > 0.6 * len(text)
        if sentence and not any(key in x for x in (taken, *left_out)):
            taken.add(key)
            yield text


def comparable(text: str) -> str:
    """Return a text without what often differs between copies of a sentence: case, spaces, digits, punctuation."""
    return re.sub(r"[\s\d!-/:-@\[-`{-~]+", "", text.casefold())


def excerpts_of_files(held: Sequence[str], train: Sequence[str], size: int) -> list[str]:
    """Return excerpts of held-out files, in the order of their digests, without those that training files have too."""
    known = {line.strip() for text in train for line in text.splitlines()}
    found: list[str] = []
    for excerpt in spread(held, 2 * size // EXCERPT, EXCERPT):
        lines = [line.strip() for line in excerpt.splitlines() if len(line.strip()) > 20]
        if 2 * sum(line in known for line in lines) < len(lines):
            found.append(excerpt)
    return list(first(sorted(found, key=rank), size))


def spread(texts: Sequence[str], count: int, size: int) -> list[str]:
    """Return excerpts of at most `size` bytes around `count` evenly spaced places of the texts, each once.

    They begin and end at the ends of lines, but for lines longer than `size` // 2. Blank ones are left out.
    """
    found: dict[str, None] = {}
    place, total, start = 0, sum(len(text.encode()) for text in texts), 0
    for text in texts:
        content = text.encode()
        while place < count and (position := total * place // count - start) < len(content):
            target = max(0, min(position - size // 2, len(content) - size))
            begin = content.rfind(b"\n", 0, target) + 1
            begin = target if target - begin > size // 2 else begin
            found[cut(content[begin:].decode("utf-8", "ignore"), size)] = None
            place += 1
        start += len(content)
    return [text for text in found if text.strip()]


def cut(text: str, size: int) -> str:
    """Return the first lines of a text, at most `size` bytes; if the first line is longer, its first characters."""
    content = text.encode()
    if len(content) <= size:
        return text
    end = content.rfind(b"\n", 0, size) + 1
    return content[: end or size].decode("utf-8", "ignore")


def first(texts: Iterable[str], size: int) -> Iterator[str]:
    """Yield texts until they have `size` bytes; the last is cut."""
    left = size
    for text in texts:
        if left <= 0:
            return
        if part := cut(text, left):
            yield part
        left -= len(text.encode())


def join(lines: Iterable[str], size: int) -> list[str]:
    """Join lines to texts of at most `size` bytes, or of one line."""
    found: list[list[str]] = []
    left = 0
    for line in lines:
        length = len(line.encode()) + 1
        if not found or length > left:
            found.append([])
            left = size
        found[-1].append(line)
        left -= length
    return ["\n".join(group) + "\n" for group in found]


def rank(text: str, salt: str = "") -> str:
    """Return a digest that sorts texts into an order which has nothing to do with their content."""
    return hashlib.sha256(f"{salt}{text}".encode()).hexdigest()


def write(folder: Path, texts: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
