"""Functions that are replaced or called in transformers, and their parameters.

Versions differ only in the name of the cache.
"""

from __future__ import annotations

from blt_kernels.integrations._applied import Parameters

_CACHE = ("past_key_values", "cache")  # its name up to 5.23, and from 5.24 on
_PART = ("attention_mask", "position_ids", _CACHE, "encoder_attention_mask")

PARAMETERS: dict[str, Parameters] = {
    "BltModel.forward": (
        "self", "input_ids", "patch_lengths", "attention_mask", "position_ids", _CACHE, "inputs_embeds", "use_cache",
    ),
    "BltLocalEncoder.forward": (
        "self", "input_ids", "inputs_embeds", "patch_embeds", *_PART, "num_patches", "patch_ids",
    ),
    "BltLocalEncoder.patch_reduce": ("self", "hidden_states", "max_num_patches", "patch_ids"),
    "BltLocalDecoder.forward": ("self", "input_ids", "inputs_embeds", "patch_embeds", *_PART),
    "BltGlobalTransformer.forward": ("self", "inputs_embeds", "attention_mask", "position_ids", _CACHE),
    "BltPatcher.forward": (
        "self", "input_ids", "attention_mask", "position_ids", _CACHE, "inputs_embeds", "use_cache", "patch_size",
        "threshold", "max_patch_length",
    ),
    "BltPatcher.patch_lengths_from_entropies": ("entropies", "sequence_length", "patch_size", "threshold"),
    "BltSelfAttention.forward": ("self", "hidden_states", "attention_mask", "position_embeddings", _CACHE),
    "BltCrossAttention.forward": ("self", "hidden_states", "cross_attention_states", "attention_mask"),
    "BltRMSNorm.forward": ("self", "hidden_states"),
    "BltForCausalLM._prepare_cache_for_generation": (
        "self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length",
    ),
    "compute_hash_embeddings": (
        "local_encoder_tokens", "local_encoder", "encoder_hash_tok_embedding", "encoder_hash_byte_group_nb_functions",
        "encoder_hash_byte_group_size", "encoder_hash_byte_group_vocab",
    ),
    "process_patch_lengths": ("patch_lengths", "max_patch_length"),
    "apply_rotary_pos_emb": ("q", "k", "cos", "sin", "unsqueeze_dim"),
    "_prepare_patch_cross_attention_mask": (
        "patch_ids", "num_patches", "sequence_length", "patches_as_queries", "cross_attn_k", "dtype",
    ),
}  # fmt: skip

# Maps what `apply` replaces to what computes it.
REPLACES = {
    "BltModel.forward": "PatchLayout, made once",
    "BltSelfAttention.forward": "block_causal_attention",
    "BltCrossAttention.forward": "patch_cross_attention",
    "BltLocalEncoder.patch_reduce": "patch_pool",
    "BltPatcher.forward": "token_entropy",
    "BltPatcher.patch_lengths_from_entropies": "patch_starts",
    "compute_hash_embeddings": "ngram_hash_embed",
    "BltRMSNorm.forward": "torch.nn.functional.rms_norm, with norms=True",
    "BltForCausalLM._prepare_cache_for_generation": "BltCache",
}
