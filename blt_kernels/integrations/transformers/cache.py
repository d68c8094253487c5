"""Cached generation for transformers' BLT, on the states of `blt_kernels.models`.

The cache of transformers 5.23 for BLT raises by default and else writes wrong text: its patcher, its n-grams and its
patches know the new bytes only. Here a cache is a `BLTState`, to which a forward appends the new columns of each row. A
column that `attention_mask` leaves out is no byte of its row, so a row with padding computes what it computes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from blt_kernels import _checks
from blt_kernels.integrations._applied import Applied
from blt_kernels.integrations.transformers.shared import NotSharedError, SharedBLT
from blt_kernels.models import BLT
from blt_kernels.models.blt_state import BLTState

_PART = 4096  # columns that a long prompt is read by, so that memory stays bounded
_FAR = 1 << 40  # no position is so high
_PARTS = ("encoder_config", "global_config", "decoder_config")
LABEL = "BltCache"  # in reports


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
        """True: `crop` leaves no trace."""
        return True

    @property
    def is_initialized(self) -> bool:
        """Whether there was a forward."""
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
        self.mask = torch.zeros(0, 0, dtype=torch.bool)  # [rows, columns], on the CPU: which columns are bytes

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
            rows = torch.arange(self.state.rows)[indices.cpu()]
            self.state.select(rows.tolist())
            self.mask = self.mask[rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row.

        Parameters
        ----------
        repeats : int
        """
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.rows).repeat_interleave(repeats))

    # --- what the model calls -------------------------------------------------------------------------------------

    def _bind(self, blt: BLT, rows: int) -> BLTState:
        """Return the state, which is made if there is none."""
        if self.state is None:
            self.state = blt.new_state(rows, undo=self.undo)
            self.mask = torch.zeros(rows, 0, dtype=torch.bool)
        elif self.state.model is not blt:
            raise ValueError(
                "past_key_values: expected a cache of this model as it is, got one of another model, or of parameters "
                "that were replaced since"
            )
        elif self.state.rows != rows:
            raise ValueError(f"input_ids: expected {self.state.rows} rows as in past_key_values, got {rows}")
        return self.state

    def _new_columns(self, attention_mask: Tensor | None, count: int) -> Tensor:
        """Return which new columns are bytes, bool ``[rows, count]`` on the CPU."""
        rows, past = self.mask.shape
        if attention_mask is None:
            return torch.ones(rows, count, dtype=torch.bool)
        if tuple(attention_mask.shape) != (rows, past + count):
            shape = f"[{rows}, {past + count}], past columns included"
            raise ValueError(f"attention_mask: expected shape {shape}, got {list(attention_mask.shape)}")
        mask = attention_mask.cpu().bool()
        if not torch.equal(mask[:, :past], self.mask):
            raise ValueError("attention_mask: expected the columns in past_key_values to be masked as before")
        return mask[:, past:]

    def _columns(self) -> Tensor:
        """Return the ids of all columns, int64 ``[rows, columns]``; 0 for padding."""
        assert self.state is not None
        ids = torch.zeros(self.mask.shape, dtype=torch.int64, device=self.state.device)
        for r, mask in enumerate(self.mask):
            ids[r, mask.to(ids.device)] = self.state.row_ids(r)
        return ids


