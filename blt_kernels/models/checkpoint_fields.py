"""Every field of the configurations of transformers and of facebookresearch/blt, and what becomes of it here.

There is a table for each class of configuration. A field is

- read: it is honoured. The table has its type and the value that it has in that class where a file lacks it.
- fixed: only one of its values is computed here, and every other one is an error that names it.
- ignored: it does not change what that code computes at inference, or that code does not use it at all.

A field that is in no table, unless it is null, is an error that names it, for it may change what is computed. The
tables are of transformers 5.23, with the names that files of versions 4 have as well, and of facebookresearch/blt at
9774ed4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

Config = TypeVar("Config")


class Values(dict[str, Any]):
    """A JSON object that can name the file it is from, and its place in there."""

    file: Path
    place: str

    @staticmethod
    def read(file: Path) -> Values:
        """The object in a file; ValueError if there is something else."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: expected JSON, got {error}") from error
        return Values.of(file, "", content)

    @staticmethod
    def of(file: Path, place: str, content: object) -> Values:
        if not isinstance(content, dict):
            where = f"{file}: {place}" if place else str(file)
            raise ValueError(f"{where}: expected a JSON object, got {type(content).__name__}")
        values = Values(content)
        values.file, values.place = file, place
        return values

    def inner(self, key: str) -> Values:
        """The object under a key; an empty one if there is none, or null."""
        content = self.get(key)
        return Values.of(self.file, self._path(key), {} if content is None else content)

    def expect(self, key: str, expected: object, default: object = None) -> None:
        """Raise ValueError unless the value under `key`, or `default` if there is none, is the expected one."""
        if self.get(key, default) != expected:
            raise self.error(key, repr(expected), default)

    def error(self, key: str, expected: str, default: object = None) -> ValueError:
        """Return the error that the value under `key`, or `default` if there is none, is not as `expected`."""
        return ValueError(f"{self.file}: {self._path(key)}: expected {expected}, got {self.get(key, default)!r}")

    def build(self, cls: type[Config], **arguments: Any) -> Config:
        """A configuration of these values; its errors name the file."""
        try:
            return cls(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self}: {error}") from error

    def __str__(self) -> str:
        return f"{self.file}: {self.place}" if self.place else str(self.file)

    def _path(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.file}: {self._path(key)}: expected a value, found none")


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Fields:
    """The fields of the configuration class `owner`.

    `read` has type and default, `fixed` the default and the one value that is computed here.
    """

    owner: str
    read: Mapping[str, tuple[Any, Any]]
    fixed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def take(self, values: Values) -> Values:
        """The fields that are read, with the defaults of those that `values` lacks.

        Raises
        ------
        ValueError
            A field is unknown, has a value of another type, or one that is not computed here; the message names it.
        """
        known = self.read.keys() | self.fixed.keys() | self.ignored
        given = (key for key, value in values.items() if value is not None and not key.startswith("_"))
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(
                f"{values}: expected the fields of {self.owner}, got {', '.join(unknown)} as well, which may change "
                "what the model computes: remove what does not"
            )
        for key, (default, expected) in self.fixed.items():
            values.expect(key, expected, default)
        taken = {}
        for key, (kind, default) in self.read.items():
            value, kinds = values.get(key, default), get_args(kind) or (kind,)
            if type(value) is float and float not in kinds and value.is_integer():
                value = int(value)
            if type(value) not in kinds and not (type(value) is int and float in kinds):
                raise values.error(key, " or ".join("None" if k is NoneType else k.__name__ for k in kinds))
            taken[key] = value
        return Values.of(values.file, values.place, taken)


# --- transformers -----------------------------------------------------------------------------------------------------

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
    """The fields of a stack of layers."""
    return {
        "hidden_size": (int, dim),
        "num_hidden_layers": (int, layers),
        "num_attention_heads": (int, heads),
        "num_key_value_heads": (int | None, None),
        "head_dim": (int | None, None),
        "intermediate_size": (int | None, ffn_dim),
        "hidden_act": (str, "silu"),
        "rms_norm_eps": (float, eps),
        "max_position_embeddings": (int, positions),  # of scaled positions alone
        "rope_parameters": (dict | None, None),
        "rope_scaling": (dict | None, None),
        "rope_theta": (float, theta),
        "partial_rotary_factor": (float | None, None),
    }


