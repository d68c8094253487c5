"""Rows and documents of packed data, positions in them, rotary positions.

Data is packed: ``[T, ...]`` with ``cu_seqlens: int32[R+1]``, where the offsets delimit rows. Positions, patching and
hashing run along a row. A row is one document, or several that each end in EOS: see `attention_documents`.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from blt_kernels.layout import AttentionRanges
from blt_kernels.nn.config import TransformerConfig
from blt_kernels.ops import _common


def row_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Index of each entry in its row, int64 ``[total]``; entries beyond the last row count on from its end."""
    position = torch.arange(total, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return position - cu_seqlens.long()[row]


def attention_documents(starts: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Offsets of the documents that attention stays within, from flags at their first entries.

    Parameters
    ----------
    starts : bool ``[T]``
        Rows need no flag: they always start a document.
    cu_seqlens : int32 ``[R+1]``

    Returns
    -------
    int32 ``[D+1]``
        Compact on the CPU. Elsewhere D = T, padded with the last value, since compacting would wait for the device.
    """
    total = starts.shape[0]
    position = torch.arange(total, device=starts.device)
    end = cu_seqlens[-1:].long()
    starts = (starts | (row_positions(cu_seqlens, total) == 0)) & (position < end)
    slot = torch.where(starts, starts.cumsum(0) - 1, total + 1)
    offsets = end.repeat(total + 2).scatter(0, slot, position)[: total + 1].int()
    if _common.readable(starts):
        offsets = offsets[: int(starts.sum()) + 1]
    return offsets


def layer_ranges(
    ops: SimpleNamespace, x: Tensor, documents: Tensor, window: int | None, key_documents: Tensor | None = None,
    num_keys: int | None = None,
) -> AttentionRanges | None:  # fmt: skip
    """Return what the self-attention of all layers of a stack shares, from its input ``[T, D]``; None on the CPU.

    There the kernels do not read it.
    """
    if x.device.type == "cpu":
        return None
    return ops.attention_ranges(documents, key_documents, num_queries=x.shape[0], num_keys=num_keys, window=window)


def rotary_table(positions: Tensor, config: TransformerConfig, dtype: torch.dtype) -> Tensor:
    """Complex ``exp(i position theta^(-2j/E))``, ``[T, 1, E/2]``: of fp64 for fp64 models, else of fp32."""
    dtype = dtype if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype) / config.head_dim
    period = config.rope_theta**exponent  # positions in a radian
    if config.rope_scaling is not None:
        factor, low, high, length = config.rope_scaling
        kept = ((length / (2 * math.pi * period) - low) / (high - low)).clamp(0, 1)  # of the frequency
        period = period / (kept + (1 - kept) / factor)
    angle = positions.to(dtype)[:, None, None] / period
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs ``(x[2j], x[2j+1])`` of each head ``[T, H, E]``, taken as complex numbers, by their angles."""
    pairs = x.to(table.real.dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
