"""Computes rows, documents and positions of packed data, and rotary positions.

Data is packed: ``[T, ...]`` with ``cu_seqlens: int32[R+1]``, where the offsets delimit rows. Positions, patching and
hashing run along a row. A row is one document, or several that each end in EOS: see `attention_documents`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels.layout import AttentionRanges
from blt_kernels.nn.config import TransformerConfig

_FEW = 16  # up to this many positions read their rotations from a cached table
_MIN_KEPT, _MAX_KEPT = 1024, 2**15  # rows of such tables; 16 MB for heads of 128


def row_positions(cu_seqlens: Tensor | Documents, total: int) -> Tensor:
    """Return the index of each entry in its row.

    Parameters
    ----------
    cu_seqlens : int32 ``[R+1]``
    total : int
        T, the number of entries.

    Returns
    -------
    int64 ``[T]``
        Entries beyond the last row count from its end.

    Examples
    --------
    >>> row_positions(torch.tensor([0, 2, 5]), 5).tolist()
    [0, 1, 0, 1, 2]
    """
    rows, cu_seqlens = cu_seqlens, offsets_of(cu_seqlens)
    position = torch.arange(total, device=cu_seqlens.device)
    if isinstance(rows, Documents) and rows.full and cu_seqlens.shape[0] == 2:  # a single row
        return position
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return position - cu_seqlens.long()[row]


def offsets_of(documents: Tensor | Documents) -> Tensor:
    """Return the offsets of documents as a tensor."""
    return documents.offsets if isinstance(documents, Documents) else documents


def attention_documents(starts: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the offsets of the documents that attention stays within, from flags at their first entries.

    Parameters
    ----------
    starts : bool ``[T]``
        Rows need no flag: they always start a document.
    cu_seqlens : int32 ``[R+1]``

    Returns
    -------
    int32 ``[D+1]``
        Compact on the CPU. Elsewhere D = T, padded with the last value, since compacting would wait for the device.

    Examples
    --------
    >>> attention_documents(torch.tensor([False, False, True, False]), torch.tensor([0, 3, 4])).tolist()
    [0, 2, 3, 4]
    """
    total = starts.shape[0]
    position = torch.arange(total, device=starts.device)
    end = cu_seqlens[-1:].long()
    starts = (starts | (row_positions(cu_seqlens, total) == 0)) & (position < end)
    slot = torch.where(starts, starts.cumsum(0) - 1, total + 1)
    offsets = end.repeat(total + 2).scatter(0, slot, position)[: total + 1].int()
    if _checks.readable(starts):
        offsets = offsets[: int(starts.sum()) + 1]
    return offsets


def layer_ranges(
    ops: SimpleNamespace, x: Tensor, documents: Tensor | Documents, window: int | None,
    key_documents: Tensor | Documents | None = None, num_keys: int | None = None,
) -> AttentionRanges | None:  # fmt: skip
    """Return the ranges that the self-attention of all layers of a stack shares.

    Parameters
    ----------
    ops : namespace
        The functions of `load_ops`.
    x : ``[T, D]``
        The input of the stack.
    documents : int32 ``[B+1]``
        Documents of the queries.
    window : int or None
    key_documents : int32 ``[B+1]``, optional
        Documents of the keys; those of the queries if None.
    num_keys : int, optional
        T if None.

    Returns
    -------
    AttentionRanges or None
        None on the CPU, where the kernels do not read ranges.

    Examples
    --------
    >>> layer_ranges(load_ops("fused"), torch.zeros(4, 8), torch.tensor([0, 4]), window=None) is None
    True
    """
    if x.device.type == "cpu":
        return None
    offsets, key_offsets = offsets_of(documents), None if key_documents is None else offsets_of(key_documents)
    return ops.attention_ranges(offsets, key_offsets, num_queries=x.shape[0], num_keys=num_keys, window=window)


def rotary_table(positions: Tensor, config: TransformerConfig, dtype: torch.dtype) -> Tensor:
    """Return the rotations ``exp(i position theta^(-2j/E))``.

    Parameters
    ----------
    positions : integer ``[T]``
    config : TransformerConfig
        Gives E, theta and the scaling of the frequencies.
    dtype : torch.dtype
        That of the model.

    Returns
    -------
    complex64 (complex128 for fp64) ``[T, 1, E/2]``

    Examples
    --------
    >>> config = TransformerConfig(dim=8, num_layers=1, num_heads=2)
    >>> rotary_table(torch.arange(3), config, torch.float32).shape
    torch.Size([3, 1, 2])
    """
    dtype = dtype if dtype == torch.float64 else torch.float32
    frequencies = config.rotations
    if not _checks.readable(positions):
        return _rotations(positions, _periods(*frequencies, dtype, positions.device), dtype)
    values = positions.tolist() if positions.numel() <= _FEW else ()
    if values and min(values) >= 0 and max(values) < _MAX_KEPT:
        size = max(_MIN_KEPT, 1 << max(values).bit_length())
        return _kept_rotations(*frequencies, dtype, size).index_select(0, positions)
    return _rotations(positions, _cpu_periods(*frequencies, dtype), dtype)


def _rotations(positions: Tensor, periods: Tensor, dtype: torch.dtype) -> Tensor:
    angle = positions.to(dtype).view(-1, 1, 1) / periods
    return torch.polar(torch.ones_like(angle), angle)


@lru_cache(maxsize=64)
def _kept_rotations(
    head_dim: int, theta: float, scaling: tuple[float, float, float, float] | None, dtype: torch.dtype, size: int
) -> Tensor:
    """Return the rotations of positions 0 to ``size - 1`` on the CPU, computed once a process."""
    with torch.inference_mode(False):  # an inference tensor could not be saved for backward
        return _rotations(torch.arange(size, device="cpu"), _cpu_periods(head_dim, theta, scaling, dtype), dtype)


def _periods(
    head_dim: int,
    theta: float,
    scaling: tuple[float, float, float, float] | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Return how many positions are in a radian of each pair, ``[E/2]``."""
    period = float(theta) ** (torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
    if scaling is None:
        return period
    factor, low, high, length = map(float, scaling)
    kept = ((length / (2 * math.pi * period) - low) / (high - low)).clamp(0, 1)  # share that is not divided by factor
    return period / (kept + (1 - kept) / factor)


@lru_cache(maxsize=64)
def _cpu_periods(
    head_dim: int, theta: float, scaling: tuple[float, float, float, float] | None, dtype: torch.dtype
) -> Tensor:
    """Return `_periods` on the CPU, computed once a process."""
    with torch.inference_mode(False):  # an inference tensor could not be saved for backward
        return _periods(head_dim, theta, scaling, dtype, "cpu")


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs ``(x[2j], x[2j+1])`` of each head, taken as complex numbers.

    Parameters
    ----------
    x : floating ``[T, H, E]``
    table : complex ``[T, 1, E/2]``
        Of `rotary_table`.

    Returns
    -------
    dtype of `x` ``[T, H, E]``

    Examples
    --------
    >>> rotate(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1j]]])).tolist()  # a quarter turn
    [[[-2.0, 1.0]]]
    """
    dtype = torch.float64 if table.dtype == torch.complex128 else torch.float32
    pairs = (x if x.dtype == dtype else x.to(dtype)).view(*x.shape[:-1], x.shape[-1] // 2, 2)
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2)
    return rotated if x.dtype == dtype else rotated.to(x.dtype)
