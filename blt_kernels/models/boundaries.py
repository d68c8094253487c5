"""A BLT decides after which new bytes patches start, from the last ids and entropies of each row."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from blt_kernels._checks import Documents
from blt_kernels.ids import BPE
from blt_kernels.models.characters import character_ends, cut_long_patches
from blt_kernels.models.config import BLTConfig

LOOKBACK = 8  # ids before a byte that boundary rules read: local indices, whole characters, rises of the entropy
_ROW = 1 << 40  # no row has so many bytes


def rule_boundaries(
    config: BLTConfig, ops: SimpleNamespace, ids: Tensor, entropy: Tensor | None, documents: Documents,
    positions: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return after which ids the scheme of the configuration starts a patch, bool ``[T]``.

    Parameters
    ----------
    config : BLTConfig
    ops : namespace
        Of `load_ops`.
    ids : int32 or int64 ``[T]``
        The last ids of each row. What a row has fewer than `LOOKBACK` ids behind is not decided rightly, unless the
        row begins with them.
    entropy : floating ``[T]``, optional
        For "entropy".
    documents : Documents
        The offsets of the rows.
    positions : int64 ``[T]``, optional
        The positions of the ids in their rows, for "static" and "byte".
    """
    offsets = ops.offsets(documents)
    if config.patching in ("static", "byte"):
        assert positions is not None
        return positions % (config.patch_size if config.patching == "static" else 1) == 0
    if config.patching == "entropy":
        assert entropy is not None
        rules = {"threshold_add": config.threshold_add, "monotonic": config.monotonic}
        layout = ops.patch_starts(entropy, offsets, threshold=config.threshold, **rules)
    elif config.patching == "space":
        layout = ops.space_patch(ids, offsets)
    else:
        layout = ops.delimiter_patch(ids, BPE, offsets)
    return layout.decode_ids == layout.patch_ids


def cut_boundaries(
    config: BLTConfig, boundaries: Tensor, ids: Tensor, documents: Documents, positions: Tensor, row: Tensor,
    begin: Tensor, start: Tensor, new: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply `whole_characters` and `max_patch_length`.

    Parameters
    ----------
    config : BLTConfig
    boundaries : bool ``[T]``
        Of `rule_boundaries`.
    ids, documents, positions
        As there.
    row : int64 ``[T]``
        The row of each id.
    begin, start : int64 ``[rows]``
        The position of the first of the ids, and where the open patch of each row starts if no patch is cut.
    new : int64 ``[N]``
        The index of the ids that are decided about.

    Returns
    -------
    rule, final : bool ``[T]``
        Without the cuts of long patches, and with them.
    """
    ends = torch.ones_like(boundaries)
    if config.whole_characters:
        ends = character_ends(ids, documents.offsets) | (positions == 0)
        boundaries = (boundaries & ends) | (positions == 0)
    if config.max_patch_length is None:
        return boundaries, boundaries
    first, start = (x.index_select(0, row) + row * _ROW for x in (begin, start))
    after = positions + row * _ROW + 1
    known = torch.ones_like(boundaries).index_fill_(0, new, False)
    return boundaries, cut_long_patches(
        boundaries & ~known, ends, after, after == first + 1, start, config.max_patch_length, end=first
    )
