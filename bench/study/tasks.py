"""Questions about the characters of words, and misspellings, from held-out text. A model answers by likelihood.

`questions` has tasks in the manner of CUTE (arXiv 2409.15452): a prompt with worked examples and a question, and
choices. The model's answer is the choice with the fewest nats. The choices are the right answers to questions that
differ in one thing, and one of these is asked at random. So they have the same length, except yes and no, and a model
that does not use the question is right once in as many times as there are choices.

A model of a million parameters may be at chance in all tasks. `misspellings` is easier: the rest of a text, and the
same with a changed character in its first word. The model is right if the original has fewer nats. Longer text has more
nats, so a model that cannot spell is above one half for an inserted character and below it for a deleted one. Compare
the shares of two models on the same pairs, not a share with one half.

Every choice starts with the blank before its first word, and the prompt ends before that blank. A tokenizer that starts
words with their blank splits the text there too, so it may tokenize prompt and choice apart.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

SHOTS, CHOICES = 4, 4
MAX_COUNT = 2  # a rare word occurs at most so often in the training text
BEFORE, AFTER = 256, 32  # characters of context of a misspelling
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
WORD = re.compile(r"[^\W\d_]+")
TASK_WORD = re.compile(r"[a-z]{5,9}")  # these have a byte a letter
MISSPELLED = re.compile(r"(?<= )\S{4,}(?=\s)")

Score = Callable[[Sequence[tuple[str, str]]], list[float]]  # nats of the second text after the first


@dataclass(frozen=True)
class Question:
    """Has a prompt and texts that may follow it; `choices[answer]` is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def right_answers(score: Score, asked: Sequence[Question]) -> list[bool]:
    """Return for each question whether the right choice has fewer nats than every other."""
    nats = iter(score([(question.prompt, choice) for question in asked for choice in question.choices]))
    found = []
    for question in asked:
        values = [next(nats) for _ in question.choices]
        right = values.pop(question.answer)
        found.append(right < min(values))
    return found


# --- words ------------------------------------------------------------------------------------------------------------


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Return how often each word occurs. A word is a run of letters."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORD.findall(text))
    return counts


def rare_words(heldout: Iterable[str], counts: Mapping[str, int], max_count: int = MAX_COUNT) -> list[str]:
    """Return the `usable` words of held-out texts that occur at most `max_count` times in the training text."""
    return [word for word in sorted(count_words(heldout)) if usable(word) and counts.get(word, 0) <= max_count]


def usable(word: str) -> bool:
    """Return whether the word has five to nine small letters of English, `CHOICES` of them once."""
    return TASK_WORD.fullmatch(word) is not None and sum(word.count(c) == 1 for c in word) >= CHOICES


# --- tasks ------------------------------------------------------------------------------------------------------------

# A task returns pairs of a question about a word and its answer. They differ in one thing, and so do their answers.
Task = Callable[[str, random.Random], list[tuple[str, str]]]


def spell(word: str, draw: random.Random) -> list[tuple[str, str]]:
    return [(f"spell {w}:", " ".join(w)) for w in variants(word, draw)]


def spell_inverse(word: str, draw: random.Random) -> list[tuple[str, str]]:
    return [(f"join {' '.join(w)}:", w) for w in variants(word, draw)]


def reverse(word: str, draw: random.Random) -> list[tuple[str, str]]:
    return [(f"reverse {w}:", w[::-1]) for w in variants(word, draw)]


def contains(word: str, draw: random.Random) -> list[tuple[str, str]]:
    inside = draw.choice(sorted(set(word)))
    return [(f"is {inside} in {word}:", "yes"), (f"is {other_letter(word, draw)} in {word}:", "no")]


def count(word: str, draw: random.Random) -> list[tuple[str, str]]:
    """Ask for the number of letters in the beginning of a word."""
    return [(f"letters of {word[:n]}:", str(n)) for n in draw.sample(range(2, len(word) + 1), CHOICES)]


def insert(word: str, draw: random.Random) -> list[tuple[str, str]]:
    new = other_letter(word, draw)
    return [(f"insert {new} after {c} in {word}:", word.replace(c, c + new)) for c in single_letters(word, draw)]


def delete(word: str, draw: random.Random) -> list[tuple[str, str]]:
    return [(f"delete {c} in {word}:", word.replace(c, "")) for c in single_letters(word, draw)]


def substitute(word: str, draw: random.Random) -> list[tuple[str, str]]:
    new = other_letter(word, draw)
    return [(f"replace {c} by {new} in {word}:", word.replace(c, new)) for c in single_letters(word, draw)]


