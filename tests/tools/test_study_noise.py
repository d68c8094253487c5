"""The noises of the study."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study.noise import DROPPED, MAX_COPIES, NOISES, REPEATED, SWAPPED, noised

LETTERS = "".join(random.Random(0).choices("abcdefghij ABC\nßéжシ", k=20000))


@pytest.mark.parametrize("name", NOISES)
def test_noise_depends_on_the_text_alone(name: str) -> None:
    assert noised(name, LETTERS) == noised(name, LETTERS) != LETTERS
    assert noised(name, "") == ""


@pytest.mark.parametrize("name", NOISES)
def test_noised_text_fits_and_is_whole_characters(name: str) -> None:
    whole = noised(name, "シシß" * 50)
    for size in range(30, 36):
        cut = noised(name, "シシß" * 50, size)
        assert size - 2 <= len(cut.encode()) <= size
        assert whole.startswith(cut)


def test_case() -> None:
    assert noised("upper case", "Straße x") == "STRASSE X"
    assert noised("antspeak", "Ab c") == "A B   C"
    changed = noised("random case", "a" * 10000 + "B" * 10000)
    assert changed.lower() == "a" * 10000 + "b" * 10000
    for half in (changed[:10000], changed[10000:]):
        assert sum(c.isupper() for c in half) / 10000 == pytest.approx(0.5, abs=0.02)


def test_drop_and_repeat() -> None:
    short, long = noised("drop", LETTERS), noised("repeat", LETTERS)
    assert len(short) / len(LETTERS) == pytest.approx(1 - DROPPED, abs=0.01)
    assert len(long) / len(LETTERS) == pytest.approx(1 + REPEATED * MAX_COPIES / 2, abs=0.02)
    for inside, outside in ((short, LETTERS), (LETTERS, long)):
        rest = iter(outside)
        assert all(c in rest for c in inside)  # they come in this order
    distinct = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    assert {noised("repeat", distinct).count(c) for c in distinct} == {1, 2, 3, 4}


def test_swap() -> None:
    distinct = "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))
    changed = noised("swap", distinct)
    moves = [changed.index(c) - i for i, c in enumerate(distinct)]
    assert set(moves) == {-1, 0, 1}
    assert moves.count(1) == moves.count(-1)
    # A pair is looked at in each place, except in the middle of a pair that was exchanged.
    assert moves.count(1) / 5000 == pytest.approx(SWAPPED / (1 + SWAPPED), abs=0.015)
