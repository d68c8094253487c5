"""The references share these helpers for ragged data."""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from blt_kernels.layout import PatchLayout


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype that values of `x` are summed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rounded(x: float, like: Tensor) -> Tensor:
    """Return `x` in the dtype of `like`; infinite beyond the range of fp32 and fp16, where `torch.full` would raise."""
    value = x if like.dtype == torch.float64 else ctypes.c_float(x).value
    return torch.full((), value, dtype=accumulator(like), device=like.device).to(like.dtype)


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


def takes_padded_heads(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the forward of attention, which takes packed heads, take ``[B, S, H, E]`` too: they are packed by a copy."""

    @functools.wraps(forward)
    def padded(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(*map(_packed_heads, (q, k, v)), *arguments)
        return out.view(q.shape), lse.view(q.shape[:-1])

    return padded


def backward_takes_padded_heads(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Do the same for the backward."""

    @functools.wraps(backward)
    def padded(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        lse = lse.flatten(0, 1) if q.dim() == 4 else lse
        grads = backward(*map(_packed_heads, (grad_out, q, k, v, out)), lse, *arguments)
        return tuple(ordered_like(x, grad.view(x.shape)) for x, grad in zip((q, k, v), grads, strict=True))

    return padded


def _packed_heads(x: Tensor) -> Tensor:
    return x.flatten(0, 1) if x.dim() == 4 else x


def ordered_like(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the contiguous gradient of `x`, or one whose heads are outside of the sequence if those of `x` are."""
    if x.dim() == 4 and x.stride(2) > x.stride(1):
        return gradient.transpose(1, 2).contiguous().transpose(1, 2)
    return gradient


def scale_of(q: Tensor, scale: float | None) -> float:
    """Return the factor of the scores of attention."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def document_of(num_bytes: int, cu_seqlens: Tensor) -> Tensor:
    """Return the document of each byte, int64 ``[T]``; B beyond the last document."""
    position = torch.arange(num_bytes, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


def local_index(num_bytes: int, cu_seqlens: Tensor) -> Tensor:
    """Return the position of each byte in its document, int64 ``[T]``; -1 beyond the last document."""
    position = torch.arange(num_bytes, device=cu_seqlens.device)
    document = document_of(num_bytes, cu_seqlens)
    local = position - cu_seqlens.long()[document]
    return local.where(document < cu_seqlens.shape[0] - 1, -1)


def document_offsets(x: Tensor, cu_seqlens: Tensor | None, num_documents: int) -> Tensor:
    """Return `cu_seqlens` if given, else the int32 offsets of `num_documents` documents of one length in packed `x`."""
    if cu_seqlens is not None:
        return cu_seqlens
    length = x.shape[0] // max(num_documents, 1)
    return torch.arange(num_documents + 1, dtype=torch.int32, device=x.device) * length


def scheme_operator(scheme: Callable[..., PatchLayout]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the operator of a scheme: its arguments, with `num_documents` behind the offsets."""
    x, offsets, *rest = inspect.signature(scheme).parameters.values()

    @functools.wraps(scheme)
    def operator(x: Tensor, cu_seqlens: Tensor | None, num_documents: int, *arguments: Any) -> tuple[Tensor, ...]:
        return layout_tensors(scheme(x, document_offsets(x, cu_seqlens, num_documents), *arguments), cu_seqlens)

    names = [x, offsets, offsets.replace(name="num_documents"), *rest]
    operator.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    return operator


def layout_tensors(layout: PatchLayout, given: Tensor | None) -> tuple[Tensor, ...]:
    """Return the outputs of an operator that builds `layout`; `given` are the offsets that it was called with."""
    made = layout.cu_seqlens if given is None else layout.cu_seqlens.new_empty(0)
    return (*(getattr(layout, field.name) for field in fields(layout) if field.name != "cu_seqlens"), made)
