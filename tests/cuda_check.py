"""``make cuda-check``: compile every CUDA kernel for every GPU architecture, without a GPU, and look at the result.

For each kernel it prints registers, static shared memory and the warps that may be on a multiprocessor at a time. It
fails on a spill, a stack frame, or a kernel of 16-byte vectors (one is in its name) without a 128-bit load.

For sm_90a it also estimates how fast the ops are (cuda_model/), compares that with bench/results/model-sm90.csv, and
fails where a time or a number of instructions moved by more than 10%. --update writes that file anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cuda_model import attention_cases, cases, table
from cuda_model.run import Compiled, ModelError, rows_of_case
from cuda_model.sass import functions_of

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90a", "100")
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # a multiprocessor has so many
MODELED = "90a"
ATTENTION = "block_causal_attention"
SIZES = {"float": 4, "double": 8, "__nv_bfloat16": 2, "__half": 2}


@dataclass
class Kernel:
    """Has what ptxas says of a kernel, its launch bounds and its code."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int
    threads: int
    wide_loads: bool

    @property
    def warps(self) -> int:
        """Return warps on a multiprocessor, as far as registers and static shared memory allow."""
        warps = -(-self.threads // 32)
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32) // warps
        return min(by_registers, WARPS // warps, BLOCKS) * warps

    def faults(self) -> list[str]:
        """Return what is wrong with the kernel."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes of spills")
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        if self.moves_whole_vectors() and not self.wide_loads:
            found.append("no 128-bit load")
        return found

    def moves_whole_vectors(self) -> bool:
        """Return whether a kernel moves 16-byte vectors: by the vector in its name, or for entropies."""
        vector = re.search(r"<(?:blt::Split<)?(\w+), (?:int, |long long, )?(\d+)", self.name)
        wide = vector is not None and SIZES.get(vector[1], 0) * int(vector[2]) == 16
        return wide or self.name.startswith(("token_entropy", "entropy_patch", "linear_cross_entropy"))


def torch_headers() -> Path:
    """Return the headers of the installed torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("cuda-check: torch is not installed")
    return Path(spec.origin).parent / "include"


def cuobjdump() -> str:
    """Return the disassembler of the toolkit, or that of Triton's package."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None or not Path(found).exists():
        sys.exit("cuda-check: cuobjdump is missing: pip install triton, which has it, or a CUDA toolkit")
    return found


def compile_launcher(source: Path, arch: str, folder: Path) -> str:
    """Compile a .cu for a GPU architecture into `folder`, and return what ptxas says; leave its SASS beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [
        *("nvcc", "-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(torch_headers())),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "--keep", "--keep-dir", str(folder)),
        *("-c", str(source), "-o", str(folder / "out.o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"cuda-check: {source.name} does not compile:\n{done.stdout}{done.stderr}")
    (cubin,) = folder.glob(f"{source.stem}*.cubin")
    sass = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    (folder / "kernels.sass").write_text(sass)
    return done.stdout + done.stderr


def demangle(symbols: list[str]) -> list[str]:
    """Return names in C++, without parameters."""
    text = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout
    return [line.removeprefix("void ").removeprefix("blt::") for line in text.splitlines()]


def threads_of(ptx: str) -> dict[str, int]:
    """Return the threads of a block for each symbol, by the launch bounds."""
    entries = re.findall(r"\.entry (\w+)\((?:[^)]*)\)\s*(?:\.maxntid (\d+))?", ptx)
    return {symbol: int(threads or 1024) for symbol, threads in entries}


def parameters_of(ptx: str) -> dict[str, tuple[int, ...]]:
    """Return the bytes of each parameter by the symbol of the kernel."""
    entries = re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx)
    one = re.compile(r"\.param (?:\.align \d+ )?\.[bufs](\d+) \w+(?:\[(\d+)\])?")
    return {symbol: tuple(int(b) // 8 * int(n or 1) for b, n in one.findall(text)) for symbol, text in entries}


def folder_of(stem: str, arch: str) -> Path:
    """Return the folder that a launcher is compiled to."""
    return ROOT / "build" / "cuda-check" / f"{stem}-{arch}"


def kernels_of(source: Path, arch: str) -> list[Kernel]:
    """Compile a .cu for a GPU architecture and describe its kernels."""
    folder = folder_of(source.stem, arch)
    log = compile_launcher(source, arch, folder)
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        re.sub(r"\n(?!ptxas info +: Compiling)", " ", log),
    )
    names = demangle([f[0] for f in found])
    (ptx,) = folder.glob(f"{source.stem}*.ptx")
    threads, code = threads_of(ptx.read_text()), functions_of((folder / "kernels.sass").read_text())
    return [
        Kernel(
            *(name, arch, int(registers), int(shared or 0), int(stack), int(stores) + int(loads)),
            *(threads[symbol], re.search(r"\bLDG\.E(\.\w+)*\.128", code[symbol]) is not None),
        )
        for name, (symbol, stack, stores, loads, registers, shared) in zip(names, found, strict=True)
    ]


# --- the static model -------------------------------------------------------------------------------------------------


@cache
def compiled(stem: str) -> list[Compiled]:
    """Return the kernels of a launcher that was compiled, for the model."""
    folder = folder_of(stem, MODELED)
    (cubin,), (ptx,) = folder.glob(f"{stem}*.cubin"), folder.glob(f"{stem}*.ptx")
    usage = subprocess.run([cuobjdump(), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    used = {m[0]: (int(m[1]), int(m[2])) for m in re.findall(r"Function (\w+):\s+REG:(\d+) .*?SHARED:(\d+)", usage)}
    threads, parameters = threads_of(ptx.read_text()), parameters_of(ptx.read_text())
    code = functions_of((folder / "kernels.sass").read_text())
    return [
        Compiled(name, code[symbol], *used[symbol], threads[symbol], parameters[symbol])
        for symbol, name in zip(code, demangle(list(code)), strict=True)
    ]


def nvcc_version() -> str:
    """Return the compiler of the rows of CUDA C++ kernels."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return f"nvcc {found[1]}" if found else "nvcc"


Modeled = tuple[list[table.Row], list[str]]  # has rows, and what is wrong with the model


def model_case(number: int) -> Modeled:
    """Model one of `cases.cases()`, in a process of its own."""
    case = list(cases.cases())[number]
    try:
        return rows_of_case(case, compiled, nvcc_version()), []
    except ModelError as error:
        return [], [f"{case.op}: {error}"]


def model_attention() -> Modeled:
    """Model the Triton kernels."""
    try:
        return list(attention_cases.attention_rows(attention_cases.cached(cuobjdump()))), []
    except ModelError as error:
        return [], [f"{ATTENTION}: {error}"]


def model(stems: set[str], update: bool, jobs: int) -> bool:
    """Estimate the ops whose launchers were compiled, and compare them with the table; whether all is as it was."""
    every = list(cases.cases())
    numbers = [n for n, case in enumerate(every) if case.stems <= stems]
    whole = len(numbers) == len(every) and ATTENTION in stems
    with ProcessPoolExecutor(jobs) as pool:
        running = [pool.submit(model_attention)] if ATTENTION in stems else []
        running = [*(pool.submit(model_case, n) for n in numbers), *running]
        results = [future.result() for future in running]
    rows = [table.written(row) for part, _ in results for row in part]
    faults = [fault for _, part in results for fault in part]
    print(f"\nestimates for sm_{MODELED}, shares of a copy or of the tensor cores\n{table.show(rows)}")
    if faults:
        print("\nthe model does not fit the kernels:", *faults, sep="\n")
        return False
    old = table.read()
    if update:
        modeled = {table.case_of(row) for row in rows}
        kept = [] if whole else [row for row in old if table.case_of(row) not in modeled]
        places = {(case.op, case.shape): n for n, case in enumerate(every)}
        table.write(sorted(kept + rows, key=lambda row: places.get(table.case_of(row), len(every))))
        print(f"\n{table.TABLE.relative_to(ROOT)} is written")
        return True
    moved = table.differences(old, rows) + table.missing(old, rows, whole)
    if moved:
        print("\ntimes or instructions that moved by more than 10%:", *moved, sep="\n")
        print("If that is meant: make cuda-check ARCHS=90a UPDATE=1, and commit bench/results/model-sm90.csv")
    return not moved


def main() -> None:
    """Check the launchers that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "launchers", nargs="*", help=f"stems of files in csrc/cuda, {ATTENTION} for its estimates; all if none"
    )
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help=f"of {', '.join(ARCHS)}; all if none")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--update", action="store_true", help="write the estimates to bench/results/model-sm90.csv")
    arguments = parser.parse_args()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = [s for s in sources if not arguments.launchers or s.stem in arguments.launchers]
    if shutil.which("nvcc") is None:
        sys.exit("cuda-check: nvcc is missing; it is a part of the CUDA toolkit")
    failed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        by_size = sorted(sources, key=lambda source: -source.stat().st_size)  # the longest come first
        running = {(s, a): pool.submit(kernels_of, s, a) for s in by_size for a in arguments.archs}
        for source in sources:
            kernels = [kernel for a in arguments.archs for kernel in running[source, a].result()]
            print(f"\n{source.name}, registers and warps for sm_{', '.join(arguments.archs)}")
            print(f"{'kernel':84} threads  shared  {'registers':>15} {'warps':>15}")
            for name in sorted({k.name for k in kernels}):
                own = [k for k in kernels if k.name == name]
                registers = " ".join(f"{k.registers:4}" for k in own)
                warps = " ".join(f"{k.warps:4}" for k in own)
                faults = [f"sm_{k.arch}: {fault}" for k in own for fault in k.faults()]
                print(f"{name:84} {own[0].threads:7} {own[0].shared:7}  {registers:>15} {warps:>15}", *faults)
                failed += bool(faults)
    as_before = True
    if MODELED in arguments.archs:
        stems = {s.stem for s in sources} | set(arguments.launchers)
        if not arguments.launchers:
            stems |= {ATTENTION}
        if ATTENTION in stems and importlib.util.find_spec("triton") is None:
            print("\nno estimates of attention, whose kernels Triton compiles: pip install triton")
            stems -= {ATTENTION}
        as_before = model(stems, arguments.update, arguments.jobs)
    print(f"\n{failed} kernels failed" if failed else "\nno spills, no stack frames; 128-bit loads where they belong")
    sys.exit(failed > 0 or not as_before)


if __name__ == "__main__":
    main()
