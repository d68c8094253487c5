"""The attention of a MegaByte whose patches attend to the patch before them, too."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from blt_kernels._checks import Documents
from blt_kernels.layout import AttentionRanges
from blt_kernels.nn import SelfAttention, rotate
from blt_kernels.nn.cache import CachedKeys


class CrossPatch(NamedTuple):
    """Says which keys a patch attends to: the last ones of the patch before, then its own.

    Attributes
    ----------
    patch_offsets : int32 ``[C+1]``
        Patch p is slots ``[patch_offsets[p], patch_offsets[p+1])``.
    key_offsets : int32 ``[C+1]``
        Patch p attends to keys ``[key_offsets[p], key_offsets[p+1])``.
    key_slots : int64 ``[Tk]``
        The slot that each key is computed from.
    key_table : complex ``[Tk, 1, E/2]``
        Rotary positions of the keys. They count from the start of the patch that attends, so they are negative for
        keys of the patch before.
    cached : CachedKeys, optional
        The slots are those of a cache, which the new keys are written to. Cached keys are not rotated.
    """

    patch_offsets: Tensor | Documents
    key_offsets: Tensor | Documents
    key_slots: Tensor
    key_table: Tensor
    cached: CachedKeys | None = None


class CrossPatchAttention(SelfAttention):
    """Attends causally within patches, and to the last keys of the patch before."""

    # A TransformerLayer passes its documents on unchanged, here as a CrossPatch.
    def forward(  # type: ignore[override]
        self, x: Tensor, table: Tensor, documents: CrossPatch, ranges: AttentionRanges | None = None
    ) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if documents.cached is not None:
            k, v = documents.cached.write(k, v)
        k, v = (y.index_select(0, documents.key_slots) for y in (k, v))
        q, k = rotate(q, table), rotate(k, documents.key_table)
        offsets = (documents.patch_offsets, documents.key_offsets)
        out = self.attention(q, k, v, *offsets, window=self.window, ranges=ranges)
        return self.o_proj(out.flatten(-2))
