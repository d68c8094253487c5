"""Entropy patching in plain PyTorch: the specification of `ops.entropy_patch`.

Every patching rule is a vector of boundary decisions, ``boundaries: bool[T]``: boundaries[i] means that the byte after
byte i starts a patch. `PatchLayout.from_cuts` turns decisions into a layout. A local index is 0 at the first byte
of a document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.layout import PatchLayout
from blt_kernels.reference._ragged import (
    document_of,
    document_offsets,
    layout_tensors,
    local_index,
    rounded,
    scheme_operator,
)
from blt_kernels.reference.token_entropy import token_entropy_fwd_reference


def document_entropy_reference(logits: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return entropy and log_sum of logits ``[T, A]``. Bytes beyond the documents are not read: 0 and infinity."""
    beyond = torch.arange(logits.shape[0], device=logits.device) >= cu_seqlens[-1]
    entropy, log_sum = token_entropy_fwd_reference(logits.masked_fill(beyond[:, None], 0))
    return entropy.masked_fill(beyond, 0), log_sum.masked_fill(beyond, torch.inf)


# --- boundary decisions -----------------------------------------------------------------------------------------------


def patch_starts_reference(
    entropy: Tensor,
    cu_seqlens: Tensor,
    threshold: float,
    threshold_add: float | None = None,
    monotonic: bool = False,
    max_patch_length: int | None = None,
    compare: str = "fp32",
    max_patches: int | None = None,
) -> PatchLayout:
    """Cut patches by thresholds of entropies ``[T]``, compared in fp32 or, for "model", in their own dtype."""
    h = entropy if compare == "model" else entropy.float()
    local = local_index(h.shape[0], cu_seqlens)
    rise = h - h.roll(1)
    limit = rounded(threshold, h)
    if monotonic:
        boundaries = (rise > limit) | (local == 1)
    elif threshold_add is not None:
        boundaries = ((rise > rounded(threshold_add, h)) & (h > limit) & (local != 2)) | (local == 1)
    else:
        boundaries = h > limit
    boundaries = boundaries | (local == 0)
    if max_patch_length is not None:
        boundaries = _cut_long_patches(boundaries, max_patch_length)
    return PatchLayout.from_cuts(boundaries, cu_seqlens, max_patches)


def entropy_patch_reference(
    logits: Tensor,
    cu_seqlens: Tensor,
    threshold: float,
    threshold_add: float | None = None,
    monotonic: bool = False,
    max_patch_length: int | None = None,
    compare: str = "fp32",
    max_patches: int | None = None,
) -> tuple[Tensor, PatchLayout]:
    """Return entropies and patches of logits ``[T, A]``."""
    entropy = document_entropy_reference(logits, cu_seqlens)[0]
    rules = threshold, threshold_add, monotonic, max_patch_length, compare
    compared = entropy.detach().to(logits.dtype) if compare == "model" else entropy.detach()
    return entropy, patch_starts_reference(compared, cu_seqlens, *rules, max_patches)


def space_patch_reference(tokens: Tensor, cu_seqlens: Tensor, max_patches: int | None = None) -> PatchLayout:
    """Patches end at the first of a run of space-like bytes, or at a special id. Ids are byte + 4."""
    byte = tokens - 4
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    letter = ((byte >= ord("A")) & (byte <= ord("Z"))) | ((byte >= ord("a")) & (byte <= ord("z")))
    continuation = (byte >= 0x80) & (byte < 0xC0)
    space_like = ~(digit | letter | continuation)
    local = local_index(tokens.shape[0], cu_seqlens)
    boundaries = (space_like & ~space_like.roll(1)) | (tokens < 4) | (local == 0)
    return PatchLayout.from_cuts(boundaries, cu_seqlens, max_patches)


