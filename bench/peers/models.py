"""Peers of the models: transformers' BLT and MEGABYTE-pytorch, where they are installed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blt_kernels.models import BLT
from blt_kernels.nn import TransformerConfig


@dataclass(frozen=True)
class Sizes:
    """Holds the widths and numbers of layers of a BLT. Heads have a width of 64.

    Attributes
    ----------
    local, wide, patcher : widths of encoder and decoder, of the global transformer, and of the patcher
    ffn, wide_ffn, patcher_ffn : widths inside of their MLPs
    decoder_layers, wide_layers : the encoder has one, the patcher two
    rows : of each of the six hash tables
    """

    local: int
    ffn: int
    wide: int
    wide_ffn: int
    patcher: int
    patcher_ffn: int
    decoder_layers: int
    wide_layers: int
    rows: int


SMALLEST = Sizes(256, 682, 512, 1408, 256, 682, decoder_layers=4, wide_layers=1, rows=50)
SMALL = Sizes(256, 682, 512, 1408, 256, 682, decoder_layers=4, wide_layers=8, rows=20000)  # 63.9M parameters
MEDIUM = Sizes(512, 1365, 768, 2048, 256, 682, decoder_layers=4, wide_layers=8, rows=10500)  # 113.9M parameters


def transformers_blt(tokens: Tensor, patch_size: float, sizes: Sizes = SMALL) -> Any | None:
    """Return a BLT of transformers with random weights, whose patcher cuts `tokens` into patches of about `patch_size`.

    None where transformers is not installed.
    """
    try:
        from transformers import BltConfig, BltForCausalLM
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()

    def part(width: int, ffn: int, layers: int) -> dict[str, int]:
        heads, longest = width // 64, max(4096, tokens.shape[1])
        shape = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads}
        numbers = {"intermediate_size": ffn, "num_hidden_layers": layers, "max_position_embeddings": longest}
        return {**shape, **numbers}

    config = BltConfig(
        encoder_hash_byte_group_vocab=sizes.rows,
        encoder_config={**part(sizes.local, sizes.ffn, 1), "hidden_size_global": sizes.wide},
        decoder_config={**part(sizes.local, sizes.ffn, sizes.decoder_layers), "hidden_size_global": sizes.wide},
        global_config=part(sizes.wide, sizes.wide_ffn, sizes.wide_layers),
        patcher_config=part(sizes.patcher, sizes.patcher_ffn, 2),
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
