"""Patches of padded rows, as other code bases have them, and of packed bytes, as PatchLayout has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels import _checks

MAX_BYTES = _checks.INT32_MAX  # offsets are int32


_INTEGERS = (torch.uint8, torch.int8, torch.int16, *_checks.INTS)


def check_ids(patch_ids: Tensor, decode_ids: Tensor, slots: int) -> None:
    """Raise unless these are arguments of `PatchLayout.from_ids`; their values are not read."""
    for name, ids in (("patch_ids", patch_ids), ("decode_ids", decode_ids)):
        _check_integers(name, ids, "[B, S]")
    _checks.check_same("decode_ids", decode_ids, "patch_ids", patch_ids, dtype=False)
    if decode_ids.shape != patch_ids.shape:
        expected = f"shape {list(patch_ids.shape)} of patch_ids"
        raise ValueError(f"decode_ids: expected {expected}, got {list(decode_ids.shape)}")
    rows, size = patch_ids.shape
    _checks.check_is_int("slots", slots)
    if slots < 1 or rows * slots > MAX_BYTES:
        raise ValueError(f"slots: expected 1 to {MAX_BYTES} // {rows} rows, got {slots}")
    if rows * size > MAX_BYTES:
        raise ValueError(f"patch_ids: expected at most {MAX_BYTES} bytes in all, got {rows * size}")


def check_lengths(lengths: Tensor, seq_len: int | None, padding: int | None, max_patches: int | None) -> None:
    """Raise unless these are arguments of `PatchLayout.from_lengths`. Without all sizes it reads the values."""
    _check_integers("lengths", lengths, "[B, Pmax]")
    check_padding(padding, (None, 0, -1))
    for name, value in (("seq_len", seq_len), ("max_patches", max_patches)):
        if value is not None:
            _checks.check_is_int(name, value)
    if seq_len is not None and not 0 <= seq_len <= MAX_BYTES:
        raise ValueError(f"seq_len: expected 0 to {MAX_BYTES}, got {seq_len}")
    if max_patches is not None and max_patches > MAX_BYTES:
        raise ValueError(f"max_patches: expected at most {MAX_BYTES}, as int32 ids count, got {max_patches}")
    rows = lengths.shape[0]
    if max_patches is not None and max_patches < rows:
        raise ValueError(f"max_patches: expected at least one patch a row ({rows}), got {max_patches}")
    if seq_len is not None and seq_len * rows > MAX_BYTES:
        raise ValueError(f"seq_len: expected at most {MAX_BYTES} bytes in all, got {seq_len} in {rows} rows")
    if seq_len is None or max_patches is None:
        _check_values(lengths, seq_len, padding)


def check_padding(padding: object, choices: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `padding` is one of the `choices`."""
    if not (padding is None or type(padding) is int) or padding not in choices:
        expected = " or ".join(map(str, choices))
        raise ValueError(f"padding: expected {expected}, got {padding!r}")


def _check_integers(name: str, x: object, shape: str) -> None:
    """Raise unless `x` is an integer tensor of two dimensions, which `shape` names."""
    if not isinstance(x, Tensor) or x.dtype not in _INTEGERS:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {got}")
    _checks.check_dense(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")


def _check_values(lengths: Tensor, seq_len: int | None, padding: int | None) -> None:
    lengths = lengths.long()
    low, high = (int(x) for x in lengths.aminmax()) if lengths.numel() else (0, 0)
    padding = min(0, max(-1, low)) if padding is None else padding
    if low < padding or high > MAX_BYTES:
        allowed = "values >= 0" if padding == 0 else "values >= -1, which pads,"
        raise ValueError(f"lengths: expected {allowed} up to {MAX_BYTES}, got {low if low < padding else high}")
    behind = (lengths < 0).long().cumsum(1) - (lengths < 0).long()  # the number of -1s before each entry
    misplaced = ((behind > 0) & (lengths != 0)).nonzero()
    if misplaced.numel():
        row, column = (int(x) for x in misplaced[0])
        entry = int(lengths[row, column])
        raise ValueError(f"lengths: expected nothing but zeros behind the -1 of row {row}, got {entry}")
    sums = lengths.sum(1)
    if seq_len is None:
        if bool((sums < 0).any()):
            raise ValueError(f"lengths: row {int(sums.argmin())} sums to {int(sums.min())}, expected 0 or more")
        if int(sums.sum()) > MAX_BYTES:
            raise ValueError(f"lengths: expected at most {MAX_BYTES} bytes in all, got {int(sums.sum())}")
    else:
        wrong = ((sums != seq_len) & (sums != seq_len + 1 + padding)).nonzero()
        if wrong.numel():
            row, other = int(wrong[0]), "" if padding else " or seq_len + 1"
            raise ValueError(f"lengths: row {row} sums to {int(sums[row])}, expected seq_len = {seq_len}{other}")


def boundaries_of_lengths(lengths: Tensor, seq_len: int | None, padding: int | None) -> tuple[Tensor, Tensor]:
    """Return the boundary decisions of patch lengths and their int32 cu_seqlens; see `PatchLayout.from_lengths`.

    With `seq_len` no value is read. Without it the host waits for the number of bytes.
    """
    rows = lengths.shape[0]
    lengths = lengths.long().clamp(-1, MAX_BYTES)
    if seq_len is None:
        cu_seqlens = F.pad(lengths.sum(1).cumsum(0), (1, 0))
        num_bytes = int(cu_seqlens[-1])
    else:
        cu_seqlens = torch.arange(rows + 1, device=lengths.device) * seq_len
        num_bytes = rows * seq_len
    counted = lengths.clamp(min=0)
    starts, size = counted.cumsum(1) - counted, cu_seqlens.diff()[:, None]
    padded = (lengths < 0).any() if padding is None else padding == -1
    # A start at local position s >= 1 is the decision after byte s - 1. A start at s = size is the decision after the
    # last byte; with lengths of transformers it may be that of a patch of length 0. A start beyond it does not exist.
    real = (starts > 0) & (starts <= size) & ((lengths > 0) | ((lengths == 0) & (starts == size) & padded))
    byte = torch.where(real, cu_seqlens[:-1, None] + starts - 1, num_bytes)
    boundaries = torch.zeros(num_bytes + 1, dtype=torch.bool, device=lengths.device)
    return boundaries.index_fill(0, byte.flatten(), True)[:num_bytes], cu_seqlens.int()


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
