"""Patching and layouts once more, one document and one byte at a time in plain Python, written from the rules alone.

A patching rule gives the starts of a document's patches: positions 0 to S, where S means that the byte to come starts a
patch. `layout_of` turns the starts of all documents into what a PatchLayout holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

Starts = list[int]


def fp32(x: float) -> float:
    return ctypes.c_float(x).value


def entropy_starts(
    entropy: Sequence[float],
    threshold: float,
    threshold_add: float | None = None,
    monotonic: bool = False,
    max_patch_length: int | None = None,
) -> Starts:
    size, limit = len(entropy), fp32(threshold)
    starts = {0, 1}
    for i in range(1, size):
        rise = fp32(entropy[i] - entropy[i - 1])
        if monotonic:
            start = i == 1 or rise > limit
        elif threshold_add is not None:
            start = i == 1 or (i != 2 and rise > fp32(threshold_add) and entropy[i] > limit)
        else:
            start = entropy[i] > limit
        if start:
            starts.add(i + 1)
    return split(within(starts, size), size, max_patch_length)


def within(starts: set[int], size: int) -> Starts:
    """Return the starts at the bytes of a document and at the byte to come; an empty document has none."""
    return sorted(s for s in starts if s <= size) if size else []


def split(starts: Starts, size: int, longest: int | None) -> Starts:
    """Cut patches into pieces of at most `longest` bytes from the left; the byte to come is part of the last patch."""
    if longest is None or not starts:
        return starts
    ends = [*starts[1:], size + 1]
    return [s for start, end in zip(starts, ends, strict=True) for s in range(start, end, longest)]


def space_starts(tokens: Sequence[int]) -> Starts:
    def space_like(token: int) -> bool:
        byte = token - 4
        if byte < 0:
            return True
        return not (chr(byte).isascii() and chr(byte).isalnum()) and not 0x80 <= byte <= 0xBF

    starts = {0, 1}
    for i in range(1, len(tokens)):
        if tokens[i] < 4 or (space_like(tokens[i]) and not space_like(tokens[i - 1])):
            starts.add(i + 1)
    return within(starts, len(tokens))


def static_starts(size_of_document: int, size: int, first: int = 1) -> Starts:
    return within({0, *range(first, size_of_document + 1, size)}, size_of_document)


def delimiter_starts(tokens: Sequence[int], id: int) -> Starts:
    return within({0, 1, *(i + 1 for i, token in enumerate(tokens) if token == id)}, len(tokens))


def topk_starts(entropy: Sequence[float], patch_size: int) -> Starts:
    count = max(0, len(entropy) // patch_size - 2)
    highest = sorted(range(1, len(entropy)), key=lambda i: (-entropy[i], i))[:count]
    return within({0, 1, *(i + 1 for i in highest)}, len(entropy))


def layout_of(starts: Sequence[Starts], sizes: Sequence[int], max_patches: int | None = None) -> dict[str, Any]:
    """Return the fields of a PatchLayout, as lists, for documents of `sizes` bytes."""
    total = sum(sizes)
    capacity = total if max_patches is None else max_patches
    offsets, cu_patches, patch_ids, decode_ids, decode_offsets, cu_seqlens = [], [0], [], [], [], [0]
    overflowed = False
    for b, (own, size) in enumerate(zip(starts, sizes, strict=True)):
        first = cu_patches[-1]
        reserved = sum(s > 0 for s in sizes[b + 1 :])
        inside = [s for s in own if s < size]
        granted = min(len(inside), capacity - reserved - first)
        kept = inside[:granted]
        overflowed |= granted < len(inside)
        if granted == len(inside) and size in own:
            kept = [*kept, size]
        for i in range(size):
            patch_of = [sum(s <= j for s in kept) - 1 for j in (i, i + 1)]
            patch_ids.append(first + patch_of[0])
            decode_ids.append(first + patch_of[1] - 1 if patch_of[1] > 0 else -1)
        start, end = cu_seqlens[-1], cu_seqlens[-1] + size
        for patch in range(first, first + granted):
            decode_offsets.append(next((i for i in range(start, end) if decode_ids[i] >= patch), end))
        offsets += [start + s for s in inside[:granted]]
        cu_patches.append(first + granted)
        cu_seqlens.append(end)
    offsets += [total] * (capacity + 1 - len(offsets))
    decode_offsets += [total] * (capacity + 1 - len(decode_offsets))
    return {
        "patch_offsets": offsets,
        "cu_patches": cu_patches,
        "patch_ids": patch_ids,
        "decode_ids": decode_ids,
        "decode_offsets": decode_offsets,
        "cu_seqlens": cu_seqlens,
        "overflowed": [overflowed],
    }


def lengths_of(starts: Starts, size: int, include_next_byte: bool) -> list[int]:
    """Patch lengths of one document, as other code bases write them."""
    end = size + include_next_byte
    own = [s for s in starts if s < end] if size else [0] * include_next_byte
    ends = [*own[1:], end] if own else []
    return [b - a for a, b in zip(own, ends, strict=True)]
