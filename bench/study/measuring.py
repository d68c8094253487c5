"""Measures trained models beside clean text: on noised text, questions about characters, and misspellings."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from blt_kernels._files import write_text
from study.corpus import Corpus
from study.noise import NOISES, noised
from study.results import ALL, CLEAN, Score
from study.runs import Job, Lab, Watch
from study.scoring import Scorer, num_bytes
from study.tasks import Question, count_words, misspellings, questions, rare_words, right_answers

NOISED_BYTES = 1 << 18  # so many bytes of held-out text get each noise, if all of it is measured
MAX_BYTES = 1000  # of a noised excerpt
QUESTIONS, SEED = 200, 0  # questions of each task, if all held-out text is measured


@dataclass(frozen=True)
class Suite:
    """Has noised texts by noise, and questions by task and by edit."""

    noises: dict[str, list[str]]
    questions: dict[str, dict[str, list[Question]]]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:10]


def make_suite(corpus: Corpus) -> Suite:
    """Return what is measured, from the held-out texts of a corpus: `CLEAN` is among the noises, for comparison."""
    groups = {group: texts for group, texts in corpus.heldout.items() if corpus.shares[group]}
    every = [text for texts in groups.values() for text in texts]
    counts = count_words(source.path.read_text(encoding="utf-8") for source in corpus.train)
    words = rare_words(every, counts)
    # Excerpts are taken from all groups in turn, those of large groups for longer.
    order = sorted((i / len(texts), group, text) for group, texts in groups.items() for i, text in enumerate(texts))
    chosen, total = [], 0
    for _, _, text in order:
        if total < NOISED_BYTES * corpus.measured:
            chosen.append(text)
            total += num_bytes(text)
    noises = {name: [noised(name, text, MAX_BYTES) for text in chosen] for name in NOISES}
    asked = {
        "task": questions(words, SEED, round(QUESTIONS * corpus.measured)),
        "misspelling": misspellings(every, counts, SEED),
    }
    return Suite({CLEAN: chosen, **noises}, asked)


@dataclass(frozen=True)
class Answers:
    """Has what a model says to a `Suite`: the bits of each text by noise, and which questions it answers right."""

    noises: dict[str, list[float]]
    questions: dict[str, dict[str, list[bool]]]

    def scores(self, run: str, suite: Suite) -> list[Score]:
        """Return the sums of each noise, task and edit."""
        found = []
        for name, bits in self.noises.items():
            texts = suite.noises[name]
            found.append(Score(run, "noise", name, ALL, len(texts), sum(map(num_bytes, texts)), math.fsum(bits)))
        for kind, tasks in self.questions.items():
            found += [Score(run, kind, name, ALL, len(right), right=sum(right)) for name, right in tasks.items()]
        return found


def measure(lab: Lab, job: Job, watch: Watch, suite: Suite) -> Answers:
    """Return the answers of a finished run, or those that it gave before."""
    folder = lab.folder(job)
    path = folder / f"answers-{suite.digest}.json"
    if not path.exists():
        write_text(path, json.dumps(asdict(ask(lab.load(job), suite))))
        watch(f"answers of {folder.name}", 1.0, "done")
    return Answers(**json.loads(path.read_text()))


def ask(scorer: Scorer, suite: Suite) -> Answers:
    nats = {name: scorer.nats(texts) for name, texts in suite.noises.items()}
    bits = {name: [round(value / math.log(2), 2) for value in values] for name, values in nats.items()}
    answers = {
        kind: {name: right_answers(scorer.nats_after, asked) for name, asked in tasks.items()}
        for kind, tasks in suite.questions.items()
    }
    return Answers(bits, answers)
