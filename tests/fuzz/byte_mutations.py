"""Mutations of the bytes of a file, whatever its format."""

from __future__ import annotations

import random
import struct
from pathlib import Path


def flips(file: Path, random: random.Random) -> None:
    """Change a few bytes."""
    content = bytearray(file.read_bytes())
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        if content:
            content[_near_the_ends(len(content), random)] = random.randrange(256)
    file.write_bytes(content)


def truncation(file: Path, random: random.Random) -> None:
    """Cut the end off."""
    content = file.read_bytes()
    file.write_bytes(content[: _near_the_ends(len(content) or 1, random)])


def noise(file: Path, random: random.Random) -> None:
    """Write random bytes."""
    alphabet = random.choice((bytes(range(256)), b"\0", b'{}[]",:0', b"PK\3\4", b"\xff\xfe", b"\n"))
    file.write_bytes(bytes(random.choices(alphabet, k=random.choice((0, 1, 7, 8, 9, 100, 5000)))))


def splice(file: Path, random: random.Random) -> None:
    """Repeat, insert or remove a run of bytes."""
    content = file.read_bytes()
    a, b = sorted(_near_the_ends(len(content) + 1, random) for _ in range(2))
    number = struct.pack("<Q", random.choice((1, 1 << 40)))
    middle = random.choice((b"", content[a:b] * 2, random.randbytes(16), number))
    file.write_bytes(content[:a] + middle + content[b:])


def _near_the_ends(size: int, random: random.Random) -> int:
    """Draw a place in a file; headers are at the start, and the tables of zip archives at the end."""
    near = random.randrange(min(size, 200))
    return random.choice((random.randrange(size), near, -1 - near)) % size


BYTES = (flips, truncation, noise, splice)
