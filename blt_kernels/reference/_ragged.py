"""The references share these helpers for ragged data."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype that values of `x` are summed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operator_of(make: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that turns a function into an operator.

    In the place of the function's last argument, which `make` returns, the operator takes the arguments of `make`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        *own, _made = inspect.signature(function).parameters.values()

        @functools.wraps(function)
        def operator(*arguments: Any) -> Any:
            return function(*arguments[: len(own)], make(*arguments[len(own) :]))

        parameters = [*own, *inspect.signature(make).parameters.values()]
        operator.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return operator

    return decorate


def scale_of(q: Tensor, scale: float | None) -> float:
    """Return the factor of the scores of attention."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def local_index(num_bytes: int, cu_seqlens: Tensor) -> Tensor:
    """Return the position of each byte in its document, int64 ``[T]``; -1 beyond the last document."""
    position = torch.arange(num_bytes, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    local = position - cu_seqlens.long()[document]
    return local.where(document < cu_seqlens.shape[0] - 1, -1)


def document_offsets(x: Tensor, cu_seqlens: Tensor | None, num_documents: int) -> Tensor:
    """Return `cu_seqlens` if given, else the int32 offsets of `num_documents` documents of one length in packed `x`."""
    if cu_seqlens is not None:
        return cu_seqlens
    length = x.shape[0] // max(num_documents, 1)
    return torch.arange(num_documents + 1, dtype=torch.int32, device=x.device) * length
