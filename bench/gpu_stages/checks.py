"""compute-sanitizer over the cases of the tests, and the test suite on CUDA tensors.

initcheck is left out: it reports reads of memory that torch's own kernels wrote, which the filter keeps from it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from timing import OURS, Row, failed_row

from gpu_stages import ROOT, Case
from gpu_stages.target import Target

NAMES = ("blt", "block_causal_attention_")  # the names of the kernels of nvcc and Triton contain these
NUM_BYTES = 300
LEFT_OUT = ("opcheck", "compile", "inductor", "nvrtc", "cuda_runtime")  # the last needs no GPU
PROCESSES = 8


def memcheck_cases(target: Target) -> list[Case]:
    return [Case("memcheck", partial(sanitize, tool="memcheck"))]


def racecheck_cases(target: Target) -> list[Case]:
    return [Case("racecheck", partial(sanitize, tool="racecheck"))]


def suite_cases(target: Target) -> list[Case]:
    return [Case("suite", suite)]


def sanitize(target: Target, tool: str) -> Iterator[Row]:
    """Yield a row for each error, and one that says how far the tool got."""
    options = [option for name in NAMES for option in ("--kernel-name", f"kernel_substring={name}")]
    if tool == "memcheck":  # torch asks the driver for what some drivers refuse
        options += ["--report-api-errors", "no"]
    program = [sys.executable, "tests/cuda_cases.py", "--bytes", str(NUM_BYTES)]
    if target.rehearsal:
        program = [sys.executable, "-c", "print('case one'); print('case two'); print('2 runs by nobody')"]
    command = [*target.tool("compute-sanitizer"), "--tool", tool, *options, *program]
    cases, errors, summary, ended = 0, [], "", False
    for line in lines_of(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"):
        cases += line.startswith("case ")
        ended |= re.match(r"\d+ runs by ", line) is not None
        if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line:
            summary = line.removeprefix("=========").strip()
        elif re.search(r"^========= (Invalid|Error|Internal|.*hazard|.*out of)", line):
            errors.append(line.removeprefix("=========").strip())
            if len(errors) <= 20:
                yield failed_row(tool, f"case {cases}", "", OURS, errors[-1][:200])
        if cases % 10 == 0 and line.startswith("case "):
            yield failed_row(tool, f"{cases} cases", "", OURS, "ok so far" if not errors else f"{len(errors)} errors")
    clean = ended and not errors and re.search(r"SUMMARY: 0 ", summary)
    early = "" if ended else ", the program ended early"
    status = f"ok: {summary}" if clean else f"{len(errors)} errors: {summary or 'no summary'}{early}"
    yield failed_row(tool, f"{cases} cases", "", OURS, status)


def suite(target: Target) -> Iterator[Row]:
    """Yield a row for each test that fails, as it fails, one for every hundred that pass, and one for the sum."""
    wanted = " and ".join(["cuda", *(f"not {name}" for name in LEFT_OUT)])
    tests, processes, backends = ["tests"], ["-n", str(PROCESSES), "--dist", "worksteal"], "cuda"
    if target.rehearsal:
        wanted, tests, processes, backends = "hand", ["tests/ops/test_patch_unpool.py"], [], "emulated"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    last, passed = "", 0
    for line in lines_of([*command, *processes, *tests, "-k", wanted], BLT_KERNELS_BACKENDS=backends):
        failure = re.search(r"\b(FAILED|ERROR)\b +(tests/\S+)|(tests/\S+) (FAILED|ERROR)", line)
        if failure and " - " not in line:  # the summary at the end repeats them
            yield failed_row("suite", failure[2] or failure[3], "", OURS, failure[1] or failure[4])
        if re.search(r"\bPASSED\b", line):
            passed += 1
            if passed % 100 == 0:
                yield failed_row("suite", f"{passed} tests", "", OURS, "ok so far")
        last = line if re.search(r"\d+ (passed|failed|error)", line) else last
    good = "passed" in last and not re.search(r"failed|error", last)
    yield failed_row("suite", wanted, "", OURS, f"{'ok: ' if good else ''}{last.strip('= ') or 'no end'}")


def lines_of(command: list[str], **environment: str) -> Iterator[str]:
    """Yield the lines that a command prints as they come, and copy them to the log."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        yield line.rstrip()
    process.wait()
