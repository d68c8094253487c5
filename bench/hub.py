"""Builds the kernel of the Hugging Face hub, which the package `kernels` loads: ``make hub``.

    python bench/hub.py [--cuda] [--isas v4] [--out build/hub]

A kernel is a folder ``build/<variant>`` with `metadata.json` and the package: the public names of blt_kernels and all
that they import. It runs wherever it lies and imports nothing else but torch, and Triton on CUDA. Packages that differ
can be loaded into one process, an installed blt_kernels too, since each has a name and a namespace of operators of its
own. The name follows from the version and the compiled sources: raise the version where only Python changes.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_stages.build import source_hash

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "blt_kernels"
TORCH = "torch-stable-abi211"  # as TORCH_TARGET_VERSION in CMakeLists.txt


def modules() -> set[Path]:
    """Return the files of the package that its public names need."""
    found, left = set(), [PACKAGE / "__init__.py"]
    while left:
        path = left.pop()
        if path in found or not path.exists():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or str(node.module).split(".")[0] != PACKAGE.name:
                continue
            folder = ROOT.joinpath(*str(node.module).split("."))
            names = [folder, *(folder / alias.name for alias in node.names)]
            left += [name.with_suffix(".py") for name in names]
            left += [parent / "__init__.py" for name in names for parent in (name, *name.parents) if parent > ROOT]
    return found


def variant_of(cuda: bool) -> tuple[str, str]:
    """Return the backend, "cpu" or "cu130" by the version of nvcc, and the name of the variant."""
    backend = "cpu"
    if cuda:
        printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        backend = "cu" + "".join(re.search(r"release (\d+)\.(\d+)", printed).groups())  # type: ignore[union-attr]
    return backend, f"{TORCH}-{backend}-{platform.machine().lower()}-{platform.system().lower()}"


def build(out: Path, isas: str | None, cuda: bool) -> Path:
    """Build a variant below `out`, for every instruction set if `isas` is None, and return its folder."""
    backend, variant = variant_of(cuda)
    version = re.search(r'__version__ = "(.*)"', (PACKAGE / "_version.py").read_text())[1]  # type: ignore[index]
    name = f"_blt_kernels_{backend}_{re.sub(r'[^0-9a-z]', '_', version)}_{source_hash()[:8]}"
    folder, cmake = out / "build" / variant, ROOT / "build" / f"hub-cmake-{backend}"
    shutil.rmtree(folder, ignore_errors=True)
    configure = ["cmake", "-S", ROOT, "-B", cmake, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DBLT_KERNELS_NAMESPACE={name}", f"-DBLT_KERNELS_CUDA={'ON' if cuda else 'OFF'}"]
    configure.append("-UBLT_KERNELS_ISAS" if isas is None else f"-DBLT_KERNELS_ISAS={isas.replace(',', ';')}")
    configure.append("-DCUDA_HEADERS=OFF")  # leaves out _C_jit, which needs CuPy
    for command in (configure, ["cmake", "--build", cmake], ["cmake", "--install", cmake, "--prefix", folder]):
        subprocess.run(command, check=True, stdout=sys.stderr)
    shutil.rmtree(folder / "include")  # is for _C_jit
    for path in modules():
        copy = folder / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(re.sub(r"^(\s*(?:from|import) )blt_kernels\b", rf"\g<1>{name}", path.read_text(), flags=re.M))
    metadata = {"id": name, "name": "blt-kernels", "version": 1, "license": "BSD-3-Clause", "python-depends": []}
    metadata["backend"] = {"type": "cuda" if cuda else "cpu"}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--cuda", action="store_true", help="build the variant for CUDA, which needs nvcc and minutes")
    parser.add_argument("--isas", help="instruction sets, such as v3,v4, or native; all if not given")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub")
    options = parser.parse_args()
    print(build(options.out.resolve(), options.isas, options.cuda))
