"""What the files of transformers and of facebookresearch/blt mean: configurations and names of parameters.

`blt_kernels.models.checkpoint` says what is read, how, and what is left out.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from blt_kernels.models.blt import BLTConfig
from blt_kernels.models.byte_lm import ByteLMConfig
from blt_kernels.nn import ALPHABET, TransformerConfig


class Values(dict[str, Any]):
    """A JSON object that can name the file it is from."""

    file: Path

    @staticmethod
    def read(file: Path) -> Values:
        return Values.of(file, json.loads(file.read_text()))

    @staticmethod
    def of(file: Path, values: dict[str, Any] | None) -> Values:
        result = Values(values or {})
        result.file = file
        return result

    def inner(self, key: str) -> Values:
        """The object under a key; an empty one if there is none."""
        return Values.of(self.file, self.get(key))

    def expect(self, key: str, expected: object) -> None:
        """Raise ValueError if there is another value under `key`."""
        _expect(f"{self.file}: {key}", expected, self.get(key, expected))

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.file}: {key}: expected a value, found none")


def _expect(what: str, expected: object, got: object) -> None:
    if got != expected:
        raise ValueError(f"{what}: expected {expected!r}, got {got!r}")


def is_blt(values: Values) -> bool:
    """Whether a configuration, of either format, is that of a whole BLT and not of an entropy model."""
    if "model_type" in values:
        return values["model_type"] == "blt"
    return "dim_global" in (values.inner("args") or values.inner("model"))


# --- transformers -----------------------------------------------------------------------------------------------------

# What a key that is missing means: transformers has the values of its 1B model.
_DEFAULTS = {
    "encoder_config": TransformerConfig(1024, 1, 16),
    "global_config": TransformerConfig(2048, 25, 16, ffn_dim=5632),
    "decoder_config": TransformerConfig(1024, 9, 16, ffn_dim=2816),
    "patcher_config": TransformerConfig(768, 14, 12, ffn_dim=2048, rope_theta=10000.0),
}
_THRESHOLD = 1.335442066192627


def transformers_names(name: str) -> list[str]:
    """The name of a parameter of a BLT."""
    return [name if name.startswith("lm_head.") else f"model.{name}"]


def transformers_blt(values: Values) -> BLTConfig:
    """Configuration of a ``BltForCausalLM``."""
    values.expect("tie_word_embeddings", False)
    encoder, decoder = values.inner("encoder_config"), values.inner("decoder_config")
    window = values.get("local_attention_window_len", 512)
    own = values.get("patch_in_forward", True)
    return BLTConfig(
        encoder=TransformerConfig(**_layers(encoder, "encoder_config", window)),
        global_transformer=TransformerConfig(**_layers(values.inner("global_config"), "global_config", None)),
        decoder=TransformerConfig(**_layers(decoder, "decoder_config", window)),
        patcher=transformers_patcher(values) if own else None,
        vocab_size=values.get("vocab_size", ALPHABET),
        queries_per_patch=values.get("cross_attn_k", 2),
        ngram_sizes=tuple(values.get("encoder_hash_byte_group_size") or (3, 4, 5, 6, 7, 8)),
        ngram_vocab=values.get("encoder_hash_byte_group_vocab", 500002),
        num_functions=values.get("encoder_hash_byte_group_nb_functions", 1),
        cross_attn_all_layers_encoder=encoder.get("cross_attn_all_layers", False),
        cross_attn_all_layers_decoder=decoder.get("cross_attn_all_layers", True),
        patching="entropy" if own and values.get("patching_mode", "entropy") == "entropy" else "byte",
        threshold=values.get("patching_threshold", _THRESHOLD),
        max_patch_length=values.get("max_patch_length"),
        split_documents=values.get("split_documents", False),
        pool_every_layer=True,
        cross_attn_grouped_heads=True,
    )


def transformers_patcher(values: Values) -> ByteLMConfig:
    """Configuration of the patcher of a ``BltForCausalLM``."""
    config = transformers_byte_lm(values.inner("patcher_config"))
    return replace(config, threshold=values.get("patching_threshold", _THRESHOLD))


def transformers_byte_lm(values: Values) -> ByteLMConfig:
    """Configuration of a ``BltPatcher``."""
    return ByteLMConfig(
        **_layers(values, "patcher_config", values.get("sliding_window", 512)),
        vocab_size=values.get("vocab_size", ALPHABET),
        threshold=values.get("patching_threshold", _THRESHOLD),
        split_documents=values.get("split_documents", False),
    )


def _layers(values: Values, kind: str, window: int | None) -> dict[str, Any]:
    """Arguments of a `TransformerConfig`."""
    default = _DEFAULTS[kind]
    values.expect("hidden_act", "silu")
    dim = values.get("hidden_size", default.dim)
    heads = values.get("num_attention_heads", default.num_heads)
    kv_heads = values.get("num_key_value_heads") or heads
    return {
        "dim": dim,
        "num_layers": values.get("num_hidden_layers", default.num_layers),
        "num_heads": heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "ffn_dim": values.get("intermediate_size", default.ffn_dim) or int(8 * dim / 3),
        "window": window,
        "norm_eps": values.get("rms_norm_eps", default.norm_eps),
        **rope(values, default.rope_theta),
    }


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope(values: Values, theta: float) -> dict[str, Any]:
    """Rotary positions as arguments of a `TransformerConfig`; `theta` if the file has none."""
    inner = values.inner("rope_parameters") or values.inner("rope_scaling")
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{values.file}: rope_type: expected 'default' or 'llama3', got {kind!r}")
    return {
        "rope_theta": float(inner.get("rope_theta", values.get("rope_theta", theta))),
        "rope_scaling": tuple(float(inner[key]) for key in _LLAMA3) if kind == "llama3" else None,
    }


def transformers_blt_values(config: BLTConfig) -> dict[str, Any]:
    """``config.json`` for a BLT.

    Raises
    ------
    ValueError
        transformers would compute something else; the message names the field.
    """

    def expect(field: str, expected: object, got: object) -> None:
        _expect(f"config.{field}, to be read by transformers", expected, got)

    around = {"encoder": config.encoder, "decoder": config.decoder}
    for name, layers in around.items():
        cross = config.cross_attention(layers)
        expect("cross_attn_heads", layers.num_heads, cross.num_heads)
        if cross.kv_heads != layers.kv_heads:
            expect("cross_attn_grouped_heads", True, config.cross_attn_grouped_heads)
        expect(f"cross_attn_window_{name}", None, getattr(config, f"cross_attn_window_{name}"))
    if config.cross_attn_all_layers_encoder and config.encoder.num_layers > 1:
        expect("pool_every_layer", True, config.pool_every_layer)
    expect("decoder.window", config.encoder.window, config.decoder.window)
    expect("global_transformer.window", None, config.global_transformer.window)
    expect("whole_characters", False, config.whole_characters)
    if config.patching != "byte":
        expect("patching", "entropy", config.patching)
        expect("monotonic", False, config.monotonic)
        expect("threshold_add", None, config.threshold_add)
        expect("reset_at_newlines", False, config.reset_at_newlines)
        if config.patcher is None:
            raise ValueError("config.patcher: expected one, since transformers patches by byte without, got None")
        expect("patcher.reset_at_newlines", False, config.patcher.reset_at_newlines)

    shared = {
        "vocab_size": config.vocab_size,
        "cross_attn_k": config.queries_per_patch,
        "hidden_size_global": config.global_transformer.dim,
    }
    nested = {f"{name}_config": {**_layer_values(layers), **shared} for name, layers in around.items()}
    nested["encoder_config"]["cross_attn_all_layers"] = config.cross_attn_all_layers_encoder
    nested["decoder_config"]["cross_attn_all_layers"] = config.cross_attn_all_layers_decoder
    if config.patcher is not None:
        nested["patcher_config"] = transformers_byte_lm_values(config.patcher)
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": config.vocab_size,
        "cross_attn_k": config.queries_per_patch,
        "encoder_hash_byte_group_size": list(config.ngram_sizes),
        "encoder_hash_byte_group_vocab": config.ngram_vocab,
        "encoder_hash_byte_group_nb_functions": config.num_functions,
        "local_attention_window_len": config.encoder.window,
        "patch_in_forward": config.patcher is not None,
        "patching_mode": config.patching,
        "patching_threshold": config.threshold,
        "max_patch_length": config.max_patch_length,
        "split_documents": config.split_documents,
        "global_config": _layer_values(config.global_transformer),
        **nested,
    }


def transformers_byte_lm_values(config: ByteLMConfig) -> dict[str, Any]:
    """Configuration for a ``BltPatcher``, whose threshold is that of its BLT.

    Raises
    ------
    ValueError
        transformers would compute something else; the message names the field.
    """
    _expect("config.reset_at_newlines, to be read by transformers", False, config.reset_at_newlines)
    own = {"vocab_size": config.vocab_size, "sliding_window": config.window, "split_documents": config.split_documents}
    return {**_layer_values(config), **own}


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


# --- facebookresearch/blt ---------------------------------------------------------------------------------------------

_BYTELATENT = {
    "self_attn": "attention",
    "mlp": "feed_forward",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_norm": "cross_attn_norm_q",
    "k_norm": "cross_attn_norm_kv",
    "embed_tokens": "tok_embeddings",
}


def bytelatent_names(name: str, tables: int = 0) -> list[str]:
    """The names of a parameter: of a BLT with so many hash tables, or of an entropy model."""
    if name == "lm_head.weight":
        return ["local_decoder.output.weight" if tables else "output.weight"]
    if name == "encoder_hash_tok_embedding.weight":
        return [f"encoder_hash_tok_embedding.{i}.weight" for i in range(tables)]
    return [".".join(_BYTELATENT.get(part, part) for part in name.split("."))]


def bytelatent_blt(values: Values, training: Values) -> BLTConfig:
    """Configuration, without patcher, of a ``ByteLatentTransformer``."""
    args, rules = values.inner("args") or values.inner("model"), training.inner("data").inner("patcher_args")
    local, window = args["dim_local_encoder"], args["local_attention_window_len"]
    for key in ("cross_attn_encoder", "cross_attn_decoder", "cross_attn_init_by_pooling", "use_rope"):
        args.expect(key, True)
    args.expect("downsampling_by_pooling", "max")
    args.expect("encoder_enable_byte_ngrams", False)
    args.expect("head_dim", None)
    args.expect("pm_size", 0)
    args.expect("dim_local_decoder", local)
    if args.get("dim_token") is not None:
        args.expect("dim_token", local)
    sizes = args["encoder_hash_byte_group_size"]
    if isinstance(sizes, str):
        sizes = [int(size) for size in sizes.split(",") if size]

    mode = rules.get("patching_mode", args.get("patching_mode"))
    if mode not in ("entropy", "space", "byte", "bpe"):
        expected = "'entropy', 'space', 'byte' or 'bpe'"
        raise ValueError(f"{training.file}: patching_mode: expected {expected}, got {mode!r}")
    threshold = rules.get("threshold", args.get("patching_threshold"))

    def layers(dim: int, name: str, kv_heads: int | None, window: int | None) -> TransformerConfig:
        sizes = (dim, args[f"n_layers_{name}"], args[f"n_heads_{name}"], kv_heads)
        return TransformerConfig(**_bytelatent_layers(args, *sizes, window))

    return BLTConfig(
        encoder=layers(local, "local_encoder", args.get("n_kv_heads"), window),
        global_transformer=layers(args["dim_global"], "global", args.get("n_kv_heads_global"), None),
        decoder=layers(local, "local_decoder", args.get("n_kv_heads"), window),
        patcher=None,
        vocab_size=args["vocab_size"],
        queries_per_patch=args["cross_attn_k"],
        ngram_sizes=tuple(sizes),
        ngram_vocab=args["encoder_hash_byte_group_vocab"],
        num_functions=args["encoder_hash_byte_group_nb_functions"],
        cross_attn_all_layers_encoder=args.get("cross_attn_all_layers_encoder", False),
        cross_attn_all_layers_decoder=args.get("cross_attn_all_layers_decoder", False),
        cross_attn_heads=args["cross_attn_nheads"],
        cross_attn_window_encoder=args.get("cross_attn_window_encoder"),
        cross_attn_window_decoder=args.get("cross_attn_window_decoder"),
        patching=mode,
        threshold=_THRESHOLD if threshold is None else threshold,
        threshold_add=rules.get("threshold_add", args.get("patching_threshold_add")),
        monotonic=rules.get("monotonicity", args.get("monotonicity", False)),
        max_patch_length=rules.get("max_patch_length", args.get("max_patch_length")),
        split_documents=True,
    )


def bytelatent_byte_lm(values: Values) -> ByteLMConfig:
    """Configuration of an ``LMTransformer``, the entropy model."""
    args, sizes = values.inner("args"), values.inner("entropy_model")
    if sizes:
        read = {key: sizes[key] for key in ("dim", "n_layers", "n_heads", "vocab_size", "ffn_dim_multiplier")}
        args = Values.of(values.file, {**read, "sliding_window": 512})
    if not args or "dim_global" in args:
        raise ValueError(f"{values.file}: expected the arguments of an entropy model, got {', '.join(args or values)}")
    shape = (args["dim"], args["n_layers"], args["n_heads"], args.get("n_kv_heads"))
    layers = _bytelatent_layers(args, *shape, args["sliding_window"])
    return ByteLMConfig(**layers, vocab_size=args["vocab_size"], split_documents=True)


def _bytelatent_layers(
    args: Values, dim: int, num_layers: int, num_heads: int, kv_heads: int | None, window: int | None
) -> dict[str, Any]:
    """Arguments of a `TransformerConfig`."""
    multiplier, multiple = args.get("ffn_dim_multiplier"), args.get("multiple_of", 256)
    ffn_dim = int((1.0 if multiplier is None else multiplier) * int(8 * dim / 3))
    return {
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": kv_heads,
        "ffn_dim": multiple * math.ceil(ffn_dim / multiple),
        "window": window,
        "rope_theta": args.get("rope_theta", 10000.0),
        "norm_eps": args.get("norm_eps", 1e-5),
    }
