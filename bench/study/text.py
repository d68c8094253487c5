"""Makes the text of the study: files to train on, excerpts of others to measure on, and noise for these.

The excerpts are in ``<work>/text/<condition>/``, one file each.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blt_kernels.train import data

PATTERNS = ("*.py", "*.txt", "*.html", "*.xml", "*.rst", "*.json", "*.csv")
HELDOUT, SPLIT_SEED = 0.03, 0  # so many files are held out, the same ones for every seed of a run
EXCERPT = 2048  # excerpts are so many bytes from the middle of a file
RATE = 0.1  # this share of the bytes is dropped, doubled, or swapped with the next


def random_case(text: bytes, draw: random.Random) -> bytes:
    """Make every ASCII letter small or large at random."""
    return bytes(b ^ 0x20 if chr(b).isascii() and chr(b).isalpha() and draw.random() < 0.5 else b for b in text)


def dropped(text: bytes, draw: random.Random) -> bytes:
    return bytes(b for b in text if draw.random() >= RATE)


def repeated(text: bytes, draw: random.Random) -> bytes:
    return b"".join(bytes([b, b]) if draw.random() < RATE else bytes([b]) for b in text)


def swapped(text: bytes, draw: random.Random) -> bytes:
    """Swap pairs of neighbours; no byte moves twice."""
    noised, i = bytearray(text), 0
    while i + 1 < len(noised):
        if draw.random() < RATE:
            noised[i], noised[i + 1] = noised[i + 1], noised[i]
            i += 1
        i += 1
    return bytes(noised)


NOISES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "random case": random_case,
    "dropped": dropped,
    "repeated": repeated,
    "swapped": swapped,
}
CLEAN = "clean"
CONDITIONS = (CLEAN, *NOISES)


@dataclass(frozen=True)
class Corpus:
    """Describes files to train on, excerpts of some of them, and by condition the excerpts of others to measure on."""

    train: list[data.Source]
    sample: list[data.Source]
    heldout: dict[str, list[data.Source]]


def prepare(paths: Sequence[Path], work: Path, sample_bytes: int, heldout_bytes: int) -> Corpus:
    """Split the files of `paths`; write excerpts of both sides, those to measure on under every condition."""
    train, held = data.split_sources(data.find_sources(paths, PATTERNS), HELDOUT, SPLIT_SEED)
    texts = excerpts(held, heldout_bytes)
    folders = {condition: work / "text" / condition for condition in CONDITIONS}
    for condition, folder in folders.items():
        write(folder, [noised(condition, text) for text in texts])
    write(work / "text" / "training", excerpts(train, sample_bytes))
    found = {condition: data.find_sources([folder]) for condition, folder in folders.items()}
    return Corpus(train, data.find_sources([work / "text" / "training"]), found)


def excerpts(sources: Sequence[data.Source], size: int) -> list[bytes]:
    """Return the middles of the first files, up to `size` bytes in all. The order by digest makes a fair sample."""
    found: list[bytes] = []
    for source in sources:
        left = size - sum(map(len, found))
        if left <= 0:
            break
        with source.path.open("rb") as file:
            file.seek(max(source.size - EXCERPT, 0) // 2)
            found.append(file.read(min(EXCERPT, left)))
    return found


def noised(condition: str, text: bytes) -> bytes:
    """Return a text with noise, the same for the same text."""
    draw = random.Random(f"{condition} {hashlib.sha256(text).hexdigest()}")
    return text if condition == CLEAN else NOISES[condition](text, draw)


def write(folder: Path, texts: Sequence[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}").write_bytes(text)
