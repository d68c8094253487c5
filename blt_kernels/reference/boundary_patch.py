"""boundary_patch in plain PyTorch: the specification of `ops.boundary_patch`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from blt_kernels.layout import PatchLayout
from blt_kernels.reference._ragged import document_of, document_offsets, layout_tensors, local_index, rounded


def boundary_patch_reference(
    marks: Tensor,
    cu_seqlens: Tensor,
    at: str = "end",
    first: int | None = None,
    threshold: float | Tensor | None = None,
    max_patches: int | None = None,
) -> PatchLayout:
    """Patches end or start at marked bytes; scores are marks where they are above the threshold, in fp32."""
    num_bytes = marks.shape[0]
    local = local_index(num_bytes, cu_seqlens)
    if threshold is not None:
        marks = marks.float()
        if isinstance(threshold, Tensor):
            marks = marks > F.pad(threshold.float(), (0, 1))[document_of(num_bytes, cu_seqlens)]
        else:
            marks = marks > rounded(threshold, marks)
    if at == "start":
        marks = marks.roll(-1) & (local.roll(-1) == local + 1)  # of the next byte, which the document may not have
    if first is not None:
        marks = ((local + 1 > first) & marks) | (local + 1 == first)
    return PatchLayout.from_cuts(marks, cu_seqlens, max_patches)


def boundary_patch_fwd_reference(
    marks: Tensor,
    cu_seqlens: Tensor | None,
    num_documents: int,
    threshold: float | None,
    thresholds: Tensor | None,
    at: str,
    first: int | None,
    max_patches: int | None,
) -> tuple[Tensor, ...]:
    offsets = document_offsets(marks, cu_seqlens, num_documents)
    limits = threshold if thresholds is None else thresholds
    return layout_tensors(boundary_patch_reference(marks, offsets, at, first, limits, max_patches), cu_seqlens)
