"""``make gpu``: what a GPU that is at hand for minutes can tell, in stages that never stop.

Every stage is a process of its own with a budget in seconds. What it measures is written at once as a row of a CSV file
in $OUT, or else in bench/results. A case that raises, hangs or ends its process costs one row; the stage starts anew
behind it. The most informative comes first, and a summary of one screen last.

    PYTHONPATH=. python bench/gpu.py --call 1               ceilings, smoke, timings, attention, search, ...
    PYTHONPATH=. python bench/gpu.py --call 2               smoke, memcheck, racecheck, test suite, timings
    PYTHONPATH=. python bench/gpu.py --stages smoke timings --only patch_pool
    PYTHONPATH=. python bench/gpu.py --call 1 --rehearse    all of it without a GPU, on tiny inputs
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import timing
from gpu_stages import CALLS, STAGES, Stage
from gpu_stages.build import provide_kernels
from gpu_stages.summary import summary
from gpu_stages.target import make_target

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
UNUSABLE = 77  # a stage's process exits with it if it wrote the row of its last case but cannot go on
STARTUP_SECONDS = 90.0  # the first case begins after importing torch and making a context
WORTH_SECONDS = 8.0  # a stage is not restarted for less
LEFT_SECONDS = 4.0  # the summary takes these of the whole budget


@dataclass(frozen=True)
class Files:
    """Describes the files that rows, the output of processes and the progress of a stage are written to."""

    rows: Path
    log: Path
    progress: Path


def main() -> int:
    arguments = parse()
    if arguments.child:
        return run_cases(STAGES[arguments.child], arguments)
    started = time.monotonic() - (0.0 if arguments.rehearse else process_age())
    folder = Path(arguments.out or os.environ.get("OUT") or timing.RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    name = "rehearsal" if arguments.rehearse else gpu_name()
    stem = f"{datetime.date.today().isoformat()}-{name}"
    files = Files(folder / f"{stem}.csv", folder / f"{stem}.log", folder / f".{stem}.progress")
    chosen, budget = (arguments.stages, 600.0) if arguments.stages else CALLS[arguments.call]
    budget = arguments.budget or budget
    before = len(timing.read_csv(files.rows))
    with files.log.open("a") as log:
        if not arguments.rehearse:
            tried = provide_kernels(log, budget / 2)
            timing.append_csv(
                [timing.failed_row("build", name, "", timing.OURS, how) for name, how in tried], files.rows
            )
        with background(arguments, chosen) as end_background:
            for name in chosen:
                if name == "counters":  # the profiler counts every kernel that runs meanwhile
                    end_background()
                left = started + budget - LEFT_SECONDS - time.monotonic()
                stage = STAGES[name]
                if arguments.rehearse:
                    stage = replace(stage, seconds=4 * stage.seconds, case_seconds=4 * stage.case_seconds)
                run_stage(stage, min(stage.seconds, left), arguments, files, log)
    files.progress.unlink(missing_ok=True)
    rows = timing.read_csv(files.rows)[before:]
    print(summary(rows, time.monotonic() - started))
    print(f"rows: {files.rows}\nlog: {files.log}")
    return int(any(not row["status"].startswith("ok") for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=tuple(CALLS), default=1)
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), help="in place of those of the call")
    parser.add_argument("--only", nargs="+", default=[], help="only cases with one of these in their names")
    parser.add_argument("--budget", type=float, help="seconds for all of it")
    parser.add_argument("--out", help="folder of the results: $OUT, else bench/results")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--child", choices=tuple(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--case-seconds", type=float, help="budget of a case, in place of its stage's")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def process_age() -> float:
    """Return seconds since this process began: on a cold disk, importing torch takes a part of the budget."""
    with suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0


def gpu_name() -> str:
    """Return the GPU as results are filed under it, without loading torch."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return re.sub(r"[^a-z0-9]+", "-", done.stdout.splitlines()[0].lower()).strip("-")
    sys.exit("make gpu: nvidia-smi names no GPU; `make gpu REHEARSE=1` runs all of it without one")