def static_patch_reference(
    cu_seqlens: Tensor, num_bytes: int, size: int, first: int = 1, max_patches: int | None = None
) -> PatchLayout:
    """A first patch of `first` bytes, then patches of `size`."""
    after = local_index(num_bytes, cu_seqlens) + 1
    return PatchLayout.from_cuts((after >= first) & ((after - first) % size == 0), cu_seqlens, max_patches)


def delimiter_patch_reference(
    tokens: Tensor, cu_seqlens: Tensor, id: int, max_patches: int | None = None
) -> PatchLayout:
    """Patches end at the delimiter; the first byte is a patch of its own."""
    boundaries = (tokens.long() == id) | (local_index(tokens.shape[0], cu_seqlens) == 0)
    return PatchLayout.from_cuts(boundaries, cu_seqlens, max_patches)


def topk_patch_reference(
    entropy: Tensor, cu_seqlens: Tensor, patch_size: int, max_patches: int | None = None
) -> PatchLayout:
    """Patches end at the S // patch_size - 2 highest entropies after the first byte; the earlier wins ties."""
    num_bytes = entropy.shape[0]
    local = local_index(num_bytes, cu_seqlens)
    document = document_of(num_bytes, cu_seqlens)
    # Bytes by document, then first bytes last, then entropy from high to low: stable sorts, least significant first.
    order = entropy.float().sort(descending=True, stable=True).indices
    order = order[(local[order] == 0).long().sort(stable=True).indices]
    order = order[document[order].sort(stable=True).indices]
    rank = torch.empty_like(local).scatter_(0, order, torch.arange(num_bytes, device=entropy.device))
    rank = rank - F.pad(cu_seqlens, (0, 1)).long()[document]
    seqlens = F.pad(cu_seqlens.diff(), (0, 1)).long()[document]
    boundaries = ((rank < seqlens // patch_size - 2) & (local != 0)) | (local == 0)
    return PatchLayout.from_cuts(boundaries, cu_seqlens, max_patches)


# --- the operators ----------------------------------------------------------------------------------------------------
# Without cu_seqlens there are num_documents documents of one length. The tensors of a layout but its cu_seqlens come
# out, and last the offsets that were made; none where they were given.


patch_starts_fwd_reference = scheme_operator(patch_starts_reference)
space_patch_fwd_reference = scheme_operator(space_patch_reference)
delimiter_patch_fwd_reference = scheme_operator(delimiter_patch_reference)
topk_patch_fwd_reference = scheme_operator(topk_patch_reference)


def static_patch_fwd_reference(
    cu_seqlens: Tensor, num_bytes: int, size: int, first: int, max_patches: int | None
) -> tuple[Tensor, ...]:
    return layout_tensors(static_patch_reference(cu_seqlens, num_bytes, size, first, max_patches), cu_seqlens)


def entropy_patch_fwd_reference(
    logits: Tensor,
    cu_seqlens: Tensor | None,
    num_documents: int,
    threshold: float,
    threshold_add: float | None,
    monotonic: bool,
    max_patch_length: int | None,
    compare: str,
    max_patches: int | None,
) -> tuple[Tensor, ...]:
    entropy, log_sum = document_entropy_reference(logits, document_offsets(logits, cu_seqlens, num_documents))
    rules = threshold, threshold_add, monotonic, max_patch_length, compare
    compared = entropy.to(logits.dtype) if compare == "model" else entropy
    layout = patch_starts_fwd_reference(compared, cu_seqlens, num_documents, *rules, max_patches)
    return entropy, log_sum, *layout


# --- helpers ----------------------------------------------------------------------------------------------------------


def _cut_long_patches(boundaries: Tensor, max_patch_length: int) -> Tensor:
    """Cut patches into ``[m, m, ..., rest]``, the byte to come included. boundaries[i] is true at every first byte."""
    after = torch.arange(1, boundaries.shape[0] + 1, device=boundaries.device)
    start = torch.where(boundaries, after, 0).cummax(0).values  # the start of the patch of byte i + 1
    return (after - start) % max_patch_length == 0
