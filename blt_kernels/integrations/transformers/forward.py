"""The forward of transformers' ``BltModel``: all parts share one layout, and there is no dense mask.

Rows with padding are reordered so that their real ids come first. BLT is causal, so these ids then compute what they
compute alone, whatever follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.integrations._applied import Applied
from blt_kernels.integrations.transformers.masks import CausalMask, CrossMask
from blt_kernels.integrations.transformers.patching import (
    Patches,
    dense_mask,
    has_windows,
    patches_of_entropies,
    patches_of_lengths,
)

LABEL = "BltModel.forward"
_NAMES = (
    "input_ids", "patch_lengths", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Options:
    """Says what a model runs on our ops."""

    applied: Applied
    modeling: Any  # the module of transformers
    attention: bool
    cross_attention: bool
    pooling: bool
    patching: bool
    compare: str
    embed: Callable[..., Tensor]  # compute_hash_embeddings, ours or theirs


def model_forward(options: Options, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of ``BltModel``."""
    modeling, applied = options.modeling, options.applied
    compute = modeling.merge_with_config_defaults(modeling.capture_outputs(_compute(options)))

    @wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        cache = given.pop("cache", None)
        past = given.pop("past_key_values", None)
        reason = _left_to_stock(self, given, cache if past is None else past)
        if reason is not None:
            applied.fell_back(LABEL, reason)
            return stock(self, *args, **kwargs)
        applied.count(LABEL)
        given.pop("use_cache", None)
        order = _real_first(given.pop("attention_mask", None))
        if order is None:
            return compute(self, use_cache=False, **given)
        for name in ("input_ids", "inputs_embeds", "position_ids"):
            if given.get(name) is not None:
                given[name] = _gather(given[name], order)
        return_dict = given.pop("return_dict", getattr(self.config, "return_dict", True))
        outputs = compute(self, use_cache=False, return_dict=True, **given)
        back = order.argsort(-1)
        outputs["last_hidden_state"] = _gather(outputs.last_hidden_state, back)
        if outputs.get("hidden_states") is not None:
            outputs["hidden_states"] = _moved_states(self, outputs.hidden_states, back)
        return outputs if return_dict else outputs.to_tuple()

    return forward


