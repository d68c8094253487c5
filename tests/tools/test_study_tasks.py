"""The tasks of the study: right answers, what chance is, and what has to be true of misspellings."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from study import tasks
from study.tasks import EDITS, TASKS, Question, count_words, misspellings, questions, rare_words, right_answers

WORDS = [
    "flavours",
    "abbey",
    "context",
    "reverse",
    "mistaken",
    "wordplay",
    "plating",
    "junction",
    "bananas",
    "promptly",
]
USABLE = [word for word in WORDS if tasks.usable(word)]


def solve(question: str) -> str:
    """Answer in a way of its own."""
    what, *rest = question.removesuffix(":").split(" ")
    if what == "spell":
        return " ".join(list(rest[0]))
    if what == "join":
        return "".join(rest)
    if what == "reverse":
        return "".join(reversed(rest[0]))
    if what == "is":
        return "yes" if rest[0] in list(rest[2]) else "no"
    if what == "letters":
        return str(len(rest[1]))
    letters = list(rest[-1])
    if what == "swap":
        i, j = letters.index(rest[0]), letters.index(rest[2])
        letters[i], letters[j] = letters[j], letters[i]
    elif what == "insert":
        letters.insert(letters.index(rest[2]) + 1, rest[0])
    elif what == "delete":
        letters.remove(rest[0])
    else:
        assert what == "replace"
        letters[letters.index(rest[0])] = rest[2]
    return "".join(letters)


def test_words() -> None:
    counts = count_words(["a context, a_context; contexts Context", "junction"])
    assert counts == {"a": 2, "context": 2, "contexts": 1, "Context": 1, "junction": 1}
    heldout = ["junction plating context", "flavours, Plating abbey été"]
    assert rare_words(heldout, counts, max_count=1) == ["flavours", "junction", "plating"]
    assert "abbey" not in USABLE  # it has three letters once
    assert "bananas" not in USABLE


@pytest.mark.parametrize("name", TASKS)
def test_examples_and_answers_are_right(name: str) -> None:
    found = questions(USABLE, 0)[name]
    assert len(found) == len(USABLE)
    for question in found:
        *shots, asked = question.prompt.split("\n")
        assert len(shots) == tasks.SHOTS
        for shot in shots:
            before, answer = re.fullmatch(r"(.*:) (.*)", shot).groups()
            assert solve(before) == answer
        assert question.choices[question.answer] == f" {solve(asked)}"
        assert len(set(question.choices)) == len(question.choices) == (2 if name == "contains" else tasks.CHOICES)
        if name != "contains":
            assert len({len(choice) for choice in question.choices}) == 1


def test_questions_depend_on_the_seed_alone() -> None:
    assert questions(USABLE, 0) == questions(USABLE, 0) != questions(USABLE, 1)
    assert all(len(found) == 2 for found in questions(USABLE, 0, per_task=2).values())


@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_does_not_read_the_question_is_at_chance(name: str) -> None:
    asked = [question for seed in range(100) for question in questions(USABLE, seed)[name]]

    def prior(pairs: list[tuple[str, str]]) -> list[float]:
        return [random.Random(text).random() + (text.strip() not in USABLE) for _, text in pairs]

    share = sum(right_answers(prior, asked)) / len(asked)
    assert share == pytest.approx(1 / len(asked[0].choices), abs=0.06)


def test_right_answers() -> None:
    asked = [Question("p", ("a", "b"), 1), Question("q", ("c", "d", "e"), 0), Question("r", ("f", "g"), 0)]
    nats = {"pa": 2.0, "pb": 1.0, "qc": 1.0, "qd": 3.0, "qe": 0.5, "rf": 1.0, "rg": 1.0}
    # A tie is not right.
    assert right_answers(lambda pairs: [nats[p + c] for p, c in pairs], asked) == [True, False, False]


TEXTS = [
    "zero one two three " * 4 + "flavours of the words in a text, " + "four five six seven " * 4,
    "Слова которые стоят между пробелами можно легко испортить одной буквой here",
    "उदाहरण के लिए हिन्दी भाषा में लिखे हुए शब्दों को बदलना है और फिर देखना चाहिए",
    "日本語には空白がありません。",
]


def test_misspellings() -> None:
    found = misspellings(TEXTS, (), 0)
    assert list(found) == list(EDITS)
    assert misspellings(TEXTS, (), 0) == found
    assert {len(pairs) for pairs in found.values()} == {3}  # the last text has no words between blanks
    for text, *pairs in zip(TEXTS, *found.values(), strict=False):
        right = {pair.choices[0] for pair in pairs}
        assert len(right) == 1
        word = right.pop().split(" ")[1]
        for edit, pair in zip(EDITS, pairs, strict=True):
            original, changed = pair.choices
            assert pair.answer == 0
            assert pair.prompt + original in text
            assert len(text) / 4 - 1 <= text.index(pair.prompt + original) + len(pair.prompt) <= len(text) * 3 / 4
            wrong = changed.split(" ")[1]
            assert wrong[0] == word[0]
            assert wrong != word
            assert changed.split(" ")[2:] == original.split(" ")[2:]
            assert len(wrong) - len(word) == {"insert": 1, "delete": -1}.get(edit, 0)
            if edit == "swap":
                assert sorted(wrong) == sorted(word)
            if edit == "replace":
                assert sum(a != b for a, b in zip(wrong, word, strict=True)) == 1
            assert not set(wrong) & set("here") or text is TEXTS[0]  # letters are of the script of the word


def test_no_misspelling_is_a_known_word() -> None:
    class Swaps:
        """Contains every word that has the letters of `words`, in another order."""

        def __contains__(self, word: object) -> bool:
            return sorted(str(word)) == sorted("words")

    found = misspellings(["and and some words that and and and"], Swaps(), 0)
    assert {pair.choices[0].split(" ")[1] for pair in found["swap"]} <= {"some", "that"}
    assert not any(misspellings(["and and and words and and and"], Swaps(), 0).values())
