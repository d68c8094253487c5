"""Backward computes again what would take much memory to keep, and rows are computed in blocks.

A stack of layers that would keep more than `KEPT_BYTES` keeps the inputs of its layers only: without gradients nothing
is kept, and nothing of this applies. Blocks bound what is held at a time, inside of one layer too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from blt_kernels import _checks
from blt_kernels._checks import Documents

# A stack may keep so much for backward, by the type of the device. On the CPU, fresh memory is slow too.
KEPT_BYTES = {"cpu": 1 << 30}
_KEPT_BYTES_ELSEWHERE = 8 << 30
BLOCK_ROWS = 8192  # a block of 512 floats a row is 16 MB


def recomputes(setting: bool | None, x: Tensor, floats: int) -> bool:
    """Return whether backward computes a layer again.

    Parameters
    ----------
    setting : bool, optional
        The answer, unless it is None: then the sizes decide.
    x : floating ``[T, D]``
    floats : int
        Floating-point numbers that the stack would keep for backward, in the dtype of `x`.

    Returns
    -------
    bool
        False where no gradients are computed.

    Examples
    --------
    >>> recomputes(None, torch.zeros(1), 1000), recomputes(None, torch.zeros(1), 1 << 30)
    (False, True)
    """
    if not torch.is_grad_enabled():
        return False
    if setting is not None:
        return setting
    if not is_compiling() and is_functorch_wrapped_tensor(x):  # torch.func knows no checkpoints
        return False
    return floats * x.element_size() > KEPT_BYTES.get(x.device.type, _KEPT_BYTES_ELSEWHERE)


def again(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)``, of which only the arguments are kept for backward. It draws no random numbers.

    Examples
    --------
    >>> again(torch.exp, torch.zeros(1, requires_grad=True)).item()
    1.0
    """
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def block_rows(window: int) -> int:
    """Return how many rows a block of a layer with this window has: so many that few are computed twice.

    Examples
    --------
    >>> block_rows(512), block_rows(2048)
    (8192, 16384)
    """
    return max(BLOCK_ROWS, 8 * window)


def fits_block(x: Tensor) -> bool:
    """Return whether rows are computed all at once: they are few, or the host cannot read them.

    Examples
    --------
    >>> fits_block(torch.zeros(10, 3)), fits_block(torch.zeros(10000, 3))
    (True, False)
    """
    return x.shape[0] <= BLOCK_ROWS or not _checks.readable(x)


def in_blocks(function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Return a function of rows, computed in blocks of rows.

    Parameters
    ----------
    function : callable
        Returns ``[n, ...]`` from n rows of each of the columns. It is called once if they are `fits_block`. With
        several blocks and gradients, backward calls it again.
    columns : ``[T, ...]``

    Returns
    -------
    ``[T, ...]``

    Examples
    --------
    >>> in_blocks(torch.add, torch.ones(3), torch.ones(3)).tolist()
    [2.0, 2.0, 2.0]
    """
    if fits_block(columns[0]):
        return function(*columns)
    blocks = zip(*(x.split(BLOCK_ROWS) for x in columns), strict=True)
    return joined((run_block(function, *block) for block in blocks), columns[0].shape[0])


def run_block(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return ``function(*arguments)``, as `again` does if there are gradients."""
    return again(function, *arguments) if torch.is_grad_enabled() else function(*arguments)


def joined(parts: Iterator[Tensor], rows: int) -> Tensor:
    """Return parts end to end, which have so many rows. Without gradients no more than one of them is held.

    Examples
    --------
    >>> joined(iter(torch.arange(5).split(2)), 5).tolist()
    [0, 1, 2, 3, 4]
    """
    if torch.is_grad_enabled():
        return torch.cat(list(parts))
    first = next(parts)
    out, end = first.new_empty(rows, *first.shape[1:]), 0
    for part in chain((first,), parts):
        out[end : end + len(part)] = part
        end += len(part)
    return out


def documents_within(documents: Tensor | Documents, first: int, stop: int) -> Tensor | Documents:
    """Return the documents of positions ``[first, stop)``, counted from `first`, on the CPU.

    Parameters
    ----------
    documents : int32 ``[B+1]``
    first, stop : int

    Returns
    -------
    As `documents`
        Those that have positions there, cut to them.

    Examples
    --------
    >>> documents_within(torch.tensor([0, 3, 5, 9]), 4, 7).tolist()
    [0, 1, 3]
    """
    offsets = documents.offsets if isinstance(documents, Documents) else documents
    ends = torch.tensor([first, stop], dtype=offsets.dtype)
    begin = int(torch.searchsorted(offsets, ends[:1], right=True)) - 1
    end = int(torch.searchsorted(offsets, ends[1:])) + 1
    own = offsets[max(begin, 0) : end].clamp(first, stop) - first
    return Documents(own, stop - first, int(own[-1])) if isinstance(documents, Documents) else own
