"""Finds the patches of the pieces that training cuts files into.

The unit is the piece (see `blt_kernels.train.data`). The entropy model gets a whole piece, and on the CPU nothing else
with it: the same byte elsewhere in a batch, or in a batch of another length, may be rounded differently, and a boundary
depends on which side of a threshold its entropy is rounded to. A row that the end of a batch cuts from a piece has the
patches of the piece; its second byte always starts a patch, as in every row. So patches do not depend on batches, their
order, micro-batches or ranks, and stored patches give bitwise the training that computed ones give. On a GPU the pieces
of a batch are computed together, so boundaries within rounding of the threshold may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from blt_kernels.layout import PatchLayout
from blt_kernels.models import BLT
from blt_kernels.ops.boundary_patch import boundary_patch
from blt_kernels.train import data
from blt_kernels.train.data import Row
from blt_kernels.train.stored_patches import StoredPatches

_CALL_IDS = 1 << 16  # ids that a GPU gets at once


class RowPatches:
    """Finds the patches of rows, as the model cuts their pieces.

    Parameters
    ----------
    model : BLT
    context : int
        Of the pieces.
    bf16 : bool
        Whether the entropy model runs under autocast.
    stored : StoredPatches, optional
        Where the patches are looked up instead of being computed.
    """

    def __init__(self, model: BLT, context: int, bf16: bool = False, stored: StoredPatches | None = None) -> None:
        self.model, self.context, self.bf16, self.stored = model, context, bf16, stored
        # The next batch goes on with a piece that a batch cuts.
        self._cut: dict[tuple[str, int], np.ndarray] = {}

    def layout(self, rows: Sequence[Row]) -> PatchLayout:
        """Return the patches of rows end to end, on the device of the model.

        Raises
        ------
        ValueError
            The patches of a file are not stored.
        """
        pieces = [data.piece_of(row, self.context) for row in rows]
        boundaries = [np.empty(0, dtype=bool)]
        for row, piece, of_piece in zip(rows, pieces, self._of_pieces(pieces), strict=True):
            first = row.start - piece.start
            own = of_piece[first : first + row.length].copy()
            if first:
                own[0] = True  # the second byte of a row always starts a patch
            boundaries.append(own)
            if row.length < piece.length:
                self._cut[piece.source.digest, piece.start] = of_piece
        while len(self._cut) > 2:  # the piece that ends in the batch, and the piece that begins
            self._cut.pop(next(iter(self._cut)))
        offsets = np.cumsum([0, *(row.length for row in rows)], dtype=np.int32)
        layout = boundary_patch(torch.from_numpy(np.concatenate(boundaries)), torch.from_numpy(offsets)).compact()
        return layout.to(next(self.model.parameters()).device)

    def _of_pieces(self, pieces: Sequence[Row]) -> list[np.ndarray]:
        if self.stored is not None:
            return [self.stored.boundaries(piece) for piece in pieces]
        found = [self._cut.get((piece.source.digest, piece.start)) for piece in pieces]
        missing = [piece for piece, boundaries in zip(pieces, found, strict=True) if boundaries is None]
        computed = iter(cut_pieces(self.model, missing, self.bf16))
        return [next(computed) if boundaries is None else boundaries for boundaries in found]


def cut_pieces(
    model: BLT,
    pieces: Sequence[Row],
    bf16: bool,
    read: Callable[[Sequence[Row]], tuple[Tensor, Tensor]] = data.read_rows,
) -> list[np.ndarray]:
    """Return, for each id of each piece, whether the next id starts a patch: bool ``[length]``."""
    device = next(model.parameters()).device
    boundaries = []
    for group in data.group_rows(pieces, 1 if device.type == "cpu" else _CALL_IDS):
        tokens, offsets = read(group)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            layout = model.patch(tokens.to(device), offsets.to(device))
        starts_after = (layout.decode_ids == layout.patch_ids).cpu().numpy()
        boundaries += np.split(starts_after, offsets[1:-1].numpy())
    return boundaries
