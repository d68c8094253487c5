"""Loading of the compiled module ``blt_kernels._C``: one shared object per instruction set, one of which is loaded.

The kernels register themselves with torch when the shared object is loaded; the module has no other content. Without it
every op runs its reference.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import torch

ISAS = ("v4", "v3", "v2", "plain")
_BY_CAPABILITY = {"AVX512": ("v4", "v3", "v2"), "AVX2": ("v3", "v2")}
_NAME = "blt_kernels._C"


@dataclass(frozen=True)
class Loaded:
    """What `load` did.

    Attributes
    ----------
    isa
        The loaded variant: "v2", "v3" or "v4" (x86-64 levels), or "plain"; None if there is none.
    path
        The file it was loaded from, or None.
    reason
        Why nothing was loaded, or None.
    available
        The variants that were built and that this machine can run, best first.
    """

    isa: str | None
    path: str | None
    reason: str | None
    available: tuple[str, ...]


def runnable() -> tuple[str, ...]:
    """Return the variants that this machine can run, built or not, best first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("plain",)
    return _BY_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), ("v2",))


@cache
def load() -> Loaded:
    """Load the best variant, or the one that the environment variable ``BLT_KERNELS_ISA`` names; once per process.

    Raises
    ------
    ImportError
        ``BLT_KERNELS_ISA`` is not one of v2, v3, v4, plain or none, or names a variant that was not built, that this
        machine cannot run or that does not load. Without it a missing module is no error, since references stand in.
    """
    available = tuple(isa for isa in runnable() if _path(isa).exists())
    asked = os.environ.get("BLT_KERNELS_ISA")
    if asked:
        return _load_asked(asked, available)
    if not available:
        reason = f"{_path(runnable()[-1])} was not built: `pip install .` in a checkout builds it"
        return Loaded(None, None, reason, available)
    try:
        return _load(available[0], available)
    except ImportError as error:
        warnings.warn(f"blt_kernels runs on its slow references: {error}", RuntimeWarning, stacklevel=2)
        return Loaded(None, None, str(error), available)


def loaded() -> Loaded:
    """Return what was loaded when the package was imported."""
    return load()


def _load_asked(isa: str, available: tuple[str, ...]) -> Loaded:
    if isa == "none":
        return Loaded(None, None, "BLT_KERNELS_ISA=none", available)
    if isa not in ISAS:
        raise ImportError(f"BLT_KERNELS_ISA: expected one of {', '.join((*ISAS, 'none'))}, got {isa!r}")
    if isa not in runnable():
        raise ImportError(f"BLT_KERNELS_ISA={isa}: this machine runs {', '.join((*runnable(), 'none'))}")
    if isa not in available:
        built = ", ".join((*available, "none"))
        raise ImportError(f"BLT_KERNELS_ISA={isa}: was not built, expected {_path(isa)}; what can be loaded: {built}")
    return _load(isa, available)


def _load(isa: str, available: tuple[str, ...]) -> Loaded:
    path = str(_path(isa))
    loader = ExtensionFileLoader(_NAME, path)
    try:
        module = module_from_spec(ModuleSpec(_NAME, loader, origin=path))
        loader.exec_module(module)
    except ImportError as error:
        raise ImportError(f"{path} does not load with torch {torch.__version__}: {error}") from error
    sys.modules[_NAME] = module
    return Loaded(isa, path, None, available)


def _path(isa: str) -> Path:
    return Path(__file__).parent / f"_C_{isa}.abi3.so"