class Caching:
    """Makes the two functions of transformers that have a cache from those that have none.

    Parameters
    ----------
    applied : Applied
        Counts calls and says what fell back.
    compare : "fp32" or "model"
        As in `apply`.
    """

    def __init__(self, applied: Applied, compare: str) -> None:
        self.applied, self.compare = applied, compare
        self.shared: WeakKeyDictionary[nn.Module, SharedBLT] = WeakKeyDictionary()
        self.cached = applied.counted(LABEL, self._cached)

    def forward(self, uncached: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``BltModel.forward``: with a cache where one is asked for, and else `uncached`."""

        @wraps(uncached)
        def forward(
            model: Any, input_ids: Tensor | None = None, patch_lengths: Tensor | None = None,
            attention_mask: Tensor | None = None, position_ids: Tensor | None = None, past_key_values: Any = None,
            inputs_embeds: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if past_key_values is not None and not isinstance(past_key_values, BltCache):
                got = type(past_key_values).__name__
                raise TypeError(f"past_key_values: expected a BltCache or None, got {got}")
            blt = None
            if past_key_values is not None or (model.config.use_cache if use_cache is None else use_cache):
                others = {"inputs_embeds": inputs_embeds, "patch_lengths": patch_lengths}
                blt = self.blt(model, past_key_values, use_cache, [k for k, x in others.items() if x is not None])
            if blt is None:
                inputs = {"input_ids": input_ids, "patch_lengths": patch_lengths, "attention_mask": attention_mask,
                          "position_ids": position_ids, "inputs_embeds": inputs_embeds}  # fmt: skip
                return uncached(model, **inputs, use_cache=False, **kwargs)
            if input_ids is None:
                raise ValueError("input_ids: expected ids, got None")
            cache = BltCache() if past_key_values is None else past_key_values
            return self.cached(uncached, model, blt, cache, input_ids, attention_mask, position_ids, **kwargs)

        return forward

    def blt(self, model: Any, cache: BltCache | None, use_cache: bool | None, others: list[str]) -> BLT | None:
        """Return the BLT that computes with a cache. None, which the report explains, if there shall be no cache."""
        reason = None
        if others:
            reason = f"{others[0]} is given"
        elif model.training and any(getattr(model.config, name).dropout for name in _PARTS):
            reason = "dropout"
        elif cache is None and torch.is_grad_enabled():
            if model.training:
                reason = "training"
            elif use_cache is None and any(p.requires_grad for p in model.parameters()):
                reason = "gradients"
        if reason is None:
            try:
                shared = self.shared.setdefault(model, SharedBLT(self.compare))
                return shared.get(model, cache is None or cache.state is None)
            except NotSharedError as error:
                reason = str(error)
        if cache is not None:
            raise ValueError(f"past_key_values: expected None, since there is no cache here, got a BltCache: {reason}")
        self.applied.fell_back(LABEL, reason)
        return None

    @torch.compiler.disable
    def _cached(
        self, uncached: Callable[..., Any], model: Any, blt: BLT, cache: BltCache, input_ids: Tensor,
        attention_mask: Tensor | None, position_ids: Tensor | None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Append the new columns to the cache; return what transformers returns for them."""

        def asked(name: str) -> Any:
            return kwargs.get(name, getattr(model.config, name, False))

        states = _extend(cache, blt, input_ids, attention_mask, position_ids, asked("output_hidden_states"))
        outputs = BaseModelOutputWithPast(last_hidden_state=states[-1], past_key_values=cache)
        if asked("output_hidden_states"):
            outputs.hidden_states = tuple(states)
        if asked("output_attentions"):
            # A state has no weights of attention, so the whole rows are computed once more.
            self.applied.fell_back(LABEL, "output_attentions: the whole text is computed again for them")
            mask = None if cache.mask.all() else cache.mask.long().to(input_ids.device)
            options = {"use_cache": False, "output_attentions": True, "output_hidden_states": False}
            whole = uncached(model, input_ids=cache._columns(), attention_mask=mask, **options)
            outputs.attentions = tuple(weights[:, :, -input_ids.shape[1] :] for weights in whole.attentions)
        wanted = kwargs.get("return_dict", getattr(model.config, "return_dict", True))
        return outputs.to_tuple() if wanted is False else outputs

    def preparation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``BltForCausalLM._prepare_cache_for_generation``, which makes a `BltCache`."""

        @wraps(original)
        def prepare(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
                kind = generation_config.cache_implementation
                if kind not in (None, "dynamic"):
                    raise ValueError(f"cache_implementation: expected None, since BLT has a BltCache, got {kind!r}")
                if self.blt(model.model, None, True, []) is None:
                    generation_config.use_cache = False
                else:
                    model_kwargs["past_key_values"] = BltCache()
                    return None
            return original(model, generation_config, model_kwargs, *args, **kwargs)

        return prepare


@torch.no_grad()
def _extend(
    cache: BltCache, blt: BLT, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None,
    record: bool,
) -> list[Tensor]:  # fmt: skip
    """Append new columns to a cache. Return ``[rows, columns, D]``, 0 for padding: what the head reads.

    With `record`, the states before it that transformers returns come first: those of patcher and decoder.
    """
    rows, count = input_ids.shape
    state = cache._bind(blt, rows)
    new = cache._new_columns(attention_mask, count)
    _check_positions(position_ids, new)
    ids = input_ids if new.all() else input_ids.masked_fill(~new.to(input_ids.device), 0)
    blt.pack(ids, None)  # raises for an id outside the alphabet
    recorded = [*([] if state.patcher is None else [state.patcher.model]), blt.local_decoder] if record else []
    layers = [layer for part in recorded for layer in part.layers]
    before, parts = state.lengths, []
    try:
        with _outputs(layers) as found:
            for begin in range(0, count, _PART):
                mask = new[:, begin : begin + _PART]
                counts = mask.sum(1).tolist()
                whole = sum(counts) == mask.numel()
                part = ids[:, begin : begin + _PART]
                place = mask.to(ids.device)
                last = state.extend_states(part.flatten() if whole else part[place], counts)
                states = [*found[:-1], last]
                found.clear()
                parts.append([x.view(*mask.shape, -1) if whole else _padded(x, place) for x in states])
    except BaseException:  # an interruption, too
        state.truncate(before)
        raise
    cache.mask = torch.cat([cache.mask, new], 1)
    return parts[0] if len(parts) == 1 else [torch.cat(states, 1) for states in zip(*parts, strict=True)]


def _padded(packed: Tensor, place: Tensor) -> Tensor:
    """Return packed states at their places, and 0 elsewhere."""
    out = packed.new_zeros(*place.shape, packed.shape[-1])
    out[place] = packed
    return out


@contextmanager
def _outputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what the first of the layers is given, and what each returns."""
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, args, out: found.append(out)) for layer in layers]
    hooks += [layer.register_forward_pre_hook(lambda _, args: found.append(args[0])) for layer in layers[:1]]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _check_positions(position_ids: Tensor | None, new: Tensor) -> None:
    """Raise unless the bytes of each row follow one another: positions are relative, so any may be the first."""
    if position_ids is None or new.shape[1] < 2:
        return
    offsets = position_ids.cpu().expand(new.shape) - new.cumsum(1)
    low, high = offsets.masked_fill(~new, _FAR).amin(1), offsets.masked_fill(~new, -_FAR).amax(1)
    if (low < high).any():
        raise ValueError("position_ids: expected those of bytes that follow one another, as in attention_mask")
