"""Kernels are compiled before a CUDA graph is captured, never while one is: that would end the capture in an error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from blt_kernels._namespace import NAMESPACE


def refuse_in_captures() -> None:
    """Let the kernels of this folder raise RuntimeError where Triton would compile them inside of a capture."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{NAMESPACE}.triton.")]
    for kernel in {value for module in modules for value in vars(module).values() if isinstance(value, _Compiled)}:
        if "_do_compile" not in vars(kernel):
            kernel._do_compile = _checked(kernel.__name__, kernel._do_compile)


_Compiled: Any = triton.runtime.jit.JITFunction


def _checked(name: str, compile_kernel: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any, **options: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name} is not compiled for these arguments yet, and a CUDA graph is being captured: run the same call"
                " once before the capture"
            )
        return compile_kernel(*arguments, **options)

    return checked