def _left_to_stock(model: Any, given: dict[str, Any], past: Any) -> str | None:
    """Return why a forward is left to transformers, or None."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    mask, config = given.get("attention_mask"), model.config
    data = ids if embeds is None else embeds
    if data is None or (ids is not None and embeds is not None):
        return "input_ids and inputs_embeds are both given, or neither"
    rows, length = data.shape[:2]
    if past is not None or _uses_cache(model, given.get("use_cache")):
        return "a cache"
    if not rows or not length:
        return "no bytes"
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "an attention_mask that is not [B, S]"
    if mask is not None and mask.shape != (rows, length):
        return f"an attention_mask {list(mask.shape)} for {[rows, length]} bytes"
    if given.get("position_ids") is not None and mask is None:
        return "position_ids without an attention_mask, which may pack documents"
    if given.get("is_causal", getattr(config, "is_causal", None)) is False:
        return "is_causal = False"
    if given.get("output_attentions", getattr(config, "output_attentions", False)):
        return "output_attentions"
    if mask is not None and given.get("patch_lengths") is not None and not bool(mask.all()):
        return "patch_lengths of rows with padding"
    return None


def _uses_cache(model: Any, use_cache: bool | None) -> bool:
    """Return whether transformers would make a cache."""
    use_cache = getattr(model.config, "use_cache", None) if use_cache is None else use_cache
    return bool(use_cache) and not (getattr(model, "gradient_checkpointing", False) and model.training)


def _real_first(attention_mask: Tensor | None) -> Tensor | None:
    """Return the order ``[B, S]`` that moves the real ids of each row to its start, or None if they are there."""
    if attention_mask is None:
        return None
    padding = attention_mask == 0
    if _checks.readable(padding) and not bool(padding.any()):
        return None
    return padding.to(torch.uint8).argsort(dim=-1, stable=True)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    order = order.to(x.device)
    if x.dim() == 2:
        return x.expand(order.shape[0], -1).gather(1, order)
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def _moved_states(model: Any, states: tuple[Any, ...], back: Tensor) -> tuple[Any, ...]:
    """Return hidden states with those of bytes in the caller's order of columns. Those of patches stay.

    transformers records the layers of the parts that have "hidden_states" in `_can_record_outputs`, in their order.
    """
    counts = [
        len(part.layers) if "hidden_states" in (part._can_record_outputs or {}) else 0
        for part in (model.global_transformer, model.local_decoder)
    ]
    patches = range(len(states) - sum(counts), len(states) - counts[1])
    return tuple(x if x is None or i in patches else _gather(x, back) for i, x in enumerate(states))


def _compute(options: Options) -> Callable[..., Any]:
    """Return the forward of rows without padding and without a cache."""
    modeling = options.modeling

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        patch_lengths: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        config = self.config
        if inputs_embeds is None:
            embeds = options.embed(
                input_ids,
                self.local_encoder,
                self.encoder_hash_tok_embedding,
                config.encoder_hash_byte_group_nb_functions,
                config.encoder_hash_byte_group_size,
                config.encoder_hash_byte_group_vocab,
            )
        else:
            embeds = inputs_embeds
        rows, length = embeds.shape[:2]
        patches = _patches(options, self, input_ids, patch_lengths, embeds)
        if position_ids is None:
            position_ids = torch.arange(length, device=embeds.device)[None]
        dropout = self.training and has_dropout(config)
        if dropout and (options.attention or options.cross_attention):
            options.applied.fell_back("attention", "dropout")
        mask = _byte_mask(options, config, embeds, dropout)
        encoded, states = self.local_encoder(
            input_ids=input_ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            encoder_attention_mask=_cross_mask(options, config, patches, "encode", embeds, dropout),
            num_patches=patches.slots,
            patch_ids=patches.layout if options.pooling else patches.ids,
            **kwargs,
        )
        states = states.view(rows, patches.slots, -1)
        if options.attention and not dropout:
            global_mask: Any = CausalMask.of(rows, patches.slots, None, states.device)
        else:
            global_mask = dense_mask(modeling, config, None, states)
        outputs = self.global_transformer(
            inputs_embeds=states,
            attention_mask=global_mask,
            position_ids=torch.arange(patches.slots, device=states.device)[None],
            **kwargs,
        )
        decoded = self.local_decoder(
            input_ids=input_ids,
            inputs_embeds=encoded,
            patch_embeds=outputs,
            attention_mask=mask,
            position_ids=position_ids,
            encoder_attention_mask=_cross_mask(options, config, patches, "decode", embeds, dropout),
            **kwargs,
        )
        return modeling.BaseModelOutputWithPast(last_hidden_state=decoded)

    return forward


def has_dropout(config: Any) -> bool:
    """Return whether a BLT has dropout in training."""
    parts = config.encoder_config, config.global_config, config.decoder_config
    return any(part.dropout for part in parts)


def _patches(
    options: Options, model: Any, input_ids: Tensor | None, patch_lengths: Tensor | None, embeds: Tensor
) -> Patches:
    """Return the patches of a batch, by the rules of the configuration."""
    config, (rows, length) = model.config, embeds.shape[:2]
    by_entropy = config.patching_mode == "entropy" and model.patcher is not None
    if patch_lengths is None and by_entropy:
        if input_ids is None:
            raise ValueError("input_ids is required for entropy-based patching")
        if options.patching and config.patch_size is not None:
            entropies, _, _ = model.patcher(input_ids)
            return patches_of_entropies(entropies, config.patching_threshold, config.max_patch_length, options.compare)
        _, patch_lengths, _ = model.patcher(
            input_ids,
            patch_size=config.patch_size,
            threshold=config.patching_threshold,
            max_patch_length=config.max_patch_length,
            patching_batch_size=config.patching_batch_size,
            device=input_ids.device,
        )
    elif patch_lengths is None:
        dtype = embeds.dtype if input_ids is None else input_ids.dtype
        ones = torch.ones((rows, length + 1), dtype=dtype, device=embeds.device)
        patch_lengths = options.modeling.process_patch_lengths(ones, config.max_patch_length)
    return patches_of_lengths(patch_lengths, length)


def _byte_mask(options: Options, config: Any, embeds: Tensor, dropout: bool) -> Any:
    windowed = config.local_attention_window_len is not None and has_windows(options.modeling)
    window = config.encoder_config.sliding_window if windowed else None
    if options.attention and not dropout:
        return CausalMask.of(embeds.shape[0], embeds.shape[1], window, embeds.device)
    return dense_mask(options.modeling, config.encoder_config, window, embeds)


def _cross_mask(options: Options, config: Any, patches: Patches, direction: str, embeds: Tensor, dropout: bool) -> Any:
    if options.cross_attention and not dropout:
        return CrossMask(patches.layout, direction, config.cross_attn_k)
    encode = direction == "encode"
    return options.modeling._prepare_patch_cross_attention_mask(
        patch_ids=patches.ids if encode else patches.decode_ids,
        num_patches=patches.slots,
        sequence_length=embeds.shape[1],
        patches_as_queries=encode,
        cross_attn_k=config.cross_attn_k,
        dtype=embeds.dtype,
    )
