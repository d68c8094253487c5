"""Hardware counters of the kernels of one call of several ops: shares of DRAM and of issue slots, and why warps wait.

ncu runs this file as a program. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import layout_of, normal
from timing import OURS, Row

import blt_kernels as bk
from gpu_stages import Case
from gpu_stages.target import Target

SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")
KERNELS = "regex:patch_|entropy|ngram|block_causal_attention"
MAX_KERNELS = 14
LONGEST_STALLS = 3


def counters_cases(target: Target) -> list[Case]:
    return [Case("ncu", profile)]


def profile(target: Target) -> Iterator[Row]:
    """Run this file under ncu and yield a row for each kernel."""
    sections = [option for name in SECTIONS for option in ("--section", name)]
    options = ["--clock-control", "none", "--profile-from-start", "off", *sections]
    options += ["--csv", "--page", "raw", "--print-units", "base"]
    options += ["--kernel-name", KERNELS, "--launch-count", str(MAX_KERNELS)]
    program = [sys.executable, str(Path(__file__).resolve()), target.device]
    done = subprocess.run([*target.tool("ncu"), *options, *program], capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    rows = list(rows_of(done.stdout))
    yield from rows
    if done.returncode or not rows:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise RuntimeError(f"ncu ended with {done.returncode} and {len(rows)} kernels: {''.join(last)}")


def rows_of(output: str) -> Iterator[Row]:
    """Make a row for each kernel from the table that ``ncu --csv --page raw`` prints after the program's output."""
    begin = output.find('"ID"')
    for line in csv.DictReader(io.StringIO(output[begin:] if begin >= 0 else "")):
        if not line["ID"] or not line.get("Kernel Name"):  # this is the line of units, or one after the table
            continue
        dram = number(line, r"dram_{1,2}throughput\.avg\.pct")
        issue = number(line, r"(issue_active|inst_issued)\.avg\.pct")
        occupancy = number(line, r"warps_active\.avg\.pct")
        nanoseconds = number(line, r"gpu__time_duration\.sum")
        registers = number(line, r"registers_per_thread")
        stalls = {
            m[1]: float(value.replace(",", ""))
            for name, value in line.items()
            if name and (m := re.search(r"issue_stalled_(\w+?)_per_(?:warp|issue)_active", name)) and is_number(value)
        }
        longest = sorted(stalls, key=stalls.__getitem__, reverse=True)[:LONGEST_STALLS]
        waits = ", ".join(f"{name} {stalls[name]:.3g}" for name in longest)
        status = f"ok, DRAM {dram:.0f}%, issue {issue:.0f}%, warps {occupancy:.0f}%, {registers:.0f} registers, {waits}"
        name = re.sub(r"^void |\(.*", "", line["Kernel Name"])
        shape = f"grid {line.get('Grid Size', '?')} block {line.get('Block Size', '?')}"
        yield Row(
            f"ncu {name}", shape, "", 1, OURS, nanoseconds / 1e6, None, float("nan"), dram / 100, None, None, 1, status
        )


def number(line: dict[str, str], pattern: str) -> float:
    """Return the first column whose name matches, or NaN."""
    for name, value in line.items():
        if name and re.search(pattern, name) and is_number(value):
            return float(value.replace(",", ""))
    return float("nan")


def is_number(text: str | None) -> bool:
    return bool(text) and re.fullmatch(r"-?[\d,]+(\.\d+)?(e[+-]?\d+)?", text) is not None


# --- the program that ncu runs ----------------------------------------------------------------------------------------


def calls(device: str) -> list[Callable[[], Any]]:
    """Return one call of every op that is judged by the bytes it moves, and of attention."""
    small = device == "cpu"
    rows, length, width = (1, 64, 32) if small else (8, 8192, 1024)
    heads, head_width, vocab = (2, 16, 101) if small else (16, 64, 100002)
    size, dtype = rows * length, torch.float32 if small else torch.bfloat16
    layout = layout_of([length] * rows, device=device)
    x = normal(size, width, dtype=dtype, device=device).requires_grad_()
    y = normal(layout.capacity, width, dtype=dtype, device=device).requires_grad_()
    logits = normal(size, 260, dtype=dtype, device=device)
    tokens = torch.randint(4, 260, (size,), device=device)
    tables = normal(6 * vocab, width, dtype=dtype, device=device)
    q = normal(2 * layout.capacity, heads, head_width, dtype=dtype, device=device)
    k, v = (normal(size, heads, head_width, seed=n, dtype=dtype, device=device) for n in (1, 2))
    qa, ka, va = (
        normal(64 if small else 16384, heads, 16 if small else 128, seed=n, dtype=dtype, device=device).requires_grad_()
        for n in range(3)
    )
    offsets = torch.tensor([0, qa.shape[0] // 2, qa.shape[0]], dtype=torch.int32, device=device)
    pooled, unpooled = bk.patch_pool(x, layout), bk.patch_unpool(y, layout)
    attended = bk.block_causal_attention(qa, ka, va, offsets)
    return [
        lambda: bk.patch_pool(x.detach(), layout),
        lambda: torch.autograd.grad(pooled, x, pooled.detach(), retain_graph=True),
        lambda: bk.token_entropy(logits),
        lambda: bk.ngram_hash_embed(tokens, tables),
        lambda: bk.patch_cross_attention(q, k, v, layout, direction="encode", queries_per_patch=2),
        lambda: bk.block_causal_attention(qa.detach(), ka.detach(), va.detach(), offsets),
        lambda: torch.autograd.grad(attended, (qa, ka, va), attended.detach(), retain_graph=True),
        lambda: torch.autograd.grad(unpooled, y, unpooled.detach(), retain_graph=True),
    ]


@contextmanager
def profiled(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> None:
    functions = calls(sys.argv[1])
    for function in functions:
        function()
    with profiled(sys.argv[1]):
        for function in functions:
            function()


if __name__ == "__main__":
    main()
