"""boundary_patch: patches at boundaries that the caller decides, for any rule that is not an op of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.layout import PatchLayout
from blt_kernels.ops._patch_layout import define_scheme, layout_of
from blt_kernels.reference import boundary_patch as reference


def boundary_patch(
    marks: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    at: str = "end",
    first: int | None = None,
    threshold: float | Tensor | None = None,
    max_patches: int | None = None,
) -> PatchLayout:
    """Cut bytes into patches where they are marked. The first byte of a document always starts a patch.

    Parameters
    ----------
    marks : bool, or fp32, bf16, fp16 or fp64 scores, ``[T]`` or ``[B, S]``
        The marked bytes. Scores are marks where they are above `threshold`, strictly, in fp32.
    cu_seqlens : int32 or int64 ``[B+1]``, optional
        Documents of packed marks; one document if None.
    at : str
        "end": a patch ends with a marked byte, so that the byte after it starts one; this is the convention of
        `PatchLayout.from_cuts`, and entropies are such scores. "start": a patch starts with a marked byte, as in H-Net;
        no mark says whether the byte to come starts one, so it is taken to continue the last patch.
    first : int, optional
        Bytes in the first patch of a document, whatever their marks are, as in `static_patch`: 1 for BLT, whose first
        patch must have one byte. If None, the marks decide.
    threshold : float, or fp32, bf16, fp16 or fp64 ``[B]``
        For scores, one for all documents or one each; for bool marks there is none.
    max_patches : int, optional
        As in `patch_starts`.

    Returns
    -------
    PatchLayout
        The patches, on the device of the argument. Its `overflowed` is true where `max_patches` was too small.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device, shape or value; the message names it.

    Examples
    --------
    >>> marks = torch.tensor([False, False, True, False, True, False])
    >>> boundary_patch(marks).compact().patch_offsets.tolist()
    [0, 3, 5, 6]
    >>> boundary_patch(marks, at="start").compact().patch_offsets.tolist()
    [0, 2, 4, 6]
    >>> boundary_patch(marks.float(), threshold=0.5, first=1).compact().patch_offsets.tolist()
    [0, 1, 3, 5, 6]
    """
    _checks.check_tensor("marks", marks, (1, 2), (torch.bool, *_checks.FLOATS))
    _checks.check_choice("at", at, ("end", "start"))
    if first is not None:
        _checks.check_int("first", first, 1)
    packed, offsets, documents = _checks.documents_of("marks", marks.detach(), cu_seqlens, trailing=0)
    _checks.check_capacity(max_patches, documents)
    number, thresholds = (None, threshold) if isinstance(threshold, Tensor) else (threshold, None)
    if (threshold is None) != (marks.dtype == torch.bool):
        expected = "None" if marks.dtype == torch.bool else "a number or a tensor"
        raise ValueError(f"threshold: expected {expected} for marks of {marks.dtype}, got {threshold!r}")
    if thresholds is not None:
        _checks.check_like("threshold", thresholds, (1,), "marks", marks, dtype=False)
        _checks.check_dense("threshold", thresholds)
        _checks.check_shape("threshold", thresholds, (documents,), "[B]")
        thresholds = thresholds.detach().float()
    elif number is not None:
        _checks.check_number("threshold", number)
    return layout_of(
        boundary_patch_fwd(packed, offsets, documents, number, thresholds, at, first, max_patches), offsets
    )


# --- schema, reference and fake ---------------------------------------------------------------------------------------

boundary_patch_fwd = define_scheme(
    "boundary_patch_fwd",
    "marks",
    "float? threshold, Tensor? thresholds, str at, SymInt? first, SymInt? max_patches",
    reference.boundary_patch_fwd_reference,
)
