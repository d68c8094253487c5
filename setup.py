"""Build the compiled module: a thin layer over CMakeLists.txt, the only description of the build."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def find_torch() -> Path | None:
    """Return the folder of an installed torch >= 2.11 that has its headers."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = importlib.metadata.version("torch").split(".")
    folder = Path(spec.origin).parent
    fits = (int(version[0]), int(version[1])) >= (2, 11) and (folder / "include/torch/csrc/stable/library.h").exists()
    return folder if fits else None


def semicolons(names: str) -> str:
    """Turn a list that is separated by spaces or commas into one of CMake."""
    return names.replace(" ", ";").replace(",", ";")


class CMakeBuild(build_ext):
    """Run CMake once for all variants of the module, and install them where setuptools wants the extension."""

    def run(self) -> None:
        """Configure, build and install, or say everything that is missing."""
        cmake, ninja, torch = shutil.which("cmake", path=PATH), shutil.which("ninja", path=PATH), find_torch()
        compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        compiler = any(shutil.which(name, path=PATH) for name in compilers)
        header = Path(sysconfig.get_path("include"), "Python.h")
        needs = [
            (compiler, "a C++20 compiler (GCC >= 11 or Clang >= 16)", "apt install g++ (or set CXX)"),
            (cmake, "CMake >= 3.22", "pip install cmake"),
            (ninja, "Ninja", "pip install ninja"),
            (torch, "torch >= 2.11 with its headers", "pip install 'torch>=2.11'"),
            (header.exists(), f"the headers of Python ({header})", "apt install python3-dev"),
        ]
        missing = [f"  - {what}. To get it: {how}" for found, what, how in needs if not found]
        if missing:
            raise SystemExit("\n".join(["blt_kernels: the compiled module cannot be built. Missing:", *missing]))

        build = ROOT / "build" / "cmake"
        package = Path(self.get_ext_fullpath("blt_kernels._C")).resolve().parent
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DBLT_KERNELS_TORCH_DIR={torch}"]
        # A wheel has every instruction set, and a checkout that is installed in place only that of this machine.
        isas = os.environ.get("BLT_KERNELS_ISAS") or ("native" if self.editable_mode else None)
        configure.append(f"-DBLT_KERNELS_ISAS={semicolons(isas)}" if isas else "-UBLT_KERNELS_ISAS")
        if archs := os.environ.get("BLT_KERNELS_CUDA_ARCHS"):
            configure.append(f"-DBLT_KERNELS_CUDA_ARCHS={semicolons(archs)}")
        for command in (configure, [cmake, "--build", build], [cmake, "--install", build, "--prefix", package]):
            if subprocess.run(command).returncode:
                raise SystemExit("blt_kernels: the build failed; the messages above say where")


setup(
    ext_modules=[Extension("blt_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