BLT_CONFIG = Fields(
    "BltConfig",
    read={
        "vocab_size": (int, 260),
        "patch_in_forward": (bool | None, True),
        "patch_size": (int | float | None, 4),  # only whether there is one
        "patching_mode": (str | None, "entropy"),
        "patching_threshold": (float, 1.335442066192627),
        "max_patch_length": (int | None, None),
        "local_attention_window_len": (int | None, 512),
        "cross_attn_k": (int, 2),
        "encoder_hash_byte_group_size": (list | None, None),
        "encoder_hash_byte_group_vocab": (int, 500002),
        "encoder_hash_byte_group_nb_functions": (int, 1),
        "patcher_config": (dict | None, None),
        "encoder_config": (dict | None, None),
        "decoder_config": (dict | None, None),
        "global_config": (dict | None, None),
        # Known here alone:
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
    ignored=_PART | names("encoder_cross_output_size"),  # computed from the others
)
PATCHER_CONFIG = Fields(
    "BltPatcherConfig",
    read={
        **_stack(768, 14, 12, 2048, 8192, theta=10000.0),
        "vocab_size": (int, 260),
        "sliding_window": (int | None, 512),
        # Known here alone:
        "patching_threshold": (float, 1.335442066192627),
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
        "rope_type": (str | None, None),
        "type": (str | None, None),
        "rope_theta": (float | None, None),
        "factor": (float | None, None),
        "low_freq_factor": (float | None, None),
        "high_freq_factor": (float | None, None),
        "original_max_position_embeddings": (int | float | None, None),
        "partial_rotary_factor": (float | None, None),
    },
    ignored=names("attention_factor"),
)

# --- facebookresearch/blt ---------------------------------------------------------------------------------------------

# These fields say how weights are drawn, and how long and in which arithmetic the tables of positions are made. They do
# not change what a trained model computes.
_BASE = names("seed init_base_std init_std_factor max_seqlen rope_use_fp32_in_outer_product")

BYTE_LATENT_TRANSFORMER_ARGS = Fields(
    "ByteLatentTransformerArgs",
    read={
        "vocab_size": (int, -1),
        "pm_size": (int, 0),  # so many more ids
        "dim_token": (int | None, None),
        "dim_global": (int, 512),
        "dim_local_encoder": (int, 512),
        "dim_local_decoder": (int, 512),
        "n_layers_global": (int, 8),
        "n_layers_local_encoder": (int, 8),
        "n_layers_local_decoder": (int, 8),
        "n_heads_global": (int, 8),
        "n_heads_local_encoder": (int, 8),
        "n_heads_local_decoder": (int, 8),
        "n_kv_heads": (int | None, None),
        "n_kv_heads_global": (int | None, None),
        "head_dim": (int | None, None),
        "ffn_dim_multiplier": (float | None, 1.0),
        "multiple_of": (int, 256),
        "norm_eps": (float, 1e-5),
        "rope_theta": (float, 10000.0),
        "attn_impl": (str | None, "sdpa"),
        "attn_bias_type": (str | None, "causal"),
        "eos_id": (int | None, 2),
        "local_attention_window_len": (int | None, None),
        "cross_attn_k": (int | None, None),
        "cross_attn_nheads": (int | None, None),
        "cross_attn_window_encoder": (int | None, None),
        "cross_attn_window_decoder": (int | None, None),
        "cross_attn_all_layers_encoder": (bool, False),
        "cross_attn_all_layers_decoder": (bool, False),
        "encoder_hash_byte_group_size": (list | str | None, None),
        "encoder_hash_byte_group_vocab": (int, 30000),
        "encoder_hash_byte_group_nb_functions": (int, 3),
        # The width of a byte's vector where `dim_token` does not say it:
        "use_local_encoder_transformer": (bool, False),
        "share_encoder_decoder_emb": (bool, True),
        "patch_size": (float | None, None),
        # The patching rule, where there are no training arguments:
        "patching_mode": (str | None, None),
        "patching_threshold": (float | None, None),
        "patching_threshold_add": (float | None, None),
        "monotonicity": (bool, False),
        "max_patch_length": (int | None, None),
    },
    fixed={
        "cross_attn_encoder": (False, True),
        "cross_attn_decoder": (False, True),
        "cross_attn_init_by_pooling": (False, True),
        "downsampling_by_pooling": (None, "max"),
        "encoder_enable_byte_ngrams": (False, False),
        "use_rope": (True, True),
    },
    ignored=_BASE
    # Replaced by those of the three parts.
    | names("dim n_layers n_heads dim_token_emb dim_patch_emb")
    # These say who makes the patches, and how many rows the entropy model takes at a time.
    | names("patch_in_forward patching_batch_size patching_device")
    # These are about training and data, or about how the same result is computed.
    | names("""
        dropout layer_ckpt recompute_attn recompute_fc1_out recompute_fc3_out custom_bwd sequence_parallel loss_parallel
        fuse_sequence_parallel use_fsdp attn_to_keep full_logging_n_layers log_patch_lengths
        max_encoder_seq_length max_length pad_to_max_length cross_attn_use_flex_attention
    """)
    # These describe byte n-grams, which `encoder_enable_byte_ngrams` excludes.
    | names("encoder_ngram_to_size_str ngram_vocab_sizes")
    # These are declared and used nowhere.
    | names("""
        alpha_depth architecture conv_kernel_size encoder_enable_byte_group_hash encoder_lm_loss encoder_ngram_table_dir
        encoder_preds_low_entropy_toks encoder_preds_random_toks entropy_model_checkpoint_dir
        entropy_model_is_ngram_model global_local_decoder_residual_layer init_use_depth init_use_gaussian
        non_linearity norm_affine norm_type output_size patching_thresholds_str pre_norm
        tie_local_encoder_decoder tie_local_encoder_decoder_logits tokenize_with_bpe_delimiter weight_tying
    """),
)
LM_TRANSFORMER_ARGS = Fields(
    "LMTransformerArgs",
    read={
        "vocab_size": (int, -1),
        "dim": (int, 512),
        "n_layers": (int, 8),
        "n_heads": (int | None, None),
        "n_kv_heads": (int | None, None),
        "head_dim": (int | None, None),
        "ffn_dim_multiplier": (float | None, None),
        "multiple_of": (int, 256),
        "norm_eps": (float, 1e-5),
        "rope_theta": (float, 10000.0),
        "attn_impl": (str | None, "sdpa"),
        "attn_bias_type": (str | None, None),
        "eos_id": (int | None, 2),
        "sliding_window": (int | None, None),
    },
    fixed={"weight_tying": (False, False)},
    ignored=_BASE,
)
PATCHER_ARGS = Fields(
    "PatcherArgs",
    read={
        "patching_mode": (str, "entropy"),
        "threshold": (float, 1.335442066192627),
        "threshold_add": (float | None, None),
        "monotonicity": (bool, False),
        "max_patch_length": (int | None, None),
    },
    # `patch_size` counts only where there is no threshold, or for the mode "static".
    ignored=names("""
        patching_device device entropy_model_checkpoint_dir realtime_patching patch_size patching_batch_size log_time
    """),
)
