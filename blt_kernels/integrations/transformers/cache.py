"""Cached generation for transformers' BLT, on the states of `blt_kernels.models`.

The cache of transformers 5.23 for BLT raises by default and else writes wrong text: patcher, n-grams and patches are
computed from the new bytes alone. Here a cache is a `BLTState`, to which a forward appends the new columns of each row.
A column that `attention_mask` leaves out is no byte of its row, so a row with padding computes what it computes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from blt_kernels import _checks
from blt_kernels.models import BLT
from blt_kernels.models.blt_state import BLTState


class BltCache(Cache):
    """Remembers the rows of a batch: `transformers` passes it as ``past_key_values``.

    A model under `apply` makes one where none is given. Layers with a window keep the window and `undo` more columns.

    Parameters
    ----------
    undo : int
        How many columns `crop` takes back at no cost. To take back more, a row is computed anew.

    Attributes
    ----------
    state : BLTState or None
        None before the first forward.

    Raises
    ------
    TypeError, ValueError
        `undo` is no such int.

    Notes
    -----
    Under a `max_patch_length`, transformers drops the decision after the last byte of the longest row. A cache keeps
    it, and so computes what transformers computes once a further byte follows.

    Examples
    --------
    >>> cache = BltCache()
    >>> cache.get_seq_length(), cache.is_compileable
    (0, False)
    """

    def __init__(self, undo: int = 64) -> None:
        super().__init__(layers=[])
        _checks.check_int("undo", undo, 0)
        self.undo = undo
        self.reset()

    # --- what transformers calls ----------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns, padding included.

        Parameters
        ----------
        layer_idx : int
            All layers have the same number.

        Returns
        -------
        int
        """
        return self.mask.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no maximum.

        Parameters
        ----------
        layer_idx : int, optional

        Returns
        -------
        int
        """
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of columns after new ones, and the first column, 0.

        Parameters
        ----------
        query_length : int
            New columns.
        layer_idx : int

        Returns
        -------
        int, int
        """
        return self.get_seq_length() + query_length, 0

    @property
    def is_compileable(self) -> bool:
        """False: what a step computes depends on the bytes."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True: `crop` undoes all that the removed columns changed."""
        return True

    @property
    def is_linear(self) -> list[bool]:
        """False: a row can be taken back, and ids that are in the cache are not passed again."""
        return [False]

    is_sliding = is_dummy = is_linear

    @property
    def is_initialized(self) -> bool:
        """True after the first forward."""
        return self.state is not None

    @property
    def batch_size(self) -> int:
        """The number of rows; -1 before the first forward."""
        return -1 if self.state is None else self.state.rows

    def __len__(self) -> int:
        """Return the number of layers that keep keys; 0 before the first forward."""
        if self.state is None:
            return 0
        blt = self.state.model
        parts = [blt.patcher] if self.state.patcher is not None else []
        return sum(len(part.layers) for part in [*parts, blt.local_encoder, blt.global_transformer, blt.local_decoder])

    def __repr__(self) -> str:
        return f"BltCache(rows={self.batch_size}, columns={self.get_seq_length()})"

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise an error: layers do not update this cache.

        Parameters
        ----------
        args, kwargs
            Ignored.

        Returns
        -------
        Never.

        Raises
        ------
        TypeError
            Always. A model without `apply` has called it.
        """
        raise TypeError("past_key_values: a BltCache needs a model under blt_kernels.integrations.transformers.apply")

    def reset(self) -> None:
        """Forget all rows."""
        self.state: BLTState | None = None
        # [rows, columns], on the CPU: which columns are bytes
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device="cpu")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns.

        Parameters
        ----------
        tokens_to_remove : int
            ``-n`` removes n columns, at most all of them. A positive number is the number of columns to keep, as in
            older versions of transformers. 0 does nothing.
        """
        columns = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else max(0, columns + tokens_to_remove)
        if self.state is None or keep >= columns:
            return
        self.mask = self.mask[:, :keep].clone()
        self.state.truncate(self.mask.sum(1).tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of these numbers, in this order.

        Parameters
        ----------
        beam_idx : int64 ``[N]``
        """
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these numbers, in this order.

        Parameters
        ----------
        indices : int64 ``[N]`` or bool ``[rows]``
        """
        if self.state is not None:
            rows = torch.arange(self.state.rows, device="cpu")[indices.cpu()]
            self.state.select(rows.tolist())
            self.mask = self.mask[rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row.

        Parameters
        ----------
        repeats : int
        """
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.rows, device="cpu").repeat_interleave(repeats))

    # --- what the model calls -------------------------------------------------------------------------------------

    def bind(self, blt: BLT, rows: int) -> BLTState:
        """Return the state, which is made if there is none.

        Parameters
        ----------
        blt : BLT
            That of the model.
        rows : int

        Returns
        -------
        BLTState

        Raises
        ------
        ValueError
            The state is of another model, or of another number of rows.
        """
        if self.state is None:
            self.state = blt.new_state(rows, undo=self.undo)
            self.mask = torch.zeros(rows, 0, dtype=torch.bool, device="cpu")
        elif self.state.model is not blt:
            raise ValueError(
                "past_key_values: expected a cache of this model as it is, got one of another model, or of parameters "
                "that were replaced since"
            )
        elif self.state.rows != rows:
            raise ValueError(f"input_ids: expected {self.state.rows} rows as in past_key_values, got {rows}")
        return self.state

    def new_columns(self, attention_mask: Tensor | None, count: int) -> Tensor:
        """Return which new columns are bytes.

        Parameters
        ----------
        attention_mask : ``[rows, columns + count]``, optional
            Of all columns; all are bytes if None.
        count : int
            The number of new columns.

        Returns
        -------
        bool ``[rows, count]`` on the CPU

        Raises
        ------
        ValueError
            The mask has another shape, or other columns before the new ones than it had.
        """
        rows, past = self.mask.shape
        if attention_mask is None:
            return torch.ones(rows, count, dtype=torch.bool, device="cpu")
        if tuple(attention_mask.shape) != (rows, past + count):
            shape = f"[{rows}, {past + count}], past columns included"
            raise ValueError(f"attention_mask: expected shape {shape}, got {list(attention_mask.shape)}")
        mask = attention_mask.cpu().bool()
        if not torch.equal(mask[:, :past], self.mask):
            raise ValueError("attention_mask: expected the columns in past_key_values to be masked as before")
        return mask[:, past:]

    def columns(self) -> Tensor:
        """Return the ids of all columns, int64 ``[rows, columns]``; 0 for padding."""
        assert self.state is not None
        ids = torch.zeros(self.mask.shape, dtype=torch.int64, device=self.state.device)
        for r, mask in enumerate(self.mask):
            ids[r, mask.to(ids.device)] = self.state.row_ids(r)
        return ids
