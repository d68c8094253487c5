"""Translates configurations and names of parameters from the files of facebookresearch/blt."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from blt_kernels._files import shortened
from blt_kernels.ids import EOS
from blt_kernels.models.checkpoint import bytelatent_fields as fields
from blt_kernels.models.checkpoint.fields import Values
from blt_kernels.models.config import BLTConfig, ByteLMConfig
from blt_kernels.nn import TransformerConfig

_NAMES = {
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


def names_of(name: str, tables: int = 0) -> list[str]:
    """Return the names of a parameter: of a BLT with so many hash tables, or of an entropy model."""
    if name == "lm_head.weight":
        return ["local_decoder.output.weight" if tables else "output.weight"]
    if name == "encoder_hash_tok_embedding.weight":
        return [f"encoder_hash_tok_embedding.{i}.weight" for i in range(tables)]
    return [".".join(_NAMES.get(part, part) for part in name.split("."))]


def is_blt(values: Values) -> bool:
    """Return whether a configuration is that of a whole BLT, and not of an entropy model."""
    if "args" in values:
        return "dim_global" in values.inner("args")
    entropy_model = values.get("train_entropy_model", bool(values.inner("entropy_model")))
    return bool(values.inner("model")) and not entropy_model


def read_blt(values: Values, training: Values) -> BLTConfig:
    """Return the configuration, without patcher, of a ``ByteLatentTransformer``."""
    if not is_blt(values):
        raise ValueError(f"{values.file}: expected the arguments of a BLT, got {', '.join(values)}")
    args = fields.BYTE_LATENT_TRANSFORMER_ARGS.take(values.inner("args") or values.inner("model"))
    local, window = args["dim_local_encoder"], args["local_attention_window_len"]
    args.expect("dim_local_decoder", local)
    if args["dim_token"] is not None:
        args.expect("dim_token", local)
    elif args["patch_size"] and not args["use_local_encoder_transformer"]:  # the width of a byte is then a part of it
        width = args["dim_global"] // args["patch_size"]
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

    # The masks are those of `create_causal_mask` of that repository. Its "sdpa" has only the mask "causal" and raises
    # for any other; here it is read as the mask that is asked for.
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
        # The global transformer is given EOS where a patch holds EOS, and 0 elsewhere, and searches it for `eos_id`.
        across = across or args["eos_id"] != EOS
    rules = _rules(args, training)

    def layers(dim: int, name: str, kv_heads: int | None, window: int | None) -> TransformerConfig:
        return _layers(args, dim, args[f"n_layers_{name}"], args[f"n_heads_{name}"], kv_heads, window)

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


def _rules(args: Values, training: Values) -> dict[str, Any]:
    """Return the patching rule as arguments of a `BLTConfig`, from the training arguments or else from the model's."""
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


def read_byte_lm(values: Values) -> ByteLMConfig:
    """Return the configuration of an ``LMTransformer``, the entropy model."""
    args, sizes = values.inner("args"), values.inner("entropy_model")
    if sizes:  # `load_entropy_model` reads these alone, and the rest is always the same
        read = {key: sizes[key] for key in ("dim", "n_layers", "n_heads", "vocab_size", "ffn_dim_multiplier")}
        masks = {"sliding_window": 512, "attn_bias_type": "local_block_causal", "attn_impl": "xformers"}
        args = Values(values.file, "entropy_model", {**read, **masks})
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
            raise args.error("sliding_window", f"{expected}, since attn_bias_type is {shortened(bias)}")
        if split and args["eos_id"] is None:
            raise args.error("eos_id", "an id")
    layers = _layers(args, args["dim"], args["n_layers"], args["n_heads"], args["n_kv_heads"], window)
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


def _layers(
    args: Values, dim: int, num_layers: int, num_heads: int, kv_heads: int | None, window: int | None
) -> TransformerConfig:
    if args["head_dim"] and num_heads > 0:
        args.expect("head_dim", dim // num_heads)
    multiplier, multiple = args["ffn_dim_multiplier"], args["multiple_of"]
    if multiple < 1:
        raise args.error("multiple_of", "a value >= 1")
    ffn_dim = (1.0 if multiplier is None else multiplier) * int(8 * dim / 3)
    if not math.isfinite(ffn_dim):
        raise args.error("ffn_dim_multiplier", "a number that gives a width")
    return args.build(
        TransformerConfig,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=kv_heads or None,
        ffn_dim=multiple * math.ceil(int(ffn_dim) / multiple),
        window=window,
        rope_theta=args["rope_theta"],
        norm_eps=args["norm_eps"],
    )
