"""The compiled modules: where they are, which of them are loaded, and who computes each operator.

``_C`` has the CPU kernels: one shared object per instruction set, one of which is loaded. ``_C_cuda`` has the CUDA
kernels that nvcc built. Where it is missing, ``_C_jit`` registers the same operators, and NVRTC compiles their kernels.
The kernels register themselves with torch when a module is loaded. The modules also have the types that their kernels
take, which are compared with the schemas. An operator without a kernel runs its reference.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

import torch

from blt_kernels import _nvrtc
from blt_kernels._namespace import NAMESPACE

# Operator -> op: `ops/<op>.py` defines the operator. And operator -> schema. `ops._common.define` adds to both tables.
OPERATORS: dict[str, str] = {}
SCHEMAS: dict[str, str] = {}

ISAS = ("v4", "v3", "v2", "plain")
_BY_CAPABILITY = {"AVX512": ("v4", "v3", "v2"), "AVX2": ("v3", "v2")}
_COMPILERS = ("nvcc", "nvrtc", "none")


class StaleModuleError(ImportError):
    """Says that a module was built for other operators. Nothing can stand in for its kernels, which are registered."""


@dataclass(frozen=True)
class Loaded:
    """Says what `load_cpu` loaded.

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


@dataclass(frozen=True)
class LoadedCuda:
    """Says what `load_cuda` loaded.

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


def path_of(module: str) -> Path:
    """Return where a module is, if it was built: "_C_v4", "_C_cuda" or "_C_jit"."""
    return Path(__file__).parent / f"{module}.abi3.so"


def _cpu_path(isa: str) -> Path:
    return path_of(f"_C_{isa}")


@cache
def load_cpu() -> Loaded:
    """Load the best variant, or the one that the environment variable ``BLT_KERNELS_ISA`` names; once per process.

    Raises
    ------
    ImportError
        ``BLT_KERNELS_ISA`` is not one of v2, v3, v4, plain or none, or names a variant that was not built, that this
        machine cannot run or that does not load. Without it a missing module is no error, since references stand in.
        Or the module was built for other operators than those of this package.
    """
    available = tuple(isa for isa in runnable() if _cpu_path(isa).exists())
    asked = os.environ.get("BLT_KERNELS_ISA")
    if asked:
        return _load_asked(asked, available)
    if not available:
        reason = f"{_cpu_path(runnable()[-1])} was not built: `pip install .` in a checkout builds it"
        return Loaded(None, None, reason, available)
    try:
        return _load(available[0], available)
    except StaleModuleError:
        raise
    except ImportError as error:
        warnings.warn(f"blt_kernels runs on its slow references: {error}", RuntimeWarning, stacklevel=2)
        return Loaded(None, None, str(error), available)


def _load_asked(isa: str, available: tuple[str, ...]) -> Loaded:
    if isa == "none":
        return Loaded(None, None, "BLT_KERNELS_ISA=none", available)
    if isa not in ISAS:
        raise ImportError(f"BLT_KERNELS_ISA: expected one of {', '.join((*ISAS, 'none'))}, got {isa!r}")
    if isa not in runnable():
        raise ImportError(f"BLT_KERNELS_ISA={isa}: this machine runs {', '.join((*runnable(), 'none'))}")
    if isa not in available:
        built = ", ".join((*available, "none"))
        raise ImportError(
            f"BLT_KERNELS_ISA={isa}: was not built, expected {_cpu_path(isa)}; what can be loaded: {built}"
        )
    return _load(isa, available)


def _load(isa: str, available: tuple[str, ...]) -> Loaded:
    path = _cpu_path(isa)
    _import("_C", path)
    return Loaded(isa, str(path), None, available)


@cache
def load_cuda() -> LoadedCuda:
    """Load the kernels that nvcc built, or else those for NVRTC; once per process.

    The environment variable ``BLT_KERNELS_CUDA`` chooses: nvcc, nvrtc or none.

    Raises
    ------
    ImportError
        ``BLT_KERNELS_CUDA`` has another value, or names what cannot be loaded. Or the module was built for other
        operators than those of this package.
    """
    asked = os.environ.get("BLT_KERNELS_CUDA") or None
    if asked not in (None, *_COMPILERS):
        raise ImportError(f"BLT_KERNELS_CUDA: expected one of {', '.join(_COMPILERS)}, got {asked!r}")
    if asked == "none":
        return LoadedCuda(None, None, "BLT_KERNELS_CUDA=none")
    if torch.version.cuda is None:
        return _without("torch was built without CUDA", asked)
    built, launchers = path_of("_C_cuda"), path_of("_C_jit")
    if asked != "nvrtc" and built.exists():
        return _loaded("nvcc", built, asked)
    if asked == "nvcc":
        return _without(f"{built} was not built: `pip install .` in a checkout does, where nvcc is", asked)
    reason = _nvrtc.missing() if launchers.exists() else f"{launchers} was not built"
    return _without(reason, asked) if reason else _loaded("nvrtc", launchers, asked)


def _loaded(compiler: str, path: Path, asked: str | None) -> LoadedCuda:
    try:
        module = _import(path.name.split(".")[0], path)
    except StaleModuleError:
        raise
    except ImportError as error:
        return _without(str(error), asked, warn=True)
    if compiler == "nvrtc":
        module.launchers = _nvrtc.Launchers(str(path))  # type: ignore[attr-defined]
    return LoadedCuda(compiler, str(path), None)


def _without(reason: str, asked: str | None, *, warn: bool = False) -> LoadedCuda:
    if asked:
        raise ImportError(f"BLT_KERNELS_CUDA={asked}: {reason}")
    if warn:
        warnings.warn(f"blt_kernels runs on its slow references on CUDA: {reason}", RuntimeWarning, stacklevel=3)
    return LoadedCuda(None, None, reason)


def owner(operator: str, device: str) -> str:
    """Return who computes ``blt_kernels::operator`` on "CPU" or "CUDA": "C++ (v4)", "CUDA (nvcc)", "Triton".

    It returns "reference" where no kernel is registered.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", device):
        return "reference"
    if device == "CPU":
        return f"C++ ({load_cpu().isa})"
    return "Triton" if is_triton(OPERATORS[operator]) else f"CUDA ({load_cuda().compiler})"


