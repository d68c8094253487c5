"""Peers of the models: transformers' BLT, where it is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def transformers_blt(tokens: Tensor, patch_size: float, *, small: bool = False) -> Any | None:
    """A BLT of transformers with random weights, whose patcher cuts `tokens` into patches of about `patch_size`.

    It has 63.9M parameters: one local layer and four of width 256, eight global ones of width 512, six tables of 20000
    rows, and a patcher of two layers. With `small`, one global layer and six tables of 50 rows. None where transformers
    is not installed.
    """
    try:
        from transformers import BltConfig, BltForCausalLM
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    longest = {"max_position_embeddings": max(4096, tokens.shape[1])}
    local = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 682}
    wide = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1408}
    config = BltConfig(
        encoder_hash_byte_group_vocab=50 if small else 20000,
        encoder_config={**local, **longest, "num_hidden_layers": 1, "hidden_size_global": 512},
        decoder_config={**local, **longest, "num_hidden_layers": 4, "hidden_size_global": 512},
        global_config={**wide, **longest, "num_hidden_layers": 1 if small else 8},
        patcher_config={**local, **longest, "num_hidden_layers": 2},
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = BltForCausalLM(config).to(tokens.device).eval()
    with torch.no_grad():
        entropies = model.model.patcher(tokens)[0].flatten().sort().values
    # In the widest gap thereabouts, so that nobody's rounding decides.
    middle, reach = round(len(entropies) * (1 - 1 / patch_size)), max(3, len(entropies) // 100)
    around = entropies[middle - reach : middle + reach]
    widest = int(around.diff().argmax())
    model.config.patching_threshold = around[widest : widest + 2].mean().item()
    return model
