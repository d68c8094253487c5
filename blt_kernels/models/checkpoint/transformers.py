"""Translates configurations and names of parameters from and to the files of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blt_kernels._files import shortened
from blt_kernels.models.checkpoint import transformers_fields as fields
from blt_kernels.models.checkpoint.fields import Values
from blt_kernels.models.config import BLTConfig, ByteLMConfig
from blt_kernels.nn import TransformerConfig

# These fields of `BLTConfig` have the same values under other names in transformers.
_BLT_FIELDS = {
    "vocab_size": "vocab_size",
    "queries_per_patch": "cross_attn_k",
    "ngram_vocab": "encoder_hash_byte_group_vocab",
    "num_functions": "encoder_hash_byte_group_nb_functions",
    "threshold": "patching_threshold",
    "max_patch_length": "max_patch_length",
    "split_documents": "split_documents",
    "global_across_documents": "global_across_documents",
    "eos_id": "eos_id",
}


def names_of(name: str) -> list[str]:
    """Return the name of a parameter of a BLT, as a list of one."""
    return [name if name.startswith("lm_head.") else f"model.{name}"]


def read_blt(values: Values) -> BLTConfig:
    """Return the configuration of a ``BltForCausalLM``."""
    whole = fields.BLT_CONFIG.take(values)
    encoder = fields.ENCODER_CONFIG.take(whole.inner("encoder_config"))
    decoder = fields.DECODER_CONFIG.take(whole.inner("decoder_config"))
    layers = fields.GLOBAL_CONFIG.take(whole.inner("global_config"))
    encoder.expect("vocab_size", whole["vocab_size"])
    encoder.expect("cross_attn_k", whole["cross_attn_k"])
    decoder.expect("cross_attn_k", whole["cross_attn_k"])
    decoder.expect("hidden_size_global", layers["hidden_size"])
    entropy = whole["patch_in_forward"] and whole["patching_mode"] == "entropy"
    if entropy and whole["patch_size"] is None:
        raise whole.error("patch_size", "a number, without which transformers patches by byte")
    window = whole["local_attention_window_len"]
    return whole.build(
        BLTConfig,
        encoder=_layers(encoder, window),
        global_transformer=_layers(layers, None),
        decoder=_layers(decoder, window),
        patcher=read_patcher(values) if whole["patch_in_forward"] else None,
        ngram_sizes=tuple(whole["encoder_hash_byte_group_size"] or (3, 4, 5, 6, 7, 8)),
        cross_attn_all_layers_encoder=bool(encoder["cross_attn_all_layers"]),
        cross_attn_all_layers_decoder=bool(decoder["cross_attn_all_layers"]),
        patching="entropy" if entropy else "byte",
        pool_every_layer=True,
        cross_attn_grouped_heads=True,
        **{own: whole[theirs] for own, theirs in _BLT_FIELDS.items()},
    )


def read_patcher(values: Values) -> ByteLMConfig:
    """Return the configuration of the patcher of a ``BltForCausalLM``."""
    config = read_byte_lm(values.inner("patcher_config"))
    return replace(config, threshold=fields.BLT_CONFIG.take(values)["patching_threshold"])


def read_byte_lm(values: Values) -> ByteLMConfig:
    """Return the configuration of a ``BltPatcher``."""
    taken = fields.PATCHER_CONFIG.take(values)
    return taken.build(
        ByteLMConfig,
        **vars(_layers(taken, taken["sliding_window"])),
        vocab_size=taken["vocab_size"],
        threshold=taken["patching_threshold"],
        split_documents=taken["split_documents"],
        eos_id=taken["eos_id"],
    )


def read_llama(values: Values) -> TransformerConfig:
    """Return the configuration of the layers of a ``LlamaForCausalLM``."""
    values.expect("model_type", "llama")
    return _layers(fields.LLAMA_CONFIG.take(values), None)


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _layers(values: Values, window: int | None) -> TransformerConfig:
    """Return the configuration of a stack of layers from the fields of its class."""
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values["num_key_value_heads"] or heads
    if values["hidden_act"] not in ("silu", "swish"):
        raise values.error("hidden_act", "'silu'")
    if values["head_dim"] is not None and heads > 0:
        values.expect("head_dim", dim // heads)
    rope = fields.ROPE_PARAMETERS.take(values.inner("rope_scaling") or values.inner("rope_parameters"))
    kind = rope["rope_type"] or rope["type"] or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"{rope}: rope_type: expected 'default' or 'llama3', got {shortened(kind)}")
    for of in (rope, values):
        if of["partial_rotary_factor"] is not None:
            of.expect("partial_rotary_factor", 1)
    scaling = None
    if kind == "llama3":
        rope["original_max_position_embeddings"] = (
            rope["original_max_position_embeddings"] or values["max_position_embeddings"]
        )
        for key in _LLAMA3:
            if rope[key] is None:
                raise rope.error(key, "a number")
        scaling = tuple(float(rope[key]) for key in _LLAMA3)
    return values.build(
        TransformerConfig,
        dim=dim,
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        ffn_dim=values["intermediate_size"] or int(8 * dim / 3),
        window=window,
        norm_eps=values["rms_norm_eps"],
        rope_theta=float(values["rope_theta"] if rope["rope_theta"] is None else rope["rope_theta"]),
        rope_scaling=scaling,
    )


def write_blt(config: BLTConfig) -> dict[str, Any]:
    """Return ``config.json`` for a BLT.

    Raises
    ------
    ValueError
        transformers would compute something else; the message names the field.
    """
    around = {"encoder": config.encoder, "decoder": config.decoder}
    for name, layers in around.items():
        cross = config.cross_attention(layers)
        _expect("cross_attn_heads", layers.num_heads, cross.num_heads)
        if cross.kv_heads != layers.kv_heads:
            _expect("cross_attn_grouped_heads", True, config.cross_attn_grouped_heads)
        _expect(f"cross_attn_window_{name}", None, getattr(config, f"cross_attn_window_{name}"))
    if config.cross_attn_all_layers_encoder and config.encoder.num_layers > 1:
        _expect("pool_every_layer", True, config.pool_every_layer)
    _expect("decoder.window", config.encoder.window, config.decoder.window)
    _expect("global_transformer.window", None, config.global_transformer.window)
    _expect("whole_characters", False, config.whole_characters)
    if config.patching != "byte":
        _expect("patching", "entropy", config.patching)
        _expect("monotonic", False, config.monotonic)
        _expect("threshold_add", None, config.threshold_add)
        _expect("reset_at_newlines", False, config.reset_at_newlines)
        if config.patcher is None:
            raise ValueError("config.patcher: expected one, since transformers patches by byte without, got None")
        _expect("patcher.reset_at_newlines", False, config.patcher.reset_at_newlines)

    shared = {
        "vocab_size": config.vocab_size,
        "cross_attn_k": config.queries_per_patch,
        "hidden_size_global": config.global_transformer.dim,
    }
    nested = {f"{name}_config": {**_layer_values(layers), **shared} for name, layers in around.items()}
    nested["encoder_config"]["cross_attn_all_layers"] = config.cross_attn_all_layers_encoder
    nested["decoder_config"]["cross_attn_all_layers"] = config.cross_attn_all_layers_decoder
    if config.patcher is not None:
        nested["patcher_config"] = write_byte_lm(config.patcher)
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "encoder_hash_byte_group_size": list(config.ngram_sizes),
        "local_attention_window_len": config.encoder.window,
        "patch_in_forward": config.patcher is not None,
        "patching_mode": config.patching,
        "global_config": _layer_values(config.global_transformer),
        **{theirs: getattr(config, own) for own, theirs in _BLT_FIELDS.items()},
        **nested,
    }


def write_byte_lm(config: ByteLMConfig) -> dict[str, Any]:
    """Return the configuration for a ``BltPatcher``, whose threshold is that of its BLT.

    Raises
    ------
    ValueError
        transformers would compute something else; the message names the field.
    """
    _expect("reset_at_newlines", False, config.reset_at_newlines)
    own = {"vocab_size": config.vocab_size, "sliding_window": config.window}
    documents = {"split_documents": config.split_documents, "eos_id": config.eos_id}
    return {**_layer_values(config), **own, **documents}


def _layer_values(config: TransformerConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dict(zip(_LLAMA3, config.rope_scaling, strict=True))}
        rope[_LLAMA3[-1]] = int(rope[_LLAMA3[-1]])
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.hidden_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
    }


def _expect(field: str, expected: object, got: object) -> None:
    if got != expected:
        raise ValueError(f"config.{field}, to be read by transformers: expected {expected!r}, got {got!r}")
