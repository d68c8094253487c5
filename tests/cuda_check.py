"""``make cuda-check``: compile every CUDA kernel for every GPU architecture, without a GPU, and look at the result.

For each kernel it prints registers, static shared memory and the warps that may be on a multiprocessor at a time. It
fails on a spill, a stack frame, or a kernel for 16-byte accesses (a pack of 16 bytes in its name) with no 128-bit load.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90a", "100")
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor
SIZES = {"float": 4, "double": 8, "__nv_bfloat16": 2, "__half": 2}


@dataclass
class Kernel:
    """What ptxas says of a kernel, and what its launch bounds and its code are."""

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
        """Warps on a multiprocessor, as far as registers, static shared memory aside, allow."""
        warps = -(-self.threads // 32)
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32) // warps
        return min(by_registers, WARPS // warps, BLOCKS) * warps

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes of spills")
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        if self.moves_whole_vectors() and not self.wide_loads:
            found.append("no 128-bit load")
        return found

    def moves_whole_vectors(self) -> bool:
        """Is it for rows of 16-byte vectors? A pack of 16 bytes in the name says so; those of entropies always are."""
        pack = re.search(r"<(?:blt::Split<)?(\w+), (?:int, |long long, )?(\d+)", self.name)
        packed = pack is not None and SIZES.get(pack[1], 0) * int(pack[2]) == 16
        return packed or self.name.startswith(("token_entropy", "entropy_patch"))


def torch_headers() -> Path:
    """The headers of the installed torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("cuda-check: torch is not installed")
    return Path(spec.origin).parent / "include"


def cuobjdump() -> str:
    """The disassembler: of the toolkit, or of Triton's package."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None or not Path(found).exists():
        sys.exit("cuda-check: cuobjdump is missing: pip install triton, which has it, or a CUDA toolkit")
    return found


def compile_launcher(source: Path, arch: str, folder: Path) -> str:
    """Compile a .cu for a GPU architecture into `folder`, and return what ptxas says."""
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
    return done.stdout + done.stderr


def demangle(symbols: list[str]) -> list[str]:
    """Names in C++, without parameters."""
    text = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout
    return [line.removeprefix("void ").removeprefix("blt::") for line in text.splitlines()]


def threads_of(ptx: str) -> dict[str, int]:
    """Symbol -> threads of a block, by the launch bounds."""
    entries = re.findall(r"\.entry (\w+)\((?:[^)]*)\)\s*(?:\.maxntid (\d+))?", ptx)
    return {symbol: int(threads or 1024) for symbol, threads in entries}


def wide_loads_of(cubin: Path) -> set[str]:
    """The symbols whose code has a 128-bit load from global memory."""
    sass = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", sass)[1:]
    return {
        name for name, code in zip(parts[::2], parts[1::2], strict=True) if re.search(r"\bLDG\.E(\.\w+)*\.128", code)
    }


def kernels_of(source: Path, arch: str) -> list[Kernel]:
    """Compile a .cu for a GPU architecture and describe its kernels."""
    folder = ROOT / "build" / "cuda-check" / f"{source.stem}-{arch}"
    log = compile_launcher(source, arch, folder)
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        re.sub(r"\n(?!ptxas info +: Compiling)", " ", log),
    )
    names = demangle([f[0] for f in found])
    (ptx,), (cubin,) = folder.glob(f"{source.stem}*.ptx"), folder.glob(f"{source.stem}*.cubin")
    threads, wide = threads_of(ptx.read_text()), wide_loads_of(cubin)
    return [
        Kernel(
            *(name, arch, int(registers), int(shared or 0), int(stack), int(stores) + int(loads)),
            *(threads[symbol], symbol in wide),
        )
        for name, (symbol, stack, stores, loads, registers, shared) in zip(names, found, strict=True)
    ]


def main() -> None:
    """Check the launchers that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("launchers", nargs="*", help="stems of files in csrc/cuda; all if none")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help=f"of {', '.join(ARCHS)}; all if none")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = [s for s in sources if not arguments.launchers or s.stem in arguments.launchers]
    if shutil.which("nvcc") is None:
        sys.exit("cuda-check: nvcc is missing; it is a part of the CUDA toolkit")
    failed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        by_size = sorted(sources, key=lambda source: -source.stat().st_size)  # those that take long first
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
    print(f"\n{failed} kernels failed" if failed else "\nno spills, no stack frames; 128-bit loads where they belong")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