@contextmanager
def background(arguments: argparse.Namespace, stages: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Compile on idle cores what Triton compiles for later stages: each process fills the caches on the disk.

    Yields a function that ends these processes.
    """
    search = "import search_attention; search_attention.precompile()"
    with tempfile.TemporaryDirectory() as folder:
        places = ["--rows", f"{folder}/rows.csv", "--progress", f"{folder}/progress", "--warm"]
        commands = {
            "smoke": [str(BENCH / "gpu.py"), "--child", "smoke", "--only", "block_causal_attention", *places],
            "attention": [str(BENCH / "gpu.py"), "--child", "attention", *places],
            "search": ["-c", search],
        }
        if arguments.rehearse:
            commands = {}
        chosen = [command for name, command in commands.items() if name in stages]
        processes = [start(["nice", sys.executable, *command], subprocess.DEVNULL) for command in chosen]

        def end() -> None:
            for process in processes:
                kill(process)

        try:
            yield end
        finally:
            end()


def start(command: Sequence[str], log: IO[str] | int, **environment: str) -> subprocess.Popen[bytes]:
    """Return a process with a group of its own."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(BENCH), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- a stage, from outside --------------------------------------------------------------------------------------------


def run_stage(stage: Stage, budget: float, arguments: argparse.Namespace, files: Files, log: IO[str]) -> None:
    """Run the cases of a stage until its budget is spent, starting anew behind those that hang or end the process."""
    began = time.monotonic()
    skip, failures = 0, []
    print(f"\n===== {stage.name}, {budget:.0f} s", file=log, flush=True)
    while True:
        left = began + budget - time.monotonic()
        if left < min(WORTH_SECONDS, budget if skip == 0 else WORTH_SECONDS) or left <= 0:
            failures.append(("", f"no time for it, from case {skip + 1} on"))
            break
        files.progress.unlink(missing_ok=True)
        command = [sys.executable, str(BENCH / "gpu.py"), "--child", stage.name, "--skip", str(skip)]
        command += ["--rows", str(files.rows), "--progress", str(files.progress)]
        command += ["--rehearse"] * arguments.rehearse + (["--only", *arguments.only] if arguments.only else [])
        process = start(command, log, **({"TRITON_INTERPRET": "1"} if arguments.rehearse else {}))
        try:
            case_seconds = arguments.case_seconds or stage.case_seconds
            ended = watch(process, files.progress, began + budget, case_seconds)
        finally:
            kill(process)
        number, total, name = place(files.progress)
        if ended == "0":
            break
        if ended != str(UNUSABLE):
            failures.append((name, ended if ended.startswith("killed") else f"ended its process with {ended}"))
            timing.append_csv([failure_row(stage, *failures.pop())], files.rows)
        skip = number + 1
        if number < 0 or skip >= total:
            break
    timing.append_csv([failure_row(stage, *failure) for failure in failures], files.rows)
    seconds = time.monotonic() - began
    nan = float("nan")
    done = timing.Row(f"stage {stage.name}", "", "", 1, timing.OURS, seconds * 1e3, None, nan, nan, None, None, 1)
    timing.append_csv([done], files.rows)


def failure_row(stage: Stage, case: str, reason: str) -> timing.Row:
    return timing.failed_row(f"stage {stage.name}", case, "", timing.OURS, reason)


def watch(process: subprocess.Popen[bytes], progress: Path, deadline: float, case_seconds: float) -> str:
    """Wait for the end of a process: its exit code, or why it has to be killed."""
    since, at = time.monotonic(), place(progress)
    while True:
        with suppress(subprocess.TimeoutExpired):
            return str(process.wait(0.1))
        now, new = time.monotonic(), place(progress)
        if new != at:
            since, at = now, new
        if now > deadline:
            return f"killed: the budget of its stage was spent, after {now - since:.0f} s of it"
        if now - since > (case_seconds if at[0] >= 0 else STARTUP_SECONDS):
            return f"killed after {now - since:.0f} s"


def place(progress: Path) -> tuple[int, int, str]:
    """Return the number of the case that a stage is at (-1 before the first), how many there are, and its name."""
    with suppress(OSError, ValueError):
        number, total, name = progress.read_text().split(maxsplit=2)
        return int(number), int(total), name.strip()
    return -1, 0, "start"


# --- a stage, from inside ---------------------------------------------------------------------------------------------


def run_cases(stage: Stage, arguments: argparse.Namespace) -> int:
    """Run the cases behind the first `skip`; rows are written as they come."""
    target = make_target(arguments.rehearse, arguments.only, arguments.warm)
    with target.running():
        cases = stage.cases(target)
        for number, case in enumerate(cases):
            if number < arguments.skip:
                continue
            write_place(arguments.progress, f"{number} {len(cases)} {case.name}")
            print(f"--- {case.name}", flush=True)
            try:
                target.disturb(stage.name, case.name)
                for row in case.run(target):
                    timing.append_csv([row], arguments.rows)
            except Exception as error:
                traceback.print_exc()
                row = timing.failed_row(f"{stage.name} {case.name}", "", "", timing.OURS, timing.reason_of(error))
                timing.append_csv([row], arguments.rows)
            if not target.usable():
                return UNUSABLE
    return 0


def write_place(path: Path, text: str) -> None:
    """Write all of the text or nothing, since another process reads it."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
