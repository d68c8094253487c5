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

NOISED_BYTES = 1 << 17  # so many bytes of held-out text get each noise
MAX_BYTES = 1000  # of a noised excerpt
QUESTIONS, SEED = 100, 0  # questions of each task


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
        if total < NOISED_BYTES:
            chosen.append(text)
            total += num_bytes(text)
    noises = {name: [noised(name, text, MAX_BYTES) for text in chosen] for name in NOISES}
    asked = {"task": questions(words, SEED, QUESTIONS), "misspelling": misspellings(every, counts, SEED)}
    return Suite({CLEAN: chosen, **noises}, asked)


def measure(lab: Lab, job: Job, watch: Watch, suite: Suite) -> list[Score]:
    """Return the scores of a finished run, or those that were measured before."""
    folder = lab.folder(job)
    path = folder / f"scores-{suite.digest}.json"
    if not path.exists():
        write_text(path, json.dumps([asdict(score) for score in _measure(lab.load(job), folder.name, suite)]))
        watch(f"scores of {folder.name}", 1.0, "done")
    return [Score(**values) for values in json.loads(path.read_text())]


def _measure(scorer: Scorer, run: str, suite: Suite) -> list[Score]:
    scores = []
    for name, texts in suite.noises.items():
        bits = sum(scorer.nats(texts)) / math.log(2)
        scores.append(Score(run, "noise", name, ALL, len(texts), sum(map(num_bytes, texts)), bits))
    for kind, tasks in suite.questions.items():
        for name, asked in tasks.items():
            right = right_answers(scorer.nats_after, asked)
            scores.append(Score(run, kind, name, ALL, len(asked), right=sum(right)))
    return scores
