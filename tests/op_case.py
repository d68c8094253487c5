"""`OpCase`: what `test_ops.py` needs to run all shared checks on an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import inputs
import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = (torch.int64,)
CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
WIDE = 149  # so many columns are several vectors of every instruction set, in pairs and single, and a remainder


@dataclass(frozen=True)
class OpCase:
    """Describes one op with one setting of its options.

    Attributes
    ----------
    function, reference : called with what `make` returns
    label : what is special about the case
    make : (dtype, num_bytes, seed) -> keyword arguments that both take, on the CPU; any `num_bytes` from 0
    differentiable : names of the arguments with gradients
    dtypes : dtypes to test; of ids where there are no floating arguments
    autocast : whether autocast casts the floating arguments
    sparse : whether gradients are sparse; gradcheck and tracing take dense ones only
    trace : whether opcheck and torch.compile run the case; one of a function's cases is enough unless options differ
    fast : whether the fast tier runs the case on the emulator, too; the CPU kernels always run
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    label: str
    make: inputs.Make
    differentiable: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    autocast: bool = False
    sparse: bool = False
    trace: bool = True
    fast: bool = True

    @property
    def op(self) -> str:
        """Return the op of the function: ``ops/<op>.py`` defines it."""
        return self.function.__module__.rpartition(".")[2]

    @property
    def has_documents(self) -> bool:
        """Return whether the function works within documents, which a layout or offsets give."""
        return not {"layout", "cu_seqlens", "cu_seqlens_q"}.isdisjoint(signature(self.function).parameters)

    @property
    def emulated(self) -> bool:
        """Return whether the kernels for CUDA are in CUDA C++, which the emulator runs."""
        return (CUDA / f"{self.op}.cu").exists()

    @property
    def name(self) -> str:
        return self.function.__name__ + (f"[{self.label}]" if self.label else "")
