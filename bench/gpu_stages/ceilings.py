"""The versions on the machine and its ceilings: copies, reads and products, which all other times are compared with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from common import normal
from timing import OURS, Row, failed_row

import blt_kernels as bk
from blt_kernels import _extension
from gpu_stages import Case
from gpu_stages.target import Target

PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "transformers", "pytest", "hypothesis")
ROUNDS = 7


def ceilings_cases(target: Target) -> list[Case]:
    """Return cases of versions, of the ceilings, and of what a call costs however small it is."""
    size = 1 << (16 if target.rehearsal else 31)
    side = 64 if target.rehearsal else 8192
    cases = [
        Case("versions", versions),
        Case("kernels", kernels),
        Case("copy", partial(copy, size=size)),
        Case("read", partial(read, size=size)),
        *(Case(f"product {d}", partial(product, side=side, dtype=d)) for d in (torch.bfloat16, torch.float32)),
        Case("launch", launch),
    ]
    return [case for case in cases if target.wants(case.name)]


def versions(target: Target) -> Iterator[Row]:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    if not target.rehearsal:
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        found += [
            f"{properties.name}, {properties.multi_processor_count} multiprocessors",
            f"{properties.L2_cache_size >> 20} MB of L2",
        ]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(query, capture_output=True, text=True, timeout=10)
            found.append(f"driver, clocks and power limit: {done.stdout.strip()}")
    yield note("versions", "; ".join(found))


def kernels(target: Target) -> Iterator[Row]:
    """Report which kernels are loaded. Without compiled ones the stages that follow would measure the references."""
    cpu, cuda = _extension.load_cpu(), _extension.load_cuda()
    yield note("kernels", f"CPU: {cpu.isa or cpu.reason}; CUDA: {cuda.compiler or cuda.reason}, {cuda.path}")
    if cuda.compiler is None and not target.rehearsal:
        raise RuntimeError(f"no CUDA kernels: {cuda.reason}")


def note(op: str, text: str) -> Row:
    """Make a row that holds text in place of a time."""
    return failed_row(op, "", "", OURS, f"ok: {text}")


def copy(target: Target, size: int) -> Iterator[Row]:
    a, b = (torch.empty(size // 4, device=target.device).uniform_() for _ in range(2))
    yield measured(target, "limit: copy", f"{size} bytes", "float32", lambda: b.copy_(a), 2 * size)


def read(target: Target, size: int) -> Iterator[Row]:
    a = torch.empty(size // 4, device=target.device).uniform_()
    yield measured(target, "limit: read (torch.sum)", f"{size} bytes", "float32", a.sum, size)


def product(target: Target, side: int, dtype: torch.dtype) -> Iterator[Row]:
    a, b = (normal(side, side, seed=seed, dtype=dtype, device=target.device) for seed in (0, 1))
    name = str(dtype).removeprefix("torch.")
    yield measured(target, "limit: product", f"{side}^3", name, lambda: a @ b, 2 * side**3)


def launch(target: Target) -> Iterator[Row]:
    """Time the smallest call of an op that is one kernel, on the GPU alone."""
    x = torch.zeros(1, 260, device=target.device)
    yield measured(target, "smallest call: token_entropy", "[1, 260]", "float32", lambda: bk.token_entropy(x), 1)


def measured(target: Target, op: str, shape: str, dtype: str, function: Callable[[], Any], work: int) -> Row:
    """Time one function and make its row; `work` is in bytes or flops."""
    seconds, how = target.seconds_a_call([function])
    seconds()
    times = sorted(seconds() for _ in range(ROUNDS))
    median = times[len(times) // 2]
    status = f"ok, {how}"
    return Row(op, shape, dtype, 1, OURS, median * 1e3, None, work / median / 1e9, 1.0, None, None, ROUNDS, status)
