"""Lists every field of the configurations of facebookresearch/blt at 9774ed4."""

from __future__ import annotations

from blt_kernels.models.checkpoint.fields import Fields, alike, names
from blt_kernels.models.config import RELEASED_THRESHOLD

# These fields say how weights are drawn, and how long and in which arithmetic the tables of positions are made. They do
# not change what a trained model computes.
_BASE = names("seed init_base_std init_std_factor max_seqlen rope_use_fp32_in_outer_product")

BYTE_LATENT_TRANSFORMER_ARGS = Fields(
    "ByteLatentTransformerArgs",
    read={
        "vocab_size": (int, -1),
        "pm_size": (int, 0),  # added to vocab_size
        **alike(int, 512, "dim_global dim_local_encoder dim_local_decoder"),
        **alike(int, 8, "n_layers_global n_layers_local_encoder n_layers_local_decoder"),
        **alike(int, 8, "n_heads_global n_heads_local_encoder n_heads_local_decoder"),
        **alike(int | None, None, "dim_token n_kv_heads n_kv_heads_global head_dim local_attention_window_len"),
        "ffn_dim_multiplier": (float | None, 1.0),
        "multiple_of": (int, 256),
        "norm_eps": (float, 1e-5),
        "rope_theta": (float, 10000.0),
        "attn_impl": (str | None, "sdpa"),
        "attn_bias_type": (str | None, "causal"),
        "eos_id": (int | None, 2),
        **alike(int | None, None, "cross_attn_k cross_attn_nheads cross_attn_window_encoder cross_attn_window_decoder"),
        **alike(bool, False, "cross_attn_all_layers_encoder cross_attn_all_layers_decoder"),
        "encoder_hash_byte_group_size": (list | str | None, None),
        "encoder_hash_byte_group_vocab": (int, 30000),
        "encoder_hash_byte_group_nb_functions": (int, 3),
        # These give the width of a byte's vector where `dim_token` is None:
        "use_local_encoder_transformer": (bool, False),
        "share_encoder_decoder_emb": (bool, True),
        "patch_size": (float | None, None),
        # These are the patching rule where there are no training arguments:
        "patching_mode": (str | None, None),
        **alike(float | None, None, "patching_threshold patching_threshold_add"),
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
    # The sizes of the three parts replace these.
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
        **alike(int | None, None, "n_heads n_kv_heads head_dim sliding_window"),
        "ffn_dim_multiplier": (float | None, None),
        "multiple_of": (int, 256),
        "norm_eps": (float, 1e-5),
        "rope_theta": (float, 10000.0),
        "attn_impl": (str | None, "sdpa"),
        "attn_bias_type": (str | None, None),
        "eos_id": (int | None, 2),
    },
    fixed={"weight_tying": (False, False)},
    ignored=_BASE,
)
PATCHER_ARGS = Fields(
    "PatcherArgs",
    read={
        "patching_mode": (str, "entropy"),
        "threshold": (float, RELEASED_THRESHOLD),
        "threshold_add": (float | None, None),
        "monotonicity": (bool, False),
        "max_patch_length": (int | None, None),
    },
    # `patch_size` counts only where there is no threshold, or for the mode "static".
    ignored=names("""
        patching_device device entropy_model_checkpoint_dir realtime_patching patch_size patching_batch_size log_time
    """),
)
