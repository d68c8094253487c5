"""Compares a byte transformer, MegaByte, BLT-Space and BLT-Entropy at equal training FLOPs: ``python bench/study``.

Every model is trained on the sources of Python's standard library until it has used `--tflops` of training, three times
its FLOPs forward (`blt_kernels.flops.count_flops`, on batches of that text). So models that spend less on a byte read
more bytes. The FLOPs of the entropy model of BLT-Entropy are not counted, as in the paper, but are in the table. Then
bits per byte are measured on excerpts of held-out files, clean and noised.

Runs resume where they were killed, and are not repeated: they are in `--work`, under the digest of their options.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from timing import RESULTS, csv_path

from blt_kernels._files import write_text
from blt_kernels.flops import Config, Rows, count_flops, paper_flops
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByteConfig, load_model
from blt_kernels.models.config import RULE_FIELDS
from blt_kernels.nn import TransformerConfig
from blt_kernels.train import data
from blt_kernels.train.build import build_model
from blt_kernels.train.config import TrainConfig
from blt_kernels.train.evaluate import measure, threshold_for_patch_size
from blt_kernels.train.loop import train
from study import report
from study.report import Outcome
from study.text import CLEAN, CONDITIONS, HELDOUT, SPLIT_SEED, Corpus, prepare

BATCH, CONTEXT = 2048, 1024  # a step has so many bytes, a row at most so many of them
SAMPLE = 1 << 17  # FLOPs and thresholds are measured on so many bytes of training text
PATCHER_SHARE = 0.5  # the patcher trains for this share of the FLOPs of every other model


@dataclass(frozen=True)
class Model:
    """Describes a model of the study. `patch_size` chooses the threshold of entropy patching."""

    name: str
    family: str
    config: Config
    patch_size: float | None = None

    @property
    def kind(self) -> str:
        """Return the name that `train` has for it."""
        return {BLTConfig: "blt", ByteLMConfig: "entropy", MegaByteConfig: "megabyte"}[type(self.config)]


def layers(dim: int, count: int, window: int | None = None) -> TransformerConfig:
    """Return layers with heads of 64 and a feed-forward of 8/3 the width, without rounding to 256."""
    return TransformerConfig(dim, count, dim // 64, ffn_dim=32 * round(dim / 12), window=window)


def byte_lm(dim: int, count: int, window: int) -> ByteLMConfig:
    return ByteLMConfig(**{**asdict(layers(dim, count, window)), "rope_theta": 10000.0})


def blt(patching: str, wide: TransformerConfig, decoder_layers: int) -> BLTConfig:
    local = layers(128, 1, window=128)
    return BLTConfig(
        encoder=local,
        global_transformer=wide,
        decoder=replace(local, num_layers=decoder_layers),
        patcher=None,
        patching=patching,
        ngram_vocab=4096,
    )


PATCHER = Model("patcher", "patcher", byte_lm(128, 2, window=64))
MODELS = [
    Model("byte 128", "byte transformer", byte_lm(128, 3, window=512)),
    Model("byte 192", "byte transformer", byte_lm(192, 4, window=512)),
    Model("megabyte 8", "MegaByte", MegaByteConfig(8, layers(256, 3), layers(128, 3))),
    Model("megabyte 4", "MegaByte", MegaByteConfig(4, layers(256, 4), layers(128, 3))),
    Model("space small", "BLT-Space", blt("space", layers(192, 3), 1)),
    Model("space large", "BLT-Space", blt("space", layers(256, 4), 2)),
    Model("entropy 4.5 small", "BLT-Entropy", blt("entropy", layers(192, 3), 1), 4.5),
    Model("entropy 4.5 large", "BLT-Entropy", blt("entropy", layers(256, 4), 2), 4.5),
    # Longer patches pay for a wider global transformer.
    Model("entropy 8 wide", "BLT-Entropy", blt("entropy", layers(384, 4), 2), 8.0),
]


@dataclass(frozen=True)
class Options:
    """Has the options that decide the results of every run."""

    paths: Sequence[Path]
    work: Path
    tflops: float
    heldout_bytes: int
    bf16: bool


@dataclass(frozen=True)
class Job:
    """Describes a run to do: how to train, the text to measure on, and its sizes and FLOPs."""

    config: TrainConfig
    heldout: dict[str, list[data.Source]]
    outcome: dict[str, Any]

    @property
    def result(self) -> Path:
        return self.config.out / "result.json"


# --- planning ---------------------------------------------------------------------------------------------------------


def plan(model: Model, seeds: Sequence[int], options: Options, corpus: Corpus, patcher: Path | None) -> list[Job]:
    """Return one run a seed. The number of steps follows from the FLOPs on a sample of the training text."""
    overrides = asdict(model.config)
    if isinstance(model.config, BLTConfig):
        # The patcher is an option of its own, and fields that the scheme does not read are refused.
        refused = {"patcher", *RULE_FIELDS} - model.config.patch_rule.keys()
        overrides = {name: value for name, value in overrides.items() if name not in refused}
    if model.patch_size is not None:
        assert patcher is not None
        overrides["threshold"] = threshold_for_patch_size(
            ByteLM.load(patcher, dtype=torch.float32), corpus.sample, model.patch_size, BATCH, CONTEXT
        )
    config = TrainConfig(
        model.kind,
        [source.path for source in corpus.train],
        options.work,
        overrides=overrides,
        patcher=patcher if model.patch_size is not None else None,
        heldout=0.0,
        batch_bytes=BATCH,
        context=CONTEXT,
        bf16=options.bf16,
        checkpoint_every=1 << 30,
        tensorboard=False,
    )
    known = {"model": model.name, "family": model.family, **cost(config, corpus)}
    share = PATCHER_SHARE if model is PATCHER else 1.0
    steps = max(1, round(share * options.tflops * 1e12 / (3e6 * known["mflops"] * BATCH)))
    known |= {"steps": steps, "trained_bytes": steps * BATCH}
    jobs = []
    for seed in seeds:
        one = replace(config, seed=seed, steps=steps, warmup=min(50, steps // 10))
        name = f"{model.name.replace(' ', '-')}-{seed}-{digest_of(one, corpus)}"
        jobs.append(Job(replace(one, out=options.work / name), corpus.heldout, {**known, "seed": seed}))
    return jobs


def digest_of(config: TrainConfig, corpus: Corpus) -> str:
    """Return the digest of all that a run depends on: options, text, patcher."""
    what = asdict(replace(config, paths=[], out=Path(), patcher=None)) | {
        "train": [source.digest for source in corpus.train],
        "heldout": {name: [source.digest for source in sources] for name, sources in corpus.heldout.items()},
        "patcher file": config.patcher and hashlib.sha256(config.patcher.read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(what, default=str, sort_keys=True).encode()).hexdigest()[:10]


def cost(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """Return parameters, and FLOPs of a byte on a sample of the training text."""
    model = build_model(config)
    tables = model.encoder_hash_tok_embedding.weight.numel() if isinstance(model, BLT) else 0
    sizes: list[float] = []
    patches: list[float] = []
    for tokens, rows in data.heldout_batches(corpus.sample, BATCH, CONTEXT):
        found = Rows.of(model.patch(tokens, rows)) if isinstance(model, BLT) else Rows(rows.diff().tolist(), [0])
        sizes += found.num_bytes
        patches += found.num_patches
    total = sum(sizes)
    size = total / sum(patches) if sum(patches) else float(getattr(model.config, "patch_size", 1))
    flops = count_flops(model.config, Rows(sizes, patches)).per_byte(total)
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "table_parameters": tables,
        "patch_size": size,
        "mflops": flops.total.forward / 1e6,
        "paper_mflops": paper_flops(model.config, size, CONTEXT).total.forward / 1e6,
        "patcher_mflops": flops.patcher / 1e6,
    }


# --- running ----------------------------------------------------------------------------------------------------------

Watch = Callable[[str, float, str], None]  # the run, the share of it that is done, a text


def perform(job: Job, watch: Watch) -> Outcome:
    """Train and measure, or read the outcome of an earlier run."""
    if job.result.exists():
        return Outcome(**json.loads(job.result.read_text()))
    name, started, config = f"{job.outcome['model']}, seed {job.config.seed}", time.process_time(), job.config
    smooth = 8.0

    def report(now: Any) -> None:
        nonlocal smooth
        smooth += 0.05 * (now.bits_per_byte - smooth)
        watch(name, now.step / now.steps, f"{smooth:.2f} bits/byte")

    result = train(config, report)
    seconds = time.process_time() - started
    model = load_model(result.model, dtype=torch.float32)
    bits = {}
    for condition, sources in job.heldout.items():
        bits[condition] = measure(model, sources, BATCH, CONTEXT, bf16=config.bf16)[0]
    outcome = Outcome(**job.outcome, cpu_seconds=seconds, bits=bits)
    write_text(job.result, json.dumps(asdict(outcome)))
    shutil.rmtree(config.out / "checkpoint")  # checkpoints are large, and a finished run needs none
    watch(name, 1.0, f"held out {bits[CLEAN]:.3f} bits/byte")
    return outcome


def perform_all(jobs: Sequence[Job], processes: int) -> list[Outcome]:
    """Return the outcomes of `jobs`, in their order; with several processes, each has one thread."""
    with progress() as watch:
        if processes <= 1:
            torch.set_num_threads(1)
            return [perform(job, watch) for job in jobs]
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager, ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
            states = manager.dict()
            futures: list[Future[Outcome]] = [pool.submit(perform_apart, job, states) for job in jobs]
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                for future in done:
                    future.result()  # raises the exception of the run
                for name, (part, text) in sorted(states.items()):
                    watch(name, part, text)
            return [future.result() for future in futures]


def perform_apart(job: Job, states: Any) -> Outcome:
    """Call `perform` in a process of its own, which writes its progress to a shared dictionary."""
    return perform(job, lambda name, part, text: states.__setitem__(name, (part, text)))


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
                    shown.print(f"{name}: {text}", highlight=False)

        yield watch


# --- the command ------------------------------------------------------------------------------------------------------


def study(
    options: Options, models: Sequence[Model], seeds: int, processes: int
) -> tuple[list[Outcome], dict[str, Any]]:
    """Return the outcomes of all runs, and the settings that they depend on."""
    corpus = prepare(options.paths, options.work, SAMPLE, options.heldout_bytes)
    patcher, bits = None, None
    if any(model.patch_size is not None for model in models):
        jobs = plan(PATCHER, [0], options, corpus, None)
        bits = perform_all(jobs, 1)[0].bits[CLEAN]
        patcher = jobs[0].config.out / "model.safetensors"
    by_seed = zip(*(plan(model, range(seeds), options, corpus, patcher) for model in models), strict=True)
    outcomes = perform_all([job for jobs in by_seed for job in jobs], processes)
    order = [model.name for model in models]
    outcomes.sort(key=lambda outcome: (order.index(outcome.model), outcome.seed))
    digest = hashlib.sha256("".join(source.digest for source in corpus.train).encode()).hexdigest()
    settings = {
        "tflops": options.tflops,
        "seeds": list(range(seeds)),
        "bf16": options.bf16,
        "batch": BATCH,
        "context": CONTEXT,
        "heldout": HELDOUT,
        "split_seed": SPLIT_SEED,
        "train_files": len(corpus.train),
        "train_bytes": sum(source.size for source in corpus.train),
        "train_digest": digest,
        "heldout_files": len(corpus.heldout[CLEAN]),
        "heldout_bytes": {name: sum(s.size for s in corpus.heldout[name]) for name in CONDITIONS},
        "patcher_heldout_bits": bits,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "models": {model.name: asdict(model.config) for model in models},
    }
    return outcomes, settings


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    library = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--tflops", type=float, default=2.0, help="training FLOPs of every run, in 1e12")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every model")
    parser.add_argument("--models", nargs="+", default=[m.name for m in MODELS], help="names; all if not given")
    parser.add_argument("--paths", nargs="+", type=Path, default=[library], help="text; Python's standard library")
    parser.add_argument("--heldout-bytes", type=int, default=49152, help="bytes to measure on, at most")
    parser.add_argument("--fp32", action="store_true", help="train in fp32: slower where the processor has AMX")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS / f"study-{csv_path().stem}", help="where results go")
    given = parser.parse_args(arguments)
    unknown = set(given.models) - {model.name for model in MODELS}
    if unknown:
        parser.error(f"--models: expected {', '.join(m.name for m in MODELS)}, got {', '.join(sorted(unknown))}")
    models = [model for model in MODELS if model.name in given.models]
    options = Options(given.paths, given.work, given.tflops, given.heldout_bytes, not given.fp32)
    outcomes, settings = study(options, models, given.seeds, given.jobs)
    report.write(outcomes, settings, given.out)
    print(report.table(outcomes))
    print(f"written to {given.out}")
