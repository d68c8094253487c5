"""Build the wheel blt-kernels-cu13, which holds ``blt_kernels/_C_cuda.abi3.so`` and nothing else."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parents[2]
shutil.copy(ROOT / "LICENSE", Path(__file__).parent)  # setuptools takes no file from above
VERSION = re.search(r'^__version__ = "(.*)"$', (ROOT / "blt_kernels/_version.py").read_text(), re.MULTILINE)[1]


class CudaBuild(build_ext):
    """Run CMake for the module of nvcc alone."""

    def run(self) -> None:
        """Configure, build, and put the module where setuptools wants the extension."""
        build = ROOT / "build" / "cuda-wheel"
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += ["-DBLT_KERNELS_CUDA=ON", "-DCUDA_HEADERS=OFF"]  # without _C_jit
        if archs := os.environ.get("BLT_KERNELS_CUDA_ARCHS"):
            configure.append(f"-DBLT_KERNELS_CUDA_ARCHS={archs.replace(' ', ';').replace(',', ';')}")
        for command in (configure, ["cmake", "--build", build, "--target", "_C_cuda"]):
            if subprocess.run(command).returncode:
                raise SystemExit("blt-kernels-cu13: the build failed; the messages above say where")
        module = Path(self.get_ext_fullpath("blt_kernels._C_cuda")).resolve().parent / "_C_cuda.abi3.so"
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / module.name, module)


setup(
    version=VERSION,
    install_requires=[f"blt-kernels=={VERSION}"],
    packages=[],
    ext_modules=[Extension("blt_kernels._C_cuda", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CudaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
