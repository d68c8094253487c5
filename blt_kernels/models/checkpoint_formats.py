"""What the files of transformers and of facebookresearch/blt mean: configurations and names of parameters.

`blt_kernels.models.checkpoint` says what is read, how, and what is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from blt_kernels.ids import EOS
from blt_kernels.models import checkpoint_fields as fields
from blt_kernels.models.blt import BLTConfig
from blt_kernels.models.byte_lm import ByteLMConfig
from blt_kernels.models.checkpoint_fields import Values
from blt_kernels.nn import TransformerConfig


def _expect(what: str, expected: object, got: object) -> None:
    if got != expected:
        raise ValueError(f"{what}: expected {expected!r}, got {got!r}")


def is_blt(values: Values) -> bool:
    """Whether a configuration, of either format, is that of a whole BLT and not of an entropy model."""
    if "model_type" in values:
        return values["model_type"] == "blt"
    if "args" in values:
        return "dim_global" in values.inner("args")
    entropy_model = values.get("train_entropy_model", bool(values.inner("entropy_model")))
    return bool(values.inner("model")) and not entropy_model


# --- transformers -----------------------------------------------------------------------------------------------------


def transformers_names(name: str) -> list[str]:
    """The name of a parameter of a BLT."""
    return [name if name.startswith("lm_head.") else f"model.{name}"]


def transformers_blt(values: Values) -> BLTConfig:
    """Configuration of a ``BltForCausalLM``."""
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
        patcher=transformers_patcher(values) if whole["patch_in_forward"] else None,
        vocab_size=whole["vocab_size"],
        queries_per_patch=whole["cross_attn_k"],
        ngram_sizes=tuple(whole["encoder_hash_byte_group_size"] or (3, 4, 5, 6, 7, 8)),
        ngram_vocab=whole["encoder_hash_byte_group_vocab"],
        num_functions=whole["encoder_hash_byte_group_nb_functions"],
        cross_attn_all_layers_encoder=bool(encoder["cross_attn_all_layers"]),
        cross_attn_all_layers_decoder=bool(decoder["cross_attn_all_layers"]),
        patching="entropy" if entropy else "byte",
        threshold=whole["patching_threshold"],
        max_patch_length=whole["max_patch_length"],
        split_documents=whole["split_documents"],
        global_across_documents=whole["global_across_documents"],
        eos_id=whole["eos_id"],
        pool_every_layer=True,
        cross_attn_grouped_heads=True,
    )


def transformers_patcher(values: Values) -> ByteLMConfig:
    """Configuration of the patcher of a ``BltForCausalLM``."""
    config = transformers_byte_lm(values.inner("patcher_config"))
    return replace(config, threshold=fields.BLT_CONFIG.take(values)["patching_threshold"])


def transformers_byte_lm(values: Values) -> ByteLMConfig:
    """Configuration of a ``BltPatcher``."""
    taken = fields.PATCHER_CONFIG.take(values)
    return taken.build(
        ByteLMConfig,
        **vars(_layers(taken, taken["sliding_window"])),
        vocab_size=taken["vocab_size"],
        threshold=taken["patching_threshold"],
        split_documents=taken["split_documents"],
        eos_id=taken["eos_id"],
    )


def llama(values: Values) -> TransformerConfig:
    """Configuration of the layers of a ``LlamaForCausalLM``."""
    values.expect("model_type", "llama")
    return _layers(fields.LLAMA_CONFIG.take(values), None)


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _layers(values: Values, window: int | None) -> TransformerConfig:
    """A stack of layers from the fields of its class."""
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values["num_key_value_heads"] or heads
    if values["hidden_act"] not in ("silu", "swish"):
        raise values.error("hidden_act", "'silu'")
    if values["head_dim"] is not None and heads > 0:
        values.expect("head_dim", dim // heads)
    rope = fields.ROPE_PARAMETERS.take(values.inner("rope_scaling") or values.inner("rope_parameters"))
    kind = rope["rope_type"] or rope["type"] or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"{rope}: rope_type: expected 'default' or 'llama3', got {kind!r}")
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
        "global_across_documents": config.global_across_documents,
        "eos_id": config.eos_id,
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
    if not is_blt(values):
        raise ValueError(f"{values.file}: expected the arguments of a BLT, got {', '.join(values)}")
    args = fields.BYTE_LATENT_TRANSFORMER_ARGS.take(values.inner("args") or values.inner("model"))
    local, window = args["dim_local_encoder"], args["local_attention_window_len"]
    args.expect("dim_local_decoder", local)
    if args["dim_token"] is not None:
        args.expect("dim_token", local)
    elif args["patch_size"] and not args["use_local_encoder_transformer"]:  # the width of a byte is then a share
        width = int(args["dim_global"] // args["patch_size"])
        if width != local:
            raise args.error("use_local_encoder_transformer", f"True, since dim_global / patch_size is not {local}")
    if args["dim_global"] == local:
        raise args.error("dim_global", "another width than dim_local_decoder, for which patches have no projection")
    for key in ("cross_attn_k", "cross_attn_nheads", "encoder_hash_byte_group_size"):
        if args[key] is None:
            raise args.error(key, "a value")
    sizes = args["encoder_hash_byte_group_size"]
    if isinstance(sizes, str):
        if re.fullmatch(r"[\d, ]*", sizes) is None:
            raise args.error("encoder_hash_byte_group_size", "numbers between commas")
        sizes = [int(size) for size in sizes.replace(" ", "").split(",") if size]

    # Which entries attention reaches, by `create_causal_mask` of that repository. Its "sdpa" has no mask but "causal"
    # and raises for any other; that is taken as the mask that is asked for.
    across = args["attn_bias_type"] != "block_causal"
    if args["attn_impl"] == "flex_attention":
        window, split = None, False
    else:
        _expect_masks(args, (None, "causal", "block_causal"))
        split = True
        if window is None:
            raise args.error("local_attention_window_len", "a window")
        if args["eos_id"] is None or (args["eos_id"] == 0 and not across):
            raise args.error("eos_id", "an id, and with attn_bias_type 'block_causal' not 0")
        # The global transformer is given EOS where a patch holds EOS, and 0 elsewhere, and looks for `eos_id` in there.
        across = across or args["eos_id"] != EOS
    rules = _bytelatent_rules(args, training)

    def layers(dim: int, name: str, kv_heads: int | None, window: int | None) -> TransformerConfig:
        return _bytelatent_layers(args, dim, args[f"n_layers_{name}"], args[f"n_heads_{name}"], kv_heads, window)

    return args.build(
        BLTConfig,
        encoder=layers(local, "local_encoder", args["n_kv_heads"], window),
        global_transformer=layers(args["dim_global"], "global", args["n_kv_heads_global"], None),
        decoder=layers(local, "local_decoder", args["n_kv_heads"], window),
        patcher=None,
        vocab_size=args["vocab_size"] + args["pm_size"],
        queries_per_patch=args["cross_attn_k"],
        ngram_sizes=tuple(sizes),
        ngram_vocab=args["encoder_hash_byte_group_vocab"],
        num_functions=args["encoder_hash_byte_group_nb_functions"],
        cross_attn_all_layers_encoder=args["cross_attn_all_layers_encoder"],
        cross_attn_all_layers_decoder=args["cross_attn_all_layers_decoder"],
        cross_attn_heads=args["cross_attn_nheads"],
        cross_attn_window_encoder=args["cross_attn_window_encoder"],
        cross_attn_window_decoder=args["cross_attn_window_decoder"],
        split_documents=split,
        global_across_documents=split and across,
        eos_id=args["eos_id"] if split else EOS,
        **rules,
    )


def _bytelatent_rules(args: Values, training: Values) -> dict[str, Any]:
    """The patching rule as arguments of a `BLTConfig`: of the training arguments, if there are, or of the model's."""
    if args["patching_mode"] == "":
        raise args.error("patching_mode", "a mode, since without one rows begin with ids that no patch counts")
    data = training.inner("data")
    if data.get("patcher_args") is not None:
        rules = fields.PATCHER_ARGS.take(data.inner("patcher_args"))
        threshold, threshold_add = rules["threshold"], rules["threshold_add"]
    else:
        rules, threshold, threshold_add = args, args["patching_threshold"], args["patching_threshold_add"]
    if rules["patching_mode"] not in ("entropy", "space", "byte", "bpe"):
        raise rules.error("patching_mode", "'entropy', 'space', 'byte' or 'bpe'")
    return {
        "patching": rules["patching_mode"],
        "threshold": fields.PATCHER_ARGS.read["threshold"][1] if threshold is None else threshold,
        "threshold_add": threshold_add,
        "monotonic": rules["monotonicity"],
        "max_patch_length": rules["max_patch_length"],
    }


