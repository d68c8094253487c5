"""One of these runs an operator in tests: the reference, the CPU kernels, the CUDA kernels on the emulator, or a GPU.

`use` puts the reference or the emulated kernels in the place of the CPU kernels, so that a test runs on any of them
unchanged.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import blt_kernels  # noqa: F401  (defines the operators)

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = Path(os.environ.get("BLT_KERNELS_EMULATOR", ROOT / "build" / "emulator" / "blt_emulator.so"))
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BACKENDS = os.environ.get("BLT_KERNELS_BACKENDS", "").split() or [*DEVICES, "reference", "emulated"]


def operators() -> list[str]:
    """Return every operator of the package, without the namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("blt_kernels::") for n in names if n.startswith("blt_kernels::"))


@cache
def emulator() -> ModuleType:
    """Return the emulator, whose operators are ``blt_emulated::<name>``, or skip if the run's backends leave it out."""
    if "emulated" not in BACKENDS:
        pytest.skip("runs on the emulator")
    for name in operators():
        schema = str(getattr(torch.ops.blt_kernels, name).default._schema)
        torch.library.define(f"blt_emulated::{name}", schema[schema.index("(") :])
    spec = importlib.util.spec_from_file_location("blt_emulator", EMULATOR)
    if spec is None or spec.loader is None or not EMULATOR.exists():
        raise RuntimeError(f"{EMULATOR} was not built: `make test` builds it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated() -> list[str]:
    """Return the operators that have CUDA kernels."""
    emulator()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [n for n in operators() if has(f"blt_emulated::{n}", "CPU")]


@contextmanager
def order(name: str, seed: int = 0) -> Iterator[None]:
    """Run emulated blocks and threads in this order: "FORWARD", "BACKWARD" or "RANDOM"."""
    orders = emulator().Order
    emulator().set_order(getattr(orders, name), seed)
    try:
        yield
    finally:
        emulator().set_order(orders.FORWARD)


def launches(function: Callable[[], Any]) -> list[Any]:
    """Return the record of each emulated kernel that `function` launches."""
    with use("emulated"):
        emulator().take_launches()
        function()
        return emulator().take_launches()


def traffic(function: Callable[[], Any]) -> int:
    """Return bytes that the emulated kernels of `function` read and wrote, in whole sectors of 32."""
    return sum(launch.read + launch.written for launch in launches(function))


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run the operators on `backend` while this is open."""
    if backend in DEVICES:
        yield
        return
    library = torch.library.Library("blt_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about each kernel that is replaced
        for name, kernel in _kernels(backend).items():
            library.impl(name, kernel, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _kernels(backend: str) -> dict[str, Callable[..., Any]]:
    if backend == "emulated":
        return {name: getattr(torch.ops.blt_emulated, name).default for name in emulated()}
    key = torch._C.DispatchKey.CompositeExplicitAutograd  # references are registered for it
    return {name: partial(getattr(torch.ops.blt_kernels, name).default._op_dk, key) for name in operators()}
