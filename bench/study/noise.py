"""Noises on characters: those of the robustness table of the BLT paper (arXiv 2412.09871), and swaps.

Noise changes characters, not bytes, so a noised text is valid UTF-8 and a tokenizer reads it as a byte model does.

Two models are compared on the same noised text. The number of bytes that divides their nats cancels in the ratio of the
two, and so in that ratio over the same ratio on clean text. The study stores bits per noised byte: these are the bytes
that each model predicts, and a model that has learned nothing needs 8 bits for each of them. Bits per original byte
would charge `antspeak` for twice the text. The difference between noised and clean bits of one model mixes what noise
does to the model with what it does to the text: `antspeak` lowers it, since half of its characters are spaces. So the
study makes no claim from that difference alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

DROPPED, REPEATED, SWAPPED = 0.1, 0.2, 0.1  # shares of the characters
MAX_COPIES = 4


def antspeak(text: str, draw: random.Random) -> str:
    """Return capitals with a space between any two characters."""
    return " ".join(text.upper())


def drop(text: str, draw: random.Random) -> str:
    """Leave out a tenth of the characters."""
    return "".join(c for c in text if draw.random() >= DROPPED)


def random_case(text: str, draw: random.Random) -> str:
    """Write every letter small or large, with equal chances."""
    return "".join(c.upper() if draw.random() < 0.5 else c.lower() for c in text)


def repeat(text: str, draw: random.Random) -> str:
    """Write a fifth of the characters two to four times."""
    return "".join(c * draw.randint(2, MAX_COPIES) if draw.random() < REPEATED else c for c in text)


def swap(text: str, draw: random.Random) -> str:
    """Exchange a tenth of the pairs of neighbours. No character moves twice."""
    noised, i = list(text), 0
    while i + 1 < len(noised):
        if draw.random() < SWAPPED:
            noised[i], noised[i + 1] = noised[i + 1], noised[i]
            i += 1
        i += 1
    return "".join(noised)


def upper_case(text: str, draw: random.Random) -> str:
    """Return the text in capitals."""
    return text.upper()


NOISES: dict[str, Callable[[str, random.Random], str]] = {
    "antspeak": antspeak,
    "drop": drop,
    "random case": random_case,
    "repeat": repeat,
    "swap": swap,
    "upper case": upper_case,
}


def noised(name: str, text: str, max_bytes: int | None = None) -> str:
    """Return `text` with the noise `name`, which is the same for the same text.

    The first `max_bytes` bytes of the noised text are kept, up to a whole character, so that it fits in a row.
    """
    draw = random.Random(f"{name} {hashlib.sha256(text.encode()).hexdigest()}")
    return NOISES[name](text, draw).encode()[:max_bytes].decode(errors="ignore")