def swap(word: str, draw: random.Random) -> list[tuple[str, str]]:
    letters = single_letters(word, draw)
    pairs = draw.sample([(a, b) for i, a in enumerate(letters) for b in letters[:i]], CHOICES)
    return [(f"swap {a} and {b} in {word}:", word.translate(str.maketrans(a + b, b + a))) for a, b in pairs]


TASKS: dict[str, Task] = {
    "spell": spell,
    "spell inverse": spell_inverse,
    "contains": contains,
    "count": count,
    "reverse": reverse,
    "insert": insert,
    "delete": delete,
    "substitute": substitute,
    "swap": swap,
}


def questions(words: Sequence[str], seed: int, per_task: int = 100) -> dict[str, list[Question]]:
    """Return up to `per_task` questions of each task, each about another word.

    A prompt has `SHOTS` worked examples with other words. `words` are those of `rare_words`, more than `SHOTS` of them.
    """
    found: dict[str, list[Question]] = {}
    for name, task in TASKS.items():
        draw = random.Random(f"{name} {seed}")
        asked = draw.sample(list(words), min(per_task, len(words)))
        found[name] = []
        for word in asked:
            examples = draw.sample([other for other in words if other != word], SHOTS)
            shots = [" ".join(draw.choice(task(example, draw))) for example in examples]
            alternatives = task(word, draw)
            answer = draw.randrange(len(alternatives))
            prompt = "\n".join([*shots, alternatives[answer][0]])
            found[name].append(Question(prompt, tuple(f" {text}" for _, text in alternatives), answer))
    return found


def other_letter(word: str, draw: random.Random) -> str:
    """Return a letter that the word does not have."""
    return draw.choice([c for c in ALPHABET if c not in word])


def single_letters(word: str, draw: random.Random) -> list[str]:
    """Return `CHOICES` letters that the word has once."""
    return draw.sample([c for c in word if word.count(c) == 1], CHOICES)


def variants(word: str, draw: random.Random) -> list[str]:
    """Return the word, and `CHOICES - 1` others, each with another pair of different neighbours exchanged."""
    places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    return [word, *(exchanged(word, i) for i in draw.sample(places, CHOICES - 1))]


def exchanged(word: str, i: int) -> str:
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


# --- misspellings -----------------------------------------------------------------------------------------------------

EDITS = ("insert", "delete", "replace", "swap")


def misspellings(texts: Iterable[str], known: Container[str], seed: int) -> dict[str, list[Question]]:
    """Return for each edit one pair a text: a word and what follows it, and the same with the word misspelled.

    The word is in the middle half of the text, stands between blanks, and has at least four letters or marks. It is the
    same one for all edits. No misspelling is in `known`. Texts without such a word are left out.
    """
    found: dict[str, list[Question]] = {edit: [] for edit in EDITS}
    for text in texts:
        draw = random.Random(f"{seed} {text}")
        matches = [m for m in MISSPELLED.finditer(text, len(text) // 4, len(text) * 3 // 4) if is_word(m[0])]
        draw.shuffle(matches)
        for match in matches:
            changed = {edit: misspelled(edit, match[0], text, draw) for edit in EDITS}
            if not any(word is None or word in known for word in changed.values()):
                start, end = match.span()
                before, after = text[max(start - 1 - BEFORE, 0) : start - 1], text[end : end + AFTER]
                for edit, word in changed.items():
                    found[edit].append(Question(before, (f" {match[0]}{after}", f" {word}{after}"), 0))
                break
    return found


def is_word(text: str) -> bool:
    """Return whether the text has only letters and marks."""
    return all(unicodedata.category(c)[0] in "LM" for c in text)


def misspelled(edit: str, word: str, text: str, draw: random.Random) -> str | None:
    """Return the word with one change after its first letter, or None if it cannot be changed so.

    New letters are drawn from those of the text, so the frequent ones more often, in the script and case of the word.
    """
    inner = range(1, len(word))
    if edit == "swap":
        places = [i for i in inner[:-1] if word[i] != word[i + 1]]
        return exchanged(word, draw.choice(places)) if places else None
    i = draw.choice(inner)
    if edit == "delete":
        return word[:i] + word[i + 1 :]
    letters = [c for c in text if c.isalpha() and c != word[i] and kind(c) == kind(word[-1])]
    if not letters:
        return None
    return word[:i] + draw.choice(letters) + word[i if edit == "insert" else i + 1 :]


def kind(letter: str) -> tuple[str, bool]:
    """Return the script of a letter and whether it is a capital."""
    return unicodedata.name(letter, "").split(" ")[0], letter.isupper()
