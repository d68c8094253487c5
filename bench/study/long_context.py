"""Measures how FLOPs, time and memory grow with the bytes of a row, figure (g): ``python bench/study long``.

A transformer over bytes is compared with MegaByte and BLT of as many parameters: 0.634 to 0.638 M without embeddings,
hash tables and entropy models, the same for every length of row, as the MegaByte paper compares (arXiv 2305.07185,
section 3). "T^(1/3)" is that paper's rule for the patch size, rounded to a power of two. Weights are random, and the
threshold of entropy patching is the one that makes 4.5 bytes a patch.

A point is a model, a length of row, and a pass: "forward" is the loss of one row without gradients, "step" the loss and
all gradients. Each sample of both has a process of its own with one thread. Its time is CPU time, which other processes
disturb less. All points take turns, and a point whose sample takes long has one. A point of more FLOPs than
`--max-tflop` is counted and not run. The peak is that of the resident memory, above what the process holds before.

FLOPs are those of `count_flops`, with the entropy model. What a step computes again to save memory counts in its time,
and not in its FLOPs. Points that the file of results holds already are not measured again.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory import resident_bytes
from rich.console import Console
from timing import RESULTS, csv_path
from torch import Tensor

from blt_kernels.flops import Config, Part, Rows, count_flops
from blt_kernels.ids import to_ids
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig
from blt_kernels.models.threshold import find_threshold
from blt_kernels.ops.entropy_patch import patch_starts
from blt_kernels.ops.token_entropy import token_entropy
from blt_kernels.testing import real_text
from study.families import blt, byte_lm, layers
from study.long_report import OK, Point, read, report, write

CONTEXTS = tuple(1024 * 4**i for i in range(6))
PASSES = ("forward", "step")
ENTROPY_PATCH = 4.5  # bytes
LONG_SECONDS = 10.0  # a point whose sample takes longer than this has one sample
SAMPLE_SECONDS, SAMPLE_CALLS = 0.5, 7  # a sample is the median of calls that take so long together, at most so many
THRESHOLD_BYTES, WARM_BYTES = 1 << 14, 1024
NOT_COUNTED = ("embed_tokens", "tok_embedding", "embed_first", "patcher.")  # parts of names of parameters


# --- models -----------------------------------------------------------------------------------------------------------


def patch_size_by_rule(context: int) -> int:
    """Return the power of two nearest to the cube root of the length."""
    return 2 ** round(math.log2(context) / 3)


def megabyte(patch_size: int) -> MegaByteConfig:
    return MegaByteConfig(patch_size, layers(128, 2), layers(128, 1))


def of_patches(patching: str, window: int | None = None, **fields: Any) -> BLTConfig:
    return blt(patching, 64, 2, layers(128, 2, window), **fields)


MODELS: dict[str, Callable[[int], Config]] = {
    "transformer": lambda context: byte_lm(128, 3, None),
    "transformer, window 512": lambda context: byte_lm(128, 3, 512),
    "MegaByte 8": lambda context: megabyte(8),
    "MegaByte 32": lambda context: megabyte(32),
    "MegaByte T^(1/3)": lambda context: megabyte(patch_size_by_rule(context)),
    "BLT-Static 8": lambda context: of_patches("static", patch_size=8),
    "BLT-Entropy": lambda context: of_patches("entropy", patcher=byte_lm(64, 1, 64)),
    "BLT-Entropy, window 256": lambda context: of_patches("entropy", 256, patcher=byte_lm(64, 1, 64)),
}


def build(config: Config, tokens: Tensor) -> ByteLM | MegaByte | BLT:
    """Return a model of random weights; the threshold of entropy patches is the one for the beginning of `tokens`."""
    torch.manual_seed(0)
    if isinstance(config, ByteLMConfig):
        return ByteLM(config)
    if isinstance(config, MegaByteConfig):
        return MegaByte(config)
    model = BLT(config)
    if config.patching == "entropy":
        assert model.patcher is not None
        with torch.no_grad():
            entropy = token_entropy(model.patcher(tokens[:THRESHOLD_BYTES]))
        threshold = find_threshold(
            lambda x: len(entropy) / int(patch_starts(entropy, threshold=x).num_patches), entropy, ENTROPY_PATCH
        )
        model.config = replace(config, threshold=threshold)
    return model


def patch_size_of(config: Config) -> float:
    if isinstance(config, BLTConfig):
        return ENTROPY_PATCH if config.patching == "entropy" else config.patch_size
    return getattr(config, "patch_size", 1)


def parameters_of(config: Config) -> int:
    """Return the number of parameters without embeddings, hash tables and the entropy model."""
    with torch.device("meta"):
        model = {ByteLMConfig: ByteLM, MegaByteConfig: MegaByte, BLTConfig: BLT}[type(config)](config)
    return sum(x.numel() for name, x in model.named_parameters() if not any(part in name for part in NOT_COUNTED))


def flops_of(config: Config, context: int) -> Part:
    """Return the FLOPs of a row, with the entropy model."""
    return count_flops(config, Rows.even(context, patch_size_of(config))).with_patcher


# --- measuring --------------------------------------------------------------------------------------------------------


@functools.cache
def planned(model: str, context: int, run: str) -> Point:
    """Return a point that is counted, and not measured."""
    config = MODELS[model](context)
    flops = flops_of(config, context)
    total = flops.forward + (flops.backward if run == "step" else 0.0)
    return Point(model, context, run, patch_size_of(config), parameters_of(config), total / 1e9)


def sample(model: str, context: int, runs: Iterable[str]) -> Iterator[tuple[str, float, float]]:
    """Yield every pass with its microseconds a byte, and the peak of its memory in MB."""
    tokens = to_ids(real_text(context))
    built = build(MODELS[model](context), tokens)

    def once(ids: Tensor, run: str) -> None:
        with torch.set_grad_enabled(run == "step"):
            loss = built.loss(ids)
        if run == "step":
            loss.backward()
            built.zero_grad()

    for run in runs:
        once(tokens[:WARM_BYTES], run)
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, times = resident_bytes("VmRSS"), []
        while len(times) < SAMPLE_CALLS and sum(times) < SAMPLE_SECONDS:
            start = time.process_time()
            once(tokens, run)
            times.append(time.process_time() - start)
        yield run, statistics.median(times) * 1e6 / context, (resident_bytes("VmHWM") - before) / 1e6


def print_sample(model: str, context: int, runs: Sequence[str], max_gb: float, max_seconds: int) -> None:
    """Take a sample in this process, whose memory and time are limited from then on: print a line for every pass."""
    for what, limit in ((resource.RLIMIT_DATA, int(max_gb * 1e9)), (resource.RLIMIT_CPU, max_seconds)):
        resource.setrlimit(what, (limit, limit + 10))
    with suppress(OSError):  # out of memory, the system should end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(1)
    try:
        for found in sample(model, context, runs):
            print(json.dumps(found), flush=True)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.exit(f"needs more than {max_gb:g} GB")


def in_process(
    model: str, context: int, runs: Sequence[str], max_gb: float, max_seconds: int
) -> tuple[dict[str, tuple[float, float]], str]:
    """Take a sample in a process of its own: time and memory by pass, and why those that are missing failed."""
    what = json.dumps([model, context, runs, max_gb, max_seconds])
    command = [sys.executable, str(Path(__file__).parent), "long", "--sample", what]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == -signal.SIGXCPU:
        why = f"takes longer than {max_seconds} s"
    return {run: (us, peak) for run, us, peak in map(json.loads, done.stdout.splitlines())}, why


def with_sample(point: Point, us_a_byte: float, peak_mb: float, load: float) -> Point:
    """Add a sample to a point."""
    if not point.us_a_byte:
        return replace(point, us_a_byte=(us_a_byte,), peak_mb=peak_mb, load=load, status=OK)
    times = (*point.us_a_byte, us_a_byte)
    return replace(point, us_a_byte=times, peak_mb=max(peak_mb, point.peak_mb), load=max(load, point.load))


def measure(options: argparse.Namespace, out: Path, say: Callable[[str], None]) -> list[Point]:
    """Measure all points that `out` does not hold, and write it after each sample."""
    points = {point.key: point for point in read(out)}
    for round_, context, model in itertools.product(range(options.rounds), options.contexts, options.models):
        due: dict[str, Point] = {}
        for run in options.passes:
            new = planned(model, context, run)
            point = points.get(new.key, new)
            is_long = point.median * context / 1e6 > LONG_SECONDS
            if new.gflop > 1e3 * options.max_tflop and not point.us_a_byte:
                points[new.key] = replace(new, status=f"not run: {new.gflop / 1e3:.3g} TFLOP")
            elif len(point.us_a_byte) <= round_ and not is_long and (point.status == OK or not round_):
                due[run] = point
        if due:
            load = os.getloadavg()[0]
            found, why = in_process(model, context, list(due), options.max_gb, options.max_seconds)
            for run, point in due.items():
                got = found.get(run)
                points[point.key] = with_sample(point, *got, load) if got else replace(point, status=why)
                say(f"{context:>8} {run:7} {model:24} {f'{got[0]:.3f} us a byte' if got else why}")
            write(in_order(points.values()), out)
    write(in_order(points.values()), out)
    return in_order(points.values())


def in_order(points: Iterable[Point]) -> list[Point]:
    """Return the points in the order of models, passes and lengths."""
    names = list(MODELS)
    return sorted(points, key=lambda point: (names.index(point.model), point.run, point.context))


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench/study long", description="Measure how cost grows with the bytes of a row.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="bytes of a row")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--rounds", type=int, default=3, help="samples of a point, fewer if one takes long")
    parser.add_argument("--max-tflop", type=float, default=12.0, help="points of more are counted and not run")
    parser.add_argument("--max-gb", type=float, default=16.0, help="memory of a process")
    parser.add_argument("--max-seconds", type=int, default=600, help="CPU time of the process of a sample")
    parser.add_argument("--out", type=Path, help="file of results; one with the date and the device if not given")
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sample is not None:
        print_sample(*json.loads(options.sample))
        return
    out = options.out or RESULTS / f"study-long-{csv_path().name}"
    console = Console()
    points = measure(options, out, lambda line: console.print(line, highlight=False))
    for run in options.passes:
        console.print(report(points, run), highlight=False, soft_wrap=True)
    console.print(f"wrote {out}")