def bytelatent_byte_lm(values: Values) -> ByteLMConfig:
    """Configuration of an ``LMTransformer``, the entropy model."""
    args, sizes = values.inner("args"), values.inner("entropy_model")
    if sizes:  # `load_entropy_model` reads these alone, and the rest is always the same
        read = {key: sizes[key] for key in ("dim", "n_layers", "n_heads", "vocab_size", "ffn_dim_multiplier")}
        masks = {"sliding_window": 512, "attn_bias_type": "local_block_causal", "attn_impl": "xformers"}
        args = Values.of(values.file, "entropy_model", {**read, **masks})
    if not args or "dim_global" in args:
        raise ValueError(f"{values.file}: expected the arguments of an entropy model, got {', '.join(args or values)}")
    args = fields.LM_TRANSFORMER_ARGS.take(args)
    if args["n_heads"] is None:
        raise args.error("n_heads", "a value")

    bias, window = args["attn_bias_type"], args["sliding_window"]
    split = bias in ("block_causal", "local_block_causal")
    if args["attn_impl"] == "flex_attention":
        window, split = None, False
    else:
        _expect_masks(args, (None, "causal", "block_causal", "local_block_causal"))
        if bias is None:
            window = None  # that code ignores it
        elif (window is None) == (bias == "local_block_causal"):
            expected = "a window" if window is None else "None"
            raise args.error("sliding_window", f"{expected}, since attn_bias_type is {bias!r}")
        if split and args["eos_id"] is None:
            raise args.error("eos_id", "an id")
    layers = _bytelatent_layers(args, args["dim"], args["n_layers"], args["n_heads"], args["n_kv_heads"], window)
    return args.build(
        ByteLMConfig,
        **vars(layers),
        vocab_size=args["vocab_size"],
        split_documents=split,
        eos_id=args["eos_id"] if split else EOS,
    )


def _expect_masks(args: Values, biases: Sequence[str | None]) -> None:
    if args["attn_impl"] not in ("xformers", "sdpa"):
        raise args.error("attn_impl", "'xformers', 'sdpa' or 'flex_attention'")
    if args["attn_bias_type"] not in biases:
        raise args.error("attn_bias_type", f"one of {', '.join(map(repr, biases))}")


def _bytelatent_layers(
    args: Values, dim: int, num_layers: int, num_heads: int, kv_heads: int | None, window: int | None
) -> TransformerConfig:
    if args["head_dim"] and num_heads > 0:
        args.expect("head_dim", dim // num_heads)
    multiplier, multiple = args["ffn_dim_multiplier"], args["multiple_of"]
    if multiple < 1:
        raise args.error("multiple_of", "a value >= 1")
    ffn_dim = int((1.0 if multiplier is None else multiplier) * int(8 * dim / 3))
    return args.build(
        TransformerConfig,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=kv_heads or None,
        ffn_dim=multiple * math.ceil(ffn_dim / multiple),
        window=window,
        rope_theta=args["rope_theta"],
        norm_eps=args["norm_eps"],
    )
