"""Small BLTs of transformers with random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blt_kernels.ids import EOS

WINDOW, LENGTH = 7, 41
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LOCAL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "hidden_size_global": 48}
VALUES = {
    "encoder_hash_byte_group_vocab": 53,
    "local_attention_window_len": WINDOW,
    "cross_attn_k": 2,
    "patcher_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "sliding_window": WINDOW,
    },
    "encoder_config": {"num_hidden_layers": 1, **LOCAL},
    "decoder_config": {"num_hidden_layers": 2, **LOCAL},
    "global_config": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
}
# These replace fields of VALUES, whose widths differ by K = 2 and need a projection.
CASES: dict[str, dict] = {
    "released": {},
    "one_query": {"cross_attn_k": 1, "encoder_config": {"cross_attn_k": 1}, "decoder_config": {"cross_attn_k": 1}},
    "four_queries": {"cross_attn_k": 4, "encoder_config": {"cross_attn_k": 4}, "decoder_config": {"cross_attn_k": 4}},
    "no_projection": {"global_config": {"hidden_size": 64}, "encoder_config": {"hidden_size_global": 64},
                      "decoder_config": {"hidden_size_global": 64}},
    "all_encoder_layers": {"encoder_config": {"num_hidden_layers": 3, "cross_attn_all_layers": True}},
    "last_encoder_layer": {"encoder_config": {"num_hidden_layers": 2}},
    "first_decoder_layer": {"decoder_config": {"cross_attn_all_layers": False}},
    "hash_functions": {"encoder_hash_byte_group_nb_functions": 3, "encoder_hash_byte_group_size": [2, 5]},
    "grouped_heads": {f"{part}_config": {"num_attention_heads": 4, "num_key_value_heads": heads}
                      for part, heads in (("encoder", 1), ("decoder", 2), ("global", 2), ("patcher", 1))},
    "no_window": {"local_attention_window_len": None, "patcher_config": {"sliding_window": None}},
    "numbers": {"encoder_config": {"intermediate_size": None, "rms_norm_eps": 1e-3},
                "global_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}},
    "scaled_positions": {"global_config": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}},
    "scaled_by_default": {"global_config": {"max_position_embeddings": 64, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}},
    "scaling_first": {"global_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
                                        "rope_scaling": {"rope_type": "default", "rope_theta": 77.0}}},
    "long_patches": {"max_patch_length": 3},
    "bytes": {"patch_in_forward": False},
    "spaces": {"patching_mode": "space"},
    # transformers' own conversion of a checkpoint of facebookresearch/blt writes fields that its classes ignore.
    "converted": {"realtime_patching": True, "patching_device": "cuda", "patching_threshold_add": 0.5, "pm_size": 0,
                  "monotonicity": True,
                  "encoder_config": {"norm_eps": 0.5, "pm_size": 0, "rope_theta": 300.0,
                                     "rope_scaling": {"rope_type": "default"}},
                  "patcher_config": {"norm_eps": 0.5, "attn_impl": "sdpa", "attn_bias_type": "causal"}},
}  # fmt: skip


def merged(values: dict, changes: dict) -> dict:
    inner = {key: {**values.get(key, {}), **new} for key, new in changes.items() if isinstance(new, dict)}
    return {**values, **changes, **inner}


def batch(rows: int = 3, length: int = LENGTH) -> Tensor:
    tokens = torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 1
    if length > 9:
        tokens[0, 9] = EOS
    return tokens


def their_model(case: str, **changes: object):
    """Return transformers' BLT with random weights that tell: norms away from 1, a threshold amidst the entropies."""
    blt = pytest.importorskip("transformers.models.blt")
    torch.manual_seed(0)
    model = blt.BltForCausalLM(blt.BltConfig(**merged(merged(VALUES, CASES[case]), changes))).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.uniform_(0.5, 1.5)
        if model.model.patcher is not None:
            model.model.patcher.lm_head.weight.mul_(4)
            model.config.patching_threshold = model.model.patcher(batch())[0].quantile(0.7).item()
    return model