def is_triton(op: str) -> bool:
    """Return whether an op's kernels for CUDA are in ``triton/``, and not in a compiled module."""
    return find_spec(f"{NAMESPACE}.triton.{op}") is not None


def _import(name: str, path: Path) -> ModuleType:
    """Load a module from a file, under a name of this package."""
    full = f"{NAMESPACE}.{name}"
    loader = ExtensionFileLoader(full, str(path))
    try:
        module = module_from_spec(ModuleSpec(full, loader, origin=str(path)))
        loader.exec_module(module)
    except ImportError as error:
        raise ImportError(f"{path} does not load with torch {torch.__version__}: {error}") from error
    _check_signatures(path, getattr(module, "signatures", ""))
    sys.modules[full] = module
    return module


def _check_signatures(path: Path, signatures: str) -> None:
    """Raise unless the kernels of a module take and return what the schemas of their operators say.

    `signatures` has a line "&<operator>_<device>: <types> -> <types>" for each kernel.
    """
    for line in signatures.splitlines():
        kernel, types = line.split(": ")
        operator = kernel.removeprefix("&").rpartition("_")[0]
        if types != (expected := _types(SCHEMAS.get(operator, ""))):
            raise StaleModuleError(
                f"{path} was built for other operators than those of this package: {operator} is ({types}) there, "
                f"{f'({expected})' if expected else 'and no file of ops that is imported defines it'} here; "
                "`make demo` in the checkout or "
                "`pip install --force-reinstall` builds it anew"
            )


def _types(schema: str) -> str:
    """Return the types of a schema, such as "Tensor int? -> Tensor Tensor"."""
    plain = re.sub(r"\([a-z]!\)", "", schema).replace("SymInt", "int")
    sides = [
        [argument.split()[0] for argument in side.strip("()").split(",") if argument] for side in plain.split(" -> ")
    ]
    return " -> ".join(map(" ".join, sides))
