"""The compiled kernels for a lent GPU: built ahead into a folder that is carried there, or else built there.

    python bench/gpu_stages/build.py        `make gpu-build`: build/gpu, for Hopper, on a machine that needs no GPU

The folder has `_C_cuda` for sm_90a, linked against a stub of torch's CUDA library, the CPU kernels, `_C_jit` with the
sources that NVRTC compiles, and `manifest.json` with a hash of what it was built from: a folder that was built from
other sources is not used. No setuptools and no pip take part, since those there may be too old.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
CARRIED, PACKAGE = ROOT / "build" / "gpu", ROOT / "blt_kernels"
ARCH, ISAS = "90a", ("v3", "v4")
MAX_BYTES = 40 << 20
# These are Ubuntu 22.04's newest symbol versions. An older C or C++ library cannot load newer symbols.
NEWEST_SYMBOLS = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}
SECONDS_TO_LOAD = 150  # the first import of torch reads gigabytes from a cold disk
LOADS = """
from blt_kernels import _extension
assert _extension.load_cpu().isa not in (None, "plain"), _extension.load_cpu()
assert _extension.load_cuda().compiler == "nvcc", _extension.load_cuda()
"""


def source_hash() -> str:
    """Return a hash of everything that the compiled modules are built from."""
    found = hashlib.sha256()
    for path in [ROOT / "CMakeLists.txt", *sorted(ROOT.glob("csrc/**/*"))]:
        if path.is_file():
            found.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


def build(folder: Path, build_folder: Path, isas: tuple[str, ...], seconds: float, log: IO[str] | None = None) -> None:
    """Configure, build and install into `folder`; RuntimeError with the step that fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise RuntimeError("cmake is not installed")
    configure = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(build_folder),
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    configure += [f"-DBLT_KERNELS_ISAS={';'.join(isas)}", "-DBLT_KERNELS_CUDA=ON", f"-DBLT_KERNELS_CUDA_ARCHS={ARCH}"]
    install = [cmake, "--install", str(build_folder), "--prefix", str(folder)]
    deadline = time.monotonic() + seconds
    for step in (configure, [cmake, "--build", str(build_folder)], install):
        left = max(1.0, deadline - time.monotonic())
        done = subprocess.run(step, env=os.environ | {"PATH": path}, stdout=log, stderr=log, timeout=left)
        if done.returncode:
            raise RuntimeError(f"{' '.join(step[1:3])} ended with {done.returncode}")


def newer_symbols(module: Path) -> list[str]:
    """Return the versioned symbols that a module needs of a C or C++ library newer than `NEWEST_SYMBOLS`."""
    table = subprocess.run(["objdump", "-T", str(module)], capture_output=True, text=True, check=True).stdout
    found = set()
    for library, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", table):
        if tuple(map(int, version.split("."))) > NEWEST_SYMBOLS[library]:
            found.add(f"{library}_{version}")
    return sorted(found)


def carry(folder: Path = CARRIED) -> str:
    """Build the folder; its size and the time it took, or SystemExit where it could not be used there."""
    began = time.monotonic()
    (folder / "manifest.json").unlink(missing_ok=True)
    build(folder, ROOT / "build" / "gpu-cmake", ISAS, 3600)
    for module in folder.glob("*.so"):
        if newer := newer_symbols(module):
            raise SystemExit(f"gpu-build: {module.name} needs {', '.join(newer)}, which older machines do not have")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise SystemExit(f"gpu-build: {folder} has {size >> 20} MB, of {MAX_BYTES >> 20} MB that may be carried")
    manifest = {"sources": source_hash(), "arch": ARCH, "isas": ISAS, "built_with": platform.platform()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return f"{folder}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s"


# --- on the machine with the GPU --------------------------------------------------------------------------------------


def provide_kernels(
    log: IO[str],
    seconds: float,
    *,
    carried: Path = CARRIED,
    package: Path = PACKAGE,
    loads: Callable[[IO[str]], None] | None = None,
    build_there: Callable[[float, IO[str]], None] | None = None,
) -> list[tuple[str, str]]:
    """Put compiled kernels into the package: those that were carried, or else those built here.

    Returns
    -------
    list
        (what was tried, "ok: ..." or why not), in order; nothing is raised, since references run without any.
    """
    loads, build_there = loads or check_that_they_load, build_there or build_here
    tried = []
    for name, provide in (
        ("carried folder", lambda: install(carried, package)),
        ("build here", lambda: build_there(seconds, log)),
    ):
        began = time.monotonic()
        try:
            provide()
            loads(log)
        except Exception as error:
            tried.append((name, f"{type(error).__name__}: {error}"))
            continue
        tried.append((name, f"ok: {time.monotonic() - began:.0f} s"))
        break
    return tried


def install(carried: Path, package: Path) -> None:
    """Copy the carried modules and headers into the package; RuntimeError if they are of other sources."""
    manifest = carried / "manifest.json"
    if not manifest.exists():
        raise RuntimeError(f"{carried} was not carried")
    if json.loads(manifest.read_text())["sources"] != source_hash():
        raise RuntimeError(f"{carried} was built from other sources: make gpu-build")
    for path in carried.glob("*.so"):
        shutil.copy2(path, package / path.name)
    shutil.copytree(carried / "include", package / "include", dirs_exist_ok=True)


def build_here(seconds: float, log: IO[str]) -> None:
    build(PACKAGE, ROOT / "build" / "gpu-here", ISAS[-1:], seconds, log)


def check_that_they_load(log: IO[str]) -> None:
    """Import the package in another process, since a module that does not load may end its process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "BLT_KERNELS_CUDA": "nvcc"}
    command = [sys.executable, "-c", LOADS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS_TO_LOAD)
    log.write(done.stdout + done.stderr)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(last[0])


if __name__ == "__main__":
    print(carry())
