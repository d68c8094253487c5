"""The forward of transformers' ``BltModel`` with a `BltCache`, and without one where there can be none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from blt_kernels.integrations._applied import Applied
from blt_kernels.integrations.transformers.cache import BltCache
from blt_kernels.integrations.transformers.forward import has_dropout
from blt_kernels.integrations.transformers.shared import NotSharedError, SharedBLT
from blt_kernels.models import BLT

LABEL, PREPARATION = "BltCache", "BltForCausalLM._prepare_cache_for_generation"  # in reports
_PART = 4096  # columns that a long prompt is read by, so that memory stays bounded
_FAR = 1 << 40  # larger than any position
_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"  # before 5.24


class Caching:
    """Makes the two functions of transformers that handle the cache.

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
        self.lock = Lock()  # threads that generate share the BLT of their model
        self.cached = applied.counted(LABEL, self._cached)

    def forward(self, uncached: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``BltModel.forward``: with a cache where one is asked for, and else `uncached`."""

        @wraps(uncached)
        def forward(
            model: Any, input_ids: Tensor | None = None, patch_lengths: Tensor | None = None,
            attention_mask: Tensor | None = None, position_ids: Tensor | None = None, past_key_values: Any = None,
            inputs_embeds: Tensor | None = None, use_cache: bool | None = None, cache: Any = None, **kwargs: Any,
        ) -> Any:  # fmt: skip
            held = past_key_values if cache is None else cache
            if held is not None and not isinstance(held, BltCache):
                raise TypeError(f"{_NAME}: expected a BltCache or None, got {type(held).__name__}")
            inputs = {"input_ids": input_ids, "patch_lengths": patch_lengths, "attention_mask": attention_mask,
                      "position_ids": position_ids, "inputs_embeds": inputs_embeds}  # fmt: skip
            wanted = held is not None or (model.config.use_cache if use_cache is None else use_cache)
            blt = self.blt(model, held, use_cache, {**kwargs, **inputs}) if wanted else None
            if blt is None:
                return uncached(model, **inputs, use_cache=False, **kwargs)
            held = BltCache() if held is None else held
            return self.cached(uncached, model, blt, held, input_ids, attention_mask, **kwargs)

        return forward

    def blt(self, model: Any, cache: BltCache | None, use_cache: bool | None, inputs: dict[str, Any]) -> BLT | None:
        """Return the BLT that computes with a cache. None, which the report explains, if there shall be no cache."""
        reason = _other_inputs(model, inputs)
        if reason is None and model.training and has_dropout(model.config):
            reason = "dropout"
        elif reason is None and cache is None and torch.is_grad_enabled():
            if model.training:
                reason = "training"
            elif use_cache is None and any(p.requires_grad for p in model.parameters()):
                reason = "gradients"
        if reason is None and cache is None and use_cache is None and torch.compiler.is_compiling():
            reason = "torch.compile"  # a cache would break the graph
        if reason is None:
            found = self._shared(model, cache is None or cache.state is None)
            if isinstance(found, BLT):
                return found
            reason = found
        if cache is not None:
            raise ValueError(f"{_NAME}: expected None, since no cache can be used here, got a BltCache: {reason}")
        self.applied.fell_back(LABEL, reason)
        return None

    @torch.compiler.disable
    def _shared(self, model: Any, begins: bool) -> BLT | str:
        """Return the BLT of the parameters of `model`, or why there is none."""
        try:
            with self.lock:
                return self.shared.setdefault(model, SharedBLT(self.compare)).get(model, begins)
        except NotSharedError as error:
            return str(error)

    @torch.compiler.disable
    def _cached(
        self, uncached: Callable[..., Any], model: Any, blt: BLT, cache: BltCache, input_ids: Tensor,
        attention_mask: Tensor | None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Append the new columns to the cache; return what transformers returns for them."""

        def asked(name: str) -> Any:
            return kwargs.get(name, getattr(model.config, name, False))

        states = _extend(cache, blt, input_ids, attention_mask, asked("output_hidden_states"))
        if torch.is_grad_enabled():
            states[-1] = _NoGradient.apply(states[-1], torch.empty(0, requires_grad=True))
        outputs = BaseModelOutputWithPast(last_hidden_state=states[-1])
        outputs[_NAME] = cache
        if asked("output_hidden_states"):
            outputs.hidden_states = tuple(states)
        if asked("output_attentions"):
            # A state has no weights of attention, so the whole rows are computed once more.
            self.applied.fell_back(LABEL, "output_attentions: the whole text is computed again for them")
            mask = None if cache.mask.all() else cache.mask.long().to(input_ids.device)
            options = {"use_cache": False, "output_attentions": True, "output_hidden_states": False}
            whole = uncached(model, input_ids=cache.columns(), attention_mask=mask, **options)
            outputs.attentions = tuple(weights[:, :, -input_ids.shape[1] :] for weights in whole.attentions)
        wanted = kwargs.get("return_dict", getattr(model.config, "return_dict", True))
        return outputs.to_tuple() if wanted is False else outputs

    def preparation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``BltForCausalLM._prepare_cache_for_generation``, which makes a `BltCache`."""

        @wraps(original)
        def prepare(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    "inputs_embeds: expected input_ids instead in generate() of a BLT: each step makes patches and "
                    "n-grams of ids; only the model itself takes inputs_embeds, with use_cache=False"
                )
            if model_kwargs.get(_NAME) is None and generation_config.use_cache is not False:
                kind = generation_config.cache_implementation
                if kind not in (None, "dynamic"):
                    raise ValueError(f"cache_implementation: expected None, since BLT has a BltCache, got {kind!r}")
                if self.blt(model.model, None, True, {}) is None:
                    generation_config.use_cache = False
                else:
                    self.applied.count(PREPARATION)
                    model_kwargs[_NAME] = BltCache()
                    return None
            return original(model, generation_config, model_kwargs, *args, **kwargs)

        return prepare


class _NoGradient(torch.autograd.Function):
    """Refuses a backward pass, which would give a gradient to the head alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("use_cache: expected False for gradients, since a BltCache keeps none, got a BltCache")


def _other_inputs(model: Any, inputs: dict[str, Any]) -> str | None:
    """Return why inputs are not ids of rows, as a cache takes them, or None."""
    for name in ("inputs_embeds", "patch_lengths"):
        if inputs.get(name) is not None:
            return f"{name} is given"
    if inputs.get("is_causal", getattr(model.config, "is_causal", None)) is False:
        return "is_causal = False"
    ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if ids is None or not ids.numel():
        return None if not inputs else "no bytes"
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "an attention_mask that is not [B, S]"
    if positions is not None and ids.shape[1] > 1 and not _follow_one_another(positions, mask):
        return "position_ids that do not follow one another"
    return None


def _follow_one_another(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Return whether positions rise by 1 from each column of a row that is not masked to the next such column."""
    if attention_mask is None:
        return bool((position_ids.diff(dim=-1) == 1).all())
    new = attention_mask[:, -position_ids.shape[-1] :].bool()
    offsets = position_ids.expand(new.shape) - new.cumsum(1)
    low, high = offsets.masked_fill(~new, _FAR).amin(1), offsets.masked_fill(~new, -_FAR).amax(1)
    return bool((low >= high).all())


@torch.no_grad()
def _extend(cache: BltCache, blt: BLT, input_ids: Tensor, attention_mask: Tensor | None, record: bool) -> list[Tensor]:
    """Append new columns to a cache. Return ``[rows, columns, D]``, 0 for padding: what the head reads.

    With `record`, the states before it that transformers returns come first: those of patcher and decoder.
    """
    rows, count = input_ids.shape
    state = cache.bind(blt, rows)
    new = cache.new_columns(attention_mask, count)
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
    """Collect what the first of the layers is given, and what each returns, in this thread."""
    found: list[Tensor] = []
    thread = get_ident()

    def keep(x: Tensor) -> None:
        if get_ident() == thread:
            found.append(x)

    hooks = [layer.register_forward_hook(lambda _, args, out: keep(out)) for layer in layers]
    hooks += [layer.register_forward_pre_hook(lambda _, args: keep(args[0])) for layer in layers[:1]]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
