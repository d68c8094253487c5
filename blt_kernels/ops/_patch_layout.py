"""Checks of layouts, and the outputs of the operators that cut bytes into patches: schema, fake and PatchLayout.

Without cu_seqlens there are num_documents documents of one length. Then their offsets are the last output, which is
empty otherwise: an output may not be an input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from blt_kernels import _checks
from blt_kernels.layout import PatchLayout
from blt_kernels.ops import _common

LAYOUT = (
    "Tensor patch_offsets, Tensor cu_patches, Tensor patch_ids, Tensor decode_ids, Tensor decode_offsets,"
    " Tensor overflowed, Tensor made_cu_seqlens"
)
DOCUMENTS = "Tensor? cu_seqlens, SymInt num_documents"


def check_layout(layout: object, name: str, value: Tensor) -> None:
    """Raise unless `layout` is a PatchLayout on the device of `value`."""
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout: expected a PatchLayout, got {type(layout).__name__}")
    offsets, ids = layout.patch_offsets, layout.patch_ids
    if type(offsets) is Tensor and type(ids) is Tensor and offsets.device == value.device:
        return
    for field in ("patch_offsets", "patch_ids"):
        if not isinstance(getattr(layout, field), Tensor):
            raise TypeError(f"layout.{field}: expected a tensor, got {type(getattr(layout, field)).__name__}")
    _checks.check_same("layout", offsets, name, value, dtype=False)


def check_readers(layout: PatchLayout) -> None:
    """Raise unless the two offsets of `layout` are for as many patches, on one device."""
    patch_offsets, decode_offsets = layout.patch_offsets, layout.decode_offsets
    if is_compiling():
        return
    if type(decode_offsets) is not Tensor:
        _checks.check_tensor("layout.decode_offsets", decode_offsets, 1, (torch.int32,))
    _checks.check_same("layout.decode_offsets", decode_offsets, "layout.patch_offsets", patch_offsets)
    if _checks.shape_of("layout.decode_offsets", decode_offsets) != patch_offsets.shape:
        expected = f"shape {list(patch_offsets.shape)} of layout.patch_offsets"
        raise ValueError(f"layout.decode_offsets: expected {expected}, got {list(decode_offsets.shape)}")


def layout_of(tensors: Any, cu_seqlens: Tensor | None) -> PatchLayout:
    """Return the layout that an operator's outputs are."""
    patch_offsets, cu_patches, patch_ids, decode_ids, decode_offsets, overflowed, made = tensors
    offsets = made if cu_seqlens is None else cu_seqlens
    return PatchLayout(patch_offsets, cu_patches, patch_ids, decode_ids, decode_offsets, offsets, overflowed)


def empty_layout(
    num_bytes: int, like: Tensor, cu_seqlens: Tensor | None, num_documents: int, max_patches: int | None
) -> tuple[Tensor, ...]:
    """Allocate those outputs, as the kernels do."""
    capacity = num_bytes if max_patches is None else max_patches
    count = num_documents + 1 if cu_seqlens is None else cu_seqlens.shape[0]
    sizes = capacity + 1, count, num_bytes, num_bytes, capacity + 1
    return (
        *(like.new_empty(size, dtype=torch.int32) for size in sizes),
        like.new_empty(1, dtype=torch.bool),
        like.new_empty(count if cu_seqlens is None else 0, dtype=torch.int32),
    )


def define_scheme(name: str, values: str, arguments: str, scheme: Any) -> Callable[..., Any]:
    """Define a patching scheme of bytes with `values`, as `define`; `arguments` follow those of the documents."""

    def fake(x: Tensor, cu_seqlens: Tensor | None, num_documents: int, *rest: Any) -> tuple[Tensor, ...]:
        return empty_layout(x.shape[0], x, cu_seqlens, num_documents, rest[-1])

    return _common.define(name, f"(Tensor {values}, {DOCUMENTS}, {arguments}) -> ({LAYOUT})", scheme, fake)
