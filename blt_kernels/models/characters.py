"""Finds the bytes that end a character of UTF-8, and drops boundary decisions that cut one."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.ids import BYTE_OFFSET
from blt_kernels.layout import PatchLayout
from blt_kernels.nn import load_ops, row_positions


def character_ends(ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return which ids a patch may end with, bool ``[T]``: those that leave no character of UTF-8 incomplete.

    Only ids up to each id decide. An incremental decoder holds back the same bytes: a lead byte and the continuation
    bytes that may follow it, until the last of them has come. A byte that cannot begin or continue a character, such as
    0x80 after "a", is a character of its own, and so is a special id. A byte that interrupts a character, such as "a"
    after 0xE4, ends it.

    Parameters
    ----------
    ids : int32 or int64 ``[T]``
    cu_seqlens : int32 ``[R+1]``
    """
    position = row_positions(cu_seqlens, ids.shape[0])
    byte = ids - BYTE_OFFSET
    one_before, two_before = (torch.where(position >= k, byte.roll(k), -1) for k in (1, 2))

    def lead(first: Tensor, length: int) -> Tensor:
        """Return whether a character of at least `length` bytes begins with this byte."""
        return (first >= {2: 0xC2, 3: 0xE0, 4: 0xF0}[length]) & (first <= 0xF4)

    def second(first: Tensor, byte: Tensor) -> Tensor:
        """Return whether `byte` may follow: it makes no overlong form, no surrogate and nothing above U+10FFFF."""
        low = torch.where(first == 0xE0, 0xA0, torch.where(first == 0xF0, 0x90, 0x80))
        high = torch.where(first == 0xED, 0x9F, torch.where(first == 0xF4, 0x8F, 0xBF))
        return (byte >= low) & (byte <= high)

    continued = (byte >= 0x80) & (byte <= 0xBF)
    incomplete = lead(byte, 2) | (lead(one_before, 3) & second(one_before, byte))
    incomplete |= lead(two_before, 4) & second(two_before, one_before) & continued
    return ~incomplete


def whole_characters(
    boundaries: Tensor, ids: Tensor, cu_seqlens: Tensor, max_patch_length: int | None = None
) -> Tensor:
    """Drop the boundary decisions that cut a character, then cut patches that are too long.

    Parameters
    ----------
    boundaries : bool ``[T]``
        Whether the byte after each one starts a patch. The one after the first byte of a row always does.
    ids : int32 or int64 ``[T]``
    cu_seqlens : int32 ``[R+1]``
    max_patch_length : int, optional
        Cut longer patches after this many bytes, twice as many and so on, counted from where they start; where that is
        inside of a character, after the character. So patches have at most ``max_patch_length + 3`` bytes where the
        text is UTF-8, and exactly the lengths of `blt_kernels.patch_starts` where it is ASCII.

    Returns
    -------
    bool ``[T]``
        The decisions that remain, and those of the cuts. A decision needs no byte after the one that it follows.

    Raises
    ------
    TypeError, ValueError
        `max_patch_length` is no positive int.
    """
    total = ids.shape[0]
    first = row_positions(cu_seqlens, total) == 0
    ends = character_ends(ids, cu_seqlens) | first
    boundaries = (boundaries & ends) | first
    if max_patch_length is None:
        return boundaries
    _checks.check_int("max_patch_length", max_patch_length, 1)
    after = torch.arange(1, total + 1, device=ids.device)
    return cut_long_patches(boundaries, ends, after, first, torch.zeros_like(after), max_patch_length)


def cut_long_patches(
    boundaries: Tensor, ends: Tensor, after: Tensor, first: Tensor, start: Tensor, max_patch_length: int,
    end: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Add the cuts of patches that are longer than `max_patch_length`.

    Parameters
    ----------
    boundaries, ends : bool ``[T]``
        The boundary decisions, and where a patch may end.
    after : int64 ``[T]``
        The position of the byte after each one. Those of a row are above those of all rows before.
    first : bool ``[T]``
        The first entry of each row.
    start : int64 ``[T]``
        Where the patch of the first entry of the row starts.
    max_patch_length : int
    end : int64 ``[T]``, optional
        The last place before the first entry of the row where a patch may end; `start` if None.

    Returns
    -------
    bool ``[T]``
    """
    end = start if end is None else end
    start = torch.where(boundaries, after, start).cummax(0).values
    last = torch.where(ends, after, end).cummax(0).values
    before = torch.where(first, end, last.roll(1))  # its value at the entry before
    return boundaries | (ends & ((after - start) // max_patch_length > (before - start) // max_patch_length))


def patches_of_whole_characters(
    layout: PatchLayout,
    ids: Tensor,
    max_patch_length: int | None = None,
    max_patches: int | None = None,
    *,
    ops: SimpleNamespace | None = None,
) -> PatchLayout:
    """Return the patches of a `layout`, of any scheme of BLT, by `whole_characters`.

    Parameters
    ----------
    layout : PatchLayout
        Of its starts, those are left that cut no character, and those at 0 and 1, which BLT always has.
    ids : int32 or int64 ``[T]``
    max_patch_length, max_patches
        As in `whole_characters` and in `blt_kernels.patch_starts`.
    ops : namespace, optional
        Of `blt_kernels.nn.load_ops`: the public ops if None.
    """
    ops = load_ops("fused") if ops is None else ops
    boundaries = layout.decode_ids == layout.patch_ids
    boundaries = whole_characters(boundaries, ids, layout.cu_seqlens, max_patch_length)
    return ops.patch_starts(boundaries.float(), layout.cu_seqlens, threshold=0.5, max_patches=max_patches)
