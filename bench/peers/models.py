"""Peers of the models: transformers' BLT and MEGABYTE-pytorch, where they are installed."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from blt_kernels.models import BLT
from blt_kernels.nn import TransformerConfig


def transformers_blt(tokens: Tensor, patch_size: float, *, small: bool = False) -> Any | None:
    """Return a BLT of transformers with random weights, whose patcher cuts `tokens` into patches of about `patch_size`.

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
    # The threshold lies in the widest gap around this share, so that rounding decides nothing.
    middle, reach = round(len(entropies) * (1 - 1 / patch_size)), max(3, len(entropies) // 100)
    around = entropies[middle - reach : middle + reach]
    widest = int(around.diff().argmax())
    model.config.patching_threshold = around[widest : widest + 2].mean().item()
    return model


def with_weights_of(theirs: Any, device: str) -> BLT:
    """Return our BLT with the configuration and the weights of transformers'."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = BLT.from_pretrained(folder, device=device)
        # The weights are copied, since they are mapped from a file that is about to be deleted.
        ours.load_state_dict({name: x.clone() for name, x in ours.state_dict().items()}, assign=True)
    return ours


def megabyte_pytorch(tokens: Tensor, wide: TransformerConfig, narrow: TransformerConfig, size: int) -> Any | None:
    """Return a model of MEGABYTE-pytorch with random weights, rotary positions and room for `tokens`.

    It has the widths and the numbers of layers of ours. None where the package is not installed.
    """
    try:
        from MEGABYTE_pytorch import MEGABYTE
    except ImportError:
        return None
    torch.manual_seed(0)
    model = MEGABYTE(
        num_tokens=260,
        dim=(wide.dim, narrow.dim),
        depth=(wide.num_layers, narrow.num_layers),
        max_seq_len=(-(-tokens.shape[1] // size), size),
        dim_head=wide.head_dim,
        heads=wide.num_heads,
        rel_pos=True,
        flash_attn=True,
    )
    return model.to(tokens.device).eval()
