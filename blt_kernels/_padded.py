"""Patches of padded rows, as other code bases have them, and of packed bytes, as PatchLayout has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BYTES = 2**31 - 1  # offsets are int32


def check_integers(name: str, x: object, shape: str) -> None:
    """Raise unless `x` is an integer tensor of two dimensions, which `shape` names."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(
            f"{name}: expected an integer tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if x.dim() != 2:
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")


def boundaries_of_lengths(lengths: Tensor, seq_len: int | None, padding: int | None) -> tuple[Tensor, Tensor]:
    """Return the boundary decisions of patch lengths and their int32 cu_seqlens; see `PatchLayout.from_lengths`."""
    check_integers("lengths", lengths, "[B, Pmax]")
    if padding not in (None, 0, -1):
        raise ValueError(f"padding: expected None, 0 or -1, got {padding!r}")
    lengths = lengths.long()
    low, high = (int(x) for x in lengths.aminmax()) if lengths.numel() else (0, 0)
    padding = min(0, max(-1, low)) if padding is None else padding
    if low < padding or high > MAX_BYTES:
        allowed = "values >= 0" if padding == 0 else "values >= -1, which pads,"
        raise ValueError(f"lengths: expected {allowed} up to {MAX_BYTES}, got {low if low < padding else high}")
    counted = lengths.clamp(min=0)
    starts = counted.cumsum(1) - counted
    behind = (lengths < 0).long().cumsum(1) - (lengths < 0).long()  # the number of -1s before each entry
    misplaced = ((behind > 0) & (lengths != 0)).nonzero()
    if misplaced.numel():
        row, column = (int(x) for x in misplaced[0])
        entry = int(lengths[row, column])
        raise ValueError(f"lengths: expected nothing but zeros behind the -1 of row {row}, got {entry}")
    sums = lengths.sum(1)
    if seq_len is None:
        seqlens = sums
        if bool((sums < 0).any()):
            raise ValueError(f"lengths: row {int(sums.argmin())} sums to {int(sums.min())}, expected 0 or more")
    else:
        if not 0 <= seq_len <= MAX_BYTES:
            raise ValueError(f"seq_len: expected 0 to {MAX_BYTES}, got {seq_len}")
        seqlens = torch.full_like(sums, seq_len)
        wrong = ((sums != seq_len) & (sums != seq_len + 1 + padding)).nonzero()
        if wrong.numel():
            row, other = int(wrong[0]), "" if padding else " or seq_len + 1"
            raise ValueError(f"lengths: row {row} sums to {int(sums[row])}, expected seq_len = {seq_len}{other}")
    cu_seqlens = F.pad(seqlens.cumsum(0), (1, 0))
    num_bytes = int(cu_seqlens[-1])
    if num_bytes > MAX_BYTES:
        raise ValueError(f"lengths: expected at most {MAX_BYTES} bytes in all, got {num_bytes}")
    # A start at local position s >= 1 is the decision after byte s - 1. A start at s = seqlen is the decision after
    # the last byte. A start beyond it does not exist.
    real = (lengths > 0) & (starts > 0) & (starts <= seqlens[:, None])
    if padding:
        real |= (lengths == 0) & (starts > 0) & (starts == seqlens[:, None])
    boundaries = torch.zeros(num_bytes, dtype=torch.bool, device=lengths.device)
    boundaries[(cu_seqlens[:-1, None] + starts - 1)[real]] = True
    return boundaries, cu_seqlens.int()


def packed_ids(ids: Tensor, lowest: int, slots: int) -> tuple[Tensor, Tensor]:
    """Return the packed ids ``[B*S]`` and offsets ``[B*slots+1]`` of ids that are local to their row; both are int32.

    Slot p of row b is patch ``b * slots + p``. Its offset is the first byte of the row whose id is p or more, or the
    end of the row. Ids are clamped to `lowest` and ``slots - 1``; one below an earlier id of its row becomes that id.
    """
    rows, size = ids.shape
    ids = ids.long().clamp(lowest, slots - 1).cummax(1).values
    row = torch.arange(rows + 1, device=ids.device)
    slot = torch.arange(slots, device=ids.device).expand(rows, slots).contiguous()
    first_bytes = torch.searchsorted(ids, slot) + (row * size)[:-1, None]
    packed = (ids + (row * slots)[:-1, None]).where(ids >= 0, -1)
    return packed.flatten().int(), torch.cat([first_bytes.flatten(), row[-1:] * size]).int()
