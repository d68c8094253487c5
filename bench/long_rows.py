"""Measures a forward and a training step of small models on one long row: ``python bench/long_rows.py``.

A step is loss, gradients and AdamW; a forward is the loss without gradients. Both find the patches of a BLT. Each point
has a process of its own with one thread, and is written to a CSV file as soon as it is measured; a point that the file
holds is not measured again. The time is CPU time, which other processes disturb less. Memory is the peak of what is
resident above what the process holds before, and with ``--allocator`` that of torch's allocator, in a second call. The
text is the sources of Python's standard library, end to end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from memory import peak_extra_bytes, resident_bytes
from tables import names_of, read_rows, write_rows
from timing import RESULTS, csv_path, exponent

from blt_kernels.ids import to_ids
from blt_kernels.models import BLT, BLTConfig, ByteLM, MegaByte, MegaByteConfig
from blt_kernels.models.base import ByteModel
from blt_kernels.nn import TransformerConfig

SIZES = tuple(16384 * 4**i for i in range(4))
PASSES = ("forward", "step")
WARM_BYTES = 256


def entropy_blt(**fields: TransformerConfig) -> ByteModel:
    """Return the small BLT with the bundled entropy model and its threshold."""
    patcher = ByteLM.bundled()
    model = BLT(replace(BLTConfig.small(), patcher=patcher.config, threshold=patcher.config.threshold, **fields))
    model.patcher = patcher.requires_grad_(False)
    return model


def without_window(config: TransformerConfig) -> TransformerConfig:
    return replace(config, window=None)


MODELS: dict[str, Callable[[], ByteModel]] = {
    "BLT small": entropy_blt,
    "BLT small, static": lambda: BLT(replace(BLTConfig.small(), patching="static", patcher=None)),
    "MegaByte small": lambda: MegaByte(MegaByteConfig.small()),
    "BLT small, no global window": lambda: entropy_blt(
        global_transformer=without_window(BLTConfig.small().global_transformer)
    ),
    "MegaByte small, no global window": lambda: MegaByte(
        replace(MegaByteConfig.small(), global_transformer=without_window(MegaByteConfig.small().global_transformer))
    ),
}


@dataclass(frozen=True)
class Point:
    """Holds one line of the results. `allocator_mb` is None if it was not measured; `load` is that of the machine."""

    model: str
    run: str
    num_bytes: int
    cpu_seconds: float
    wall_seconds: float
    resident_mb: float
    allocator_mb: float | None
    load: float


def library(num_bytes: int) -> bytes:
    """Return the beginning of the standard library's sources."""
    out = bytearray()
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        if "site-packages" not in path.parts:
            out += path.read_bytes()
        if len(out) >= num_bytes:
            return bytes(out[:num_bytes])
    raise ValueError(f"num_bytes: expected at most the {len(out)} bytes of the standard library, got {num_bytes}")


def sample(name: str, run: str, num_bytes: int, allocator: bool) -> Point:
    """Measure a point in this process."""
    with suppress(OSError):  # out of memory, the system should end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokens = MODELS[name](), to_ids(library(num_bytes))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def once(ids: torch.Tensor = tokens) -> None:
        with torch.set_grad_enabled(run == "step"):
            loss = model.loss(ids)
        if run == "step":
            loss.backward()
            optimizer.step()

    once(tokens[:WARM_BYTES])  # makes the gradients of the weights and the state of the optimizer
    before, load, cpu, wall = resident_bytes("VmRSS"), os.getloadavg()[0], time.process_time(), time.perf_counter()
    once()
    cpu, wall, peak = time.process_time() - cpu, time.perf_counter() - wall, resident_bytes("VmHWM")
    held = peak_extra_bytes(once) / 1e6 if allocator else None
    return Point(name, run, num_bytes, cpu, wall, (peak - before) / 1e6, held, load)


def in_process(name: str, run: str, num_bytes: int, allocator: bool) -> Point:
    """Measure a point in a process of its own."""
    point = json.dumps([name, run, num_bytes, allocator])
    command = [sys.executable, __file__, "--sample", point]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{name}, {run} of {num_bytes} bytes: exit code {done.returncode}")
    return Point(**json.loads(done.stdout.splitlines()[-1]))


def write(points: Sequence[Point], path: Path) -> None:
    order = list(MODELS)
    ordered = sorted(points, key=lambda p: (order.index(p.model), p.run, p.num_bytes))
    write_rows(path, names_of(Point), map(asdict, ordered), digits=4)


def table(points: Sequence[Point]) -> Iterator[str]:
    """Yield a Markdown table: seconds and GB of every size, and the exponents from the shortest row on."""
    sizes = sorted({point.num_bytes for point in points})
    yield "| model | pass | " + " | ".join(f"{size:,}" for size in sizes) + " | time | memory |"
    yield "|---|---|" + "---:|" * (len(sizes) + 2)
    for (model, run), group in itertools.groupby(points, lambda point: (point.model, point.run)):
        own = {point.num_bytes: point for point in group}
        cells = [f"{own[n].cpu_seconds:.1f} s, {own[n].resident_mb / 1e3:.2f} GB" if n in own else "" for n in sizes]
        powers = ["", ""]
        if len(own) > 1:
            seconds, memory = ([getattr(p, name) for p in own.values()] for name in ("cpu_seconds", "resident_mb"))
            powers = [f"T^{exponent(list(own), values):.2f}" for values in (seconds, memory)]
        yield " | ".join(("| " + model, run, *cells, *powers)) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure time and memory of small models on long rows.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[:3], metavar="MODEL")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="bytes of a row")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--allocator", action="store_true", help="measure torch's allocator too, in a second call")
    parser.add_argument("--out", type=Path, help="file of results; one with the date and the device if not given")
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sample:
        print(json.dumps(asdict(sample(*json.loads(options.sample)))))
        return
    out = options.out or RESULTS / f"long-rows-{csv_path().name}"
    points = read_rows(out, Point)
    for size, name, run in itertools.product(options.sizes, options.models, options.passes):
        if (name, run, size) not in {(p.model, p.run, p.num_bytes) for p in points}:
            points.append(in_process(name, run, size, options.allocator))
            write(points, out)
            print(points[-1], flush=True)
    print("\n".join(table(read_rows(out, Point))))


if __name__ == "__main__":
    main()
