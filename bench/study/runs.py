"""Runs of the study: what a run costs, how it is trained, and how many of them share the processors.

A run lies in ``<work>/runs/<name>-<digest of all that its training depends on>``: ``weights.pt``, ``outcome.json``, and
the bits of held-out excerpts. A run that is there is not trained again, and one that was killed goes on from its
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from blt_kernels._files import locked, whole_file, write_text
from blt_kernels.flops import Rows, count_flops
from blt_kernels.models import BLT, ByteLM
from blt_kernels.models.base import ByteModel
from blt_kernels.train import data
from blt_kernels.train.config import TrainConfig
from study.corpus import Corpus
from study.families import PATCHER, Model, begins_at_zero, build
from study.patching import Entropies, Patching, choose_patching
from study.readers import ByteReader, Reader, TokenReader, train_tokenizer
from study.results import Facts
from study.scoring import Scorer, num_bytes
from study.training import WatchOne, train

BATCH, CONTEXT = 4096, 1024  # a step has so many bytes, a row at most so many of them
SAMPLE_BATCHES, SAMPLE_SEED = 32, 1 << 20  # FLOPs and thresholds are measured on so many batches of training text


@dataclass(frozen=True)
class Job:
    """Describes a run: a model, its budget in TFLOP of training, and a seed for first weights and order of the text.

    With `init`, the global transformer of a BLT begins as the layers of the trained transformer in that file.
    """

    model: Model
    tflops: float
    seed: int
    learning_rate: float
    init: Path | None = None
    global_scale: float = 1.0  # learning rate of the global transformer over that of the rest


@dataclass(frozen=True)
class Outcome(Facts):
    """Describes a finished run, and holds the curve of `Trained` and the bits of every held-out excerpt by group."""

    steps: int
    curve: list[float]
    excerpts: dict[str, list[float]]

    @property
    def bits(self) -> dict[str, float]:
        """The bits of all held-out text of each group."""
        return {group: math.fsum(bits) for group, bits in self.excerpts.items()}

    def bits_per_byte(self, corpus: Corpus) -> float:
        """Return the mean over groups, each with the weight of its share of the training text."""
        total = sum(
            corpus.shares[group] * bits / sum(map(num_bytes, corpus.heldout[group]))
            for group, bits in self.bits.items()
        )
        return total / sum(corpus.shares.values())


@dataclass(frozen=True)
class Cost:
    """Holds the sizes and FLOPs of a model, as in `Facts`, and how it cuts patches."""

    parameters: int
    embedding_parameters: int
    patch_size: float
    mflops: float
    patcher_mflops: float
    threshold: float | None


class Lab:
    """Has what all runs share: the text, the tokenizers, the patcher and its entropies.

    Parameters
    ----------
    work : Path
    corpus : Corpus
    patcher : Path, optional
        Weights of the patcher. Entropy patches need it.
    costs : dict from str to Cost, optional
        Those that are known, by the `repr` of the model.
    """

    def __init__(
        self, work: Path, corpus: Corpus, patcher: Path | None = None, costs: dict[str, Cost] | None = None
    ) -> None:
        self.work, self.corpus, self.patcher = work, corpus, patcher
        self.digest: str = corpus.record["digest"]
        self._readers: dict[int | None, Reader] = {None: ByteReader()}
        self._entropies: Entropies | None = None
        self._costs = dict(costs or {})

    def __reduce__(self) -> Any:  # other processes load the files again
        return Lab, (self.work, self.corpus, self.patcher, self._costs)

    def reader(self, vocabulary: int | None) -> Reader:
        """Return the reader for a vocabulary; the first call trains its tokenizer."""
        if vocabulary is not None and vocabulary not in self._readers:
            path = self.work / f"bpe-{vocabulary}-{self.digest[:10]}.json"
            if not path.exists():
                train_tokenizer(self.corpus.train, vocabulary, path)
            self._readers[vocabulary] = TokenReader(path)
        return self._readers[vocabulary]

    @property
    def entropies(self) -> Entropies:
        """The entropies of the training text; the first call computes them."""
        if self._entropies is None:
            assert self.patcher is not None
            patcher = build(PATCHER, 0)
            assert isinstance(patcher, ByteLM)
            patcher.load_state_dict(torch.load(self.patcher, weights_only=True))
            digest = hashlib.sha256(self.patcher.read_bytes()).hexdigest()[:10]
            self._entropies = Entropies(patcher, self.corpus.train, CONTEXT, self.work / f"entropies-{digest}.npy")
        return self._entropies

    def batches(self, seed: int) -> data.PackedBatches:
        return data.PackedBatches(self.corpus.train, BATCH, CONTEXT, seed)

    def sample(self) -> list[data.Row]:
        batches = self.batches(SAMPLE_SEED)
        return [row for step in range(SAMPLE_BATCHES) for row in batches.rows(step)]

    def patching(self, model: Model) -> Patching | None:
        """Return how the patches of a model are cut from entropies, None if they are not."""
        if model.patch_size is None:
            return None
        threshold = self.cost(model).threshold
        assert threshold is not None
        return Patching(self.entropies, threshold, model.rule)

    def cost(self, model: Model) -> Cost:
        key = repr(model)
        if key not in self._costs:
            self._costs[key] = self._cost(model)
        return self._costs[key]

    def _cost(self, model: Model) -> Cost:
        built, rows = build(model, 0), self.sample()
        ids, offsets, total = self.reader(model.vocabulary).read(rows)
        patching = layout = None
        if model.patch_size is not None:
            patching = choose_patching(self.entropies, model.rule, model.patch_size, rows)
            layout = patching.of_rows(rows, offsets)
        elif isinstance(built, BLT):
            layout = built.patch(ids, offsets)
        sizes = Rows(offsets.diff().tolist(), [0]) if layout is None else Rows.of(layout)
        flops = count_flops(model.config, sizes).per_byte(total)
        parts = dict(flops.parts)
        if model.change == "no encoder cross attention":
            del parts["encoder cross"]
        units = sum(sizes.num_patches) or len(ids) / getattr(model.config, "patch_size", 1)
        patcher = count_flops(PATCHER.config, sizes).per_byte(total).total.forward if patching else 0.0
        return Cost(
            sum(p.numel() for p in built.parameters() if p.requires_grad),
            sum(p.numel() for p in embeddings(built) if p.requires_grad),
            total / units,
            sum(part.forward for part in parts.values()) / 1e6,
            patcher / 1e6,
            None if patching is None else patching.threshold,
        )

    def steps(self, job: Job) -> int:
        """Return the steps whose FLOPs are nearest to the budget."""
        return max(2, round(job.tflops * 1e12 / (3e6 * self.cost(job.model).mflops * BATCH)))

    def folder(self, job: Job) -> Path:
        """Return where a run lies: its name has the digest of all that its training depends on."""
        what = asdict(job.model) | {
            "kind": job.model.kind,
            "steps": self.steps(job),
            "seed": job.seed,
            "learning_rate": job.learning_rate,
            "global_scale": job.global_scale,
            "batch": BATCH,
            "context": CONTEXT,
            "text": self.digest,
            "reader": self.reader(job.model.vocabulary).digest,
            "threshold": self.cost(job.model).threshold,
            "patcher": None if job.model.patch_size is None else digest_of(self.patcher),
            "init": digest_of(job.init),
        }
        if (zero := begins_at_zero(job.model)) is not None:
            what["zero"] = zero
        digest = hashlib.sha256(json.dumps(what, default=str, sort_keys=True).encode()).hexdigest()[:10]
        name = "-".join(job.model.name.replace(",", "").split())
        return self.work / "runs" / f"{name}-{job.tflops:g}-{job.seed}-{digest}"

    def load(self, job: Job) -> Scorer:
        """Return the scorer of a finished run."""
        model = build(job.model, 0)
        model.load_state_dict(torch.load(self.folder(job) / "weights.pt", weights_only=True))
        return Scorer(model, self.reader(job.model.vocabulary), self.patching(job.model))


def digest_of(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def embeddings(model: ByteModel) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters that are only looked up."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            yield from module.parameters()


# --- one run ----------------------------------------------------------------------------------------------------------

Result = TypeVar("Result")
Watch = Callable[[str, float, str], None]  # is called with the run, the share of it that is done, and a text


def perform(lab: Lab, job: Job, watch: Watch) -> Outcome:
    """Train and measure, or read what earlier calls left."""
    folder, name = lab.folder(job), f"{job.model.name}, {job.tflops:g} TFLOP, seed {job.seed}, {job.learning_rate:g}"
    trained, scored = folder / "outcome.json", folder / f"excerpts-{lab.corpus.heldout_digest}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not trained.exists():
        with locked(folder, "work"):
            if not trained.exists():
                facts = train_job(lab, job, lambda part, text: watch(name, part, text))
                write_text(trained, json.dumps(facts))
            (folder / "checkpoint.pt").unlink(missing_ok=True)
    if not scored.exists():
        nats = lab.load(job).nats_of_groups(lab.corpus.heldout)
        bits = {group: [round(value / math.log(2), 2) for value in values] for group, values in nats.items()}
        write_text(scored, json.dumps(bits))
        mean = Outcome(**json.loads(trained.read_text()), excerpts=bits).bits_per_byte(lab.corpus)
        watch(name, 1.0, f"held out {mean:.3f} bits a byte")
    return Outcome(**json.loads(trained.read_text()), excerpts=json.loads(scored.read_text()))


def train_job(lab: Lab, job: Job, watch: WatchOne) -> dict[str, Any]:
    """Train, write the weights, and return the fields of `Outcome` but for the excerpts."""
    folder, model, cost, steps = lab.folder(job), build(job.model, job.seed), lab.cost(job.model), lab.steps(job)
    if job.init is not None:
        begin_as(model, torch.load(job.init, weights_only=True))
    blt_only: dict[str, Any] = (
        {"global_learning_rate": job.learning_rate * job.global_scale} if job.model.kind == "blt" else {}
    )
    config = TrainConfig(
        job.model.kind,
        [],
        folder,
        steps=steps,
        learning_rate=job.learning_rate,
        final_learning_rate=job.learning_rate / 100,
        warmup=max(min(10, steps // 4), steps // 20),
        **blt_only,
    )
    reader, patching = lab.reader(job.model.vocabulary), lab.patching(job.model)
    trained = train(model, lab.batches(job.seed), reader, patching, config, watch)
    with whole_file(folder / "weights.pt") as part:
        torch.save(trained.weights, part)
    sizes = {key: value for key, value in asdict(cost).items() if key != "threshold"}
    return {
        "run": folder.name,
        "model": job.model.name,
        "family": job.model.family,
        "size": job.model.size,
        "seed": job.seed,
        "tflops": job.tflops,
        "learning_rate": job.learning_rate,
        **sizes,
        "steps": steps,
        "trained_bytes": trained.trained_bytes,
        "cpu_seconds": trained.seconds,
        "curve": trained.curve,
    }


def begin_as(model: ByteModel, weights: dict[str, torch.Tensor]) -> None:
    """Copy the layers of a trained transformer into the global transformer."""
    assert isinstance(model, BLT)
    layers = {name.removeprefix("layers."): value for name, value in weights.items() if name.startswith("layers.")}
    model.global_transformer.layers.load_state_dict(layers)


# --- many runs --------------------------------------------------------------------------------------------------------


def for_all(
    function: Callable[[Lab, Job, Watch], Result], lab: Lab, jobs: Sequence[Job], processes: int
) -> list[Result]:
    """Return what `function` gives for each job; with several processes, each has one thread."""
    with progress() as watch:
        if min(processes, len(jobs)) <= 1:
            return [function(lab, job, watch) for job in jobs]
        for job in jobs:
            lab.cost(job.model)  # before the processes start, which would each compute it
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager, ProcessPoolExecutor(processes, context, _start, (lab,)) as pool:
            states = manager.dict()
            futures: list[Future[Result]] = [pool.submit(_call_apart, function, job, states) for job in jobs]
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                for future in done:
                    future.result()  # raises the exception of the run
                for name, (part, text) in sorted(states.items()):
                    watch(name, part, text)
            return [future.result() for future in futures]


_labs: list[Lab] = []  # that of a process that the pool started


def _start(lab: Lab) -> None:
    torch.set_num_threads(1)
    _labs.append(lab)


def _call_apart(function: Callable[[Lab, Job, Watch], Result], job: Job, states: Any) -> Result:
    """Call `function` in a process of the pool, which writes its progress to a shared dictionary."""
    return function(_labs[0], job, lambda name, part, text: states.__setitem__(name, (part, text)))


@contextmanager
def progress() -> Iterator[Watch]:
    """Show a bar for every run on a terminal, and elsewhere a line when a run is done."""
    shown, tasks, told = Console(stderr=True), {}, set()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, console=shown, disable=not shown.is_terminal) as bars:

        def watch(name: str, part: float, text: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0, text="")
            bars.update(tasks[name], completed=part, text=text)
            if part == 1.0 and text.startswith("held out") and name not in told:
                told.add(name)
                if not shown.is_terminal:
                    shown.print(f"{name}: {text}", highlight=False, soft_wrap=True)

        yield watch
