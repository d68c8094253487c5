"""Lists every field of the configurations of transformers 5.23, with the names in files of versions 4."""

from __future__ import annotations

from typing import Any

from blt_kernels.models.checkpoint.fields import Fields, alike, names
from blt_kernels.models.config import RELEASED_THRESHOLD

# Every configuration has these fields. They say how it was saved, what a call returns, how text is generated, and which
# heads other tasks have. Names that begin with an underscore are ignored like them.
_EVERY = names("""
    architectures attn_implementation auto_map dtype name_or_path torch_dtype torchscript
    transformers_version use_cache return_dict output_attentions output_hidden_states output_scores
    return_dict_in_generate tie_last_hidden_states use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward
    is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    initializer_range dropout
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences exponential_decay_length_penalty suppress_tokens begin_suppress_tokens remove_invalid_values
    finetuning_task id2label label2id num_labels problem_type task_specific_params tokenizer_class prefix
""")
_NONE = {"quantization_config": (None, None), "per_layer_config": (None, None)}

# transformers' own conversion of a checkpoint of facebookresearch/blt writes these fields, and its classes ignore them.
_CONVERTED = names("attn_bias_type attn_impl norm_eps pm_size")


def _stack(
    dim: int, layers: int, heads: int, ffn_dim: int | None, positions: int, theta: float = 500000.0, eps: float = 1e-5
) -> dict[str, tuple[Any, Any]]:
    """Return the fields of a stack of layers."""
    return {
        "hidden_size": (int, dim),
        "num_hidden_layers": (int, layers),
        "num_attention_heads": (int, heads),
        **alike(int | None, None, "num_key_value_heads head_dim"),
        "intermediate_size": (int | None, ffn_dim),
        "hidden_act": (str, "silu"),
        "rms_norm_eps": (float, eps),
        "max_position_embeddings": (int, positions),  # only scaled positions read it
        **alike(dict | None, None, "rope_parameters rope_scaling"),
        "rope_theta": (float, theta),
        "partial_rotary_factor": (float | None, None),
    }


BLT_CONFIG = Fields(
    "BltConfig",
    read={
        "vocab_size": (int, 260),
        "patch_in_forward": (bool | None, True),
        "patch_size": (int | float | None, 4),  # only whether it is None matters
        "patching_mode": (str | None, "entropy"),
        "patching_threshold": (float, RELEASED_THRESHOLD),
        "max_patch_length": (int | None, None),
        "local_attention_window_len": (int | None, 512),
        "cross_attn_k": (int, 2),
        "encoder_hash_byte_group_size": (list | None, None),
        "encoder_hash_byte_group_vocab": (int, 500002),
        "encoder_hash_byte_group_nb_functions": (int, 1),
        **alike(dict | None, None, "patcher_config encoder_config decoder_config global_config"),
        # Only this package knows these:
        "split_documents": (bool, False),
        "global_across_documents": (bool, False),
        "eos_id": (int, 2),
    },
    fixed={"model_type": ("blt", "blt"), "tie_word_embeddings": (False, False), **_NONE},
    ignored=_EVERY
    | _CONVERTED
    | names("""
        max_position_embeddings rope_parameters rope_scaling rope_theta patching_batch_size patching_device
        patching_threshold_add monotonicity realtime_patching
    """),
)
_PART = names("model_type tie_word_embeddings") | _EVERY | _CONVERTED  # BLT ties no weights of its parts
ENCODER_CONFIG = Fields(
    "BltLocalEncoderConfig",
    read={
        **_stack(1024, 1, 16, None, 24576),
        "vocab_size": (int, 260),
        "cross_attn_k": (int, 2),
        "cross_attn_all_layers": (bool | None, False),
    },
    fixed=_NONE,
    ignored=_PART | names("hidden_size_global sliding_window"),  # its window is local_attention_window_len
)
DECODER_CONFIG = Fields(
    "BltLocalDecoderConfig",
    read={
        **_stack(1024, 9, 16, 2816, 24576),
        "hidden_size_global": (int, 2048),
        "cross_attn_k": (int, 2),
        "cross_attn_all_layers": (bool | None, True),
    },
    fixed=_NONE,
    ignored=_PART | names("vocab_size"),
)
GLOBAL_CONFIG = Fields(
    "BltGlobalTransformerConfig",
    read=_stack(2048, 25, 16, 5632, 4096),
    fixed=_NONE,
    ignored=_PART | names("encoder_cross_output_size"),  # it follows from the others
)
PATCHER_CONFIG = Fields(
    "BltPatcherConfig",
    read={
        **_stack(768, 14, 12, 2048, 8192, theta=10000.0),
        "vocab_size": (int, 260),
        "sliding_window": (int | None, 512),
        # Only this package knows these:
        "patching_threshold": (float, RELEASED_THRESHOLD),
        "split_documents": (bool, False),
        "eos_id": (int, 2),
    },
    fixed=_NONE,
    ignored=_PART,
)
LLAMA_CONFIG = Fields(
    "LlamaConfig",
    read=_stack(4096, 32, 32, 11008, 2048, theta=10000.0, eps=1e-6),
    fixed={"model_type": ("llama", "llama"), "attention_bias": (False, False), "mlp_bias": (False, False), **_NONE},
    ignored=_EVERY | names("vocab_size tie_word_embeddings attention_dropout pretraining_tp unsloth_version"),
)
ROPE_PARAMETERS = Fields(
    "the rotary positions 'default' and 'llama3'",
    read={
        **alike(str | None, None, "rope_type type"),
        **alike(float | None, None, "rope_theta factor low_freq_factor high_freq_factor partial_rotary_factor"),
        "original_max_position_embeddings": (int | float | None, None),
    },
    ignored=names("attention_factor"),
)
