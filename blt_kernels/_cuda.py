"""Loading of the CUDA kernels: ``_C_cuda``, which nvcc built, or else ``_C_jit``, whose kernels NVRTC compiles.

Both register the same operators. Where neither can be loaded, CUDA tensors take the references.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import torch

from blt_kernels import _jit

_CHOICES = ("nvcc", "nvrtc", "none")


@dataclass(frozen=True)
class LoadedCuda:
    """What `load` did.

    Attributes
    ----------
    compiler
        "nvcc" or "nvrtc", which compiles the kernels that are used; None if no module was loaded.
    path
        The file it was loaded from, or None.
    reason
        Why there are no CUDA kernels, or None.
    """

    compiler: str | None
    path: str | None
    reason: str | None


@cache
def load() -> LoadedCuda:
    """Load the kernels that nvcc built, or else those for NVRTC; once per process.

    The environment variable ``BLT_KERNELS_CUDA`` chooses: nvcc, nvrtc or none.

    Raises
    ------
    ImportError
        ``BLT_KERNELS_CUDA`` has another value, or names what cannot be loaded.
    """
    asked = os.environ.get("BLT_KERNELS_CUDA") or None
    if asked not in (None, *_CHOICES):
        raise ImportError(f"BLT_KERNELS_CUDA: expected one of {', '.join(_CHOICES)}, got {asked!r}")
    if asked == "none":
        return LoadedCuda(None, None, "BLT_KERNELS_CUDA=none")
    if torch.version.cuda is None:
        return _without("torch was built without CUDA", asked)
    built, launchers = path_of("_C_cuda"), path_of("_C_jit")
    if asked != "nvrtc" and built.exists():
        return _loaded("nvcc", built, asked)
    if asked == "nvcc":
        return _without(f"{built} was not built: `pip install .` in a checkout does, where nvcc is", asked)
    reason = _jit.missing() if launchers.exists() else f"{launchers} was not built"
    return _without(reason, asked) if reason else _loaded("nvrtc", launchers, asked)


def path_of(module: str) -> Path:
    """Return where a module is, if it was built."""
    return Path(__file__).parent / f"{module}.abi3.so"


def _loaded(compiler: str, path: Path, asked: str | None) -> LoadedCuda:
    name = f"blt_kernels.{path.name.split('.')[0]}"
    loader = ExtensionFileLoader(name, str(path))
    try:
        module = module_from_spec(ModuleSpec(name, loader, origin=str(path)))
        loader.exec_module(module)
    except ImportError as error:
        return _without(f"{path} does not load with torch {torch.__version__}: {error}", asked, warn=True)
    sys.modules[name] = module
    if compiler == "nvrtc":
        module.launchers = _jit.Launchers(str(path))  # type: ignore[attr-defined]
    return LoadedCuda(compiler, str(path), None)


def _without(reason: str, asked: str | None, *, warn: bool = False) -> LoadedCuda:
    if asked:
        raise ImportError(f"BLT_KERNELS_CUDA={asked}: {reason}")
    if warn:
        warnings.warn(f"blt_kernels runs on its slow references on CUDA: {reason}", RuntimeWarning, stacklevel=3)
    return LoadedCuda(None, None, reason)
