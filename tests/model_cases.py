"""Tests of models share small models of every kind, and documents for them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig
from blt_kernels.models.base import ByteModel
from blt_kernels.nn import TransformerConfig

WINDOW = 7
BYTE_LM = ByteLMConfig(dim=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=64, window=WINDOW, threshold=5.1)
LOCAL = TransformerConfig(32, 2, 2, ffn_dim=64, window=WINDOW)
SMALL_BLT = BLTConfig(
    encoder=LOCAL,
    global_transformer=TransformerConfig(48, 2, 2, ffn_dim=64),
    decoder=LOCAL,
    patcher=BYTE_LM,
    ngram_vocab=97,
    threshold=5.1,
)
SMALL_MEGABYTE = MegaByteConfig(4, TransformerConfig(32, 2, 2, ffn_dim=64), TransformerConfig(48, 2, 2))
CONFIGS: dict[str, tuple[type[ByteModel], object]] = {
    "byte_lm": (ByteLM, BYTE_LM),
    "blt": (BLT, SMALL_BLT),
    "blt_all_encoder_layers": (BLT, dataclasses.replace(SMALL_BLT, cross_attn_all_layers_encoder=True)),
    "blt_first_decoder_layer": (BLT, dataclasses.replace(SMALL_BLT, cross_attn_all_layers_decoder=False)),
    "blt_grouped_heads": (BLT, dataclasses.replace(SMALL_BLT, decoder=dataclasses.replace(LOCAL, num_kv_heads=1))),
    "blt_cross_windows": (
        BLT,
        dataclasses.replace(
            SMALL_BLT,
            cross_attn_all_layers_encoder=True,
            cross_attn_heads=4,
            cross_attn_window_encoder=2,
            cross_attn_window_decoder=3,
        ),
    ),
    "blt_grouped_cross": (
        BLT,
        dataclasses.replace(
            SMALL_BLT, decoder=dataclasses.replace(LOCAL, num_kv_heads=1), cross_attn_grouped_heads=True
        ),
    ),
    "blt_space": (BLT, dataclasses.replace(SMALL_BLT, patching="space", patcher=None)),
    "blt_static": (BLT, dataclasses.replace(SMALL_BLT, patching="static", patch_size=3, patcher=None)),
    "megabyte": (MegaByte, SMALL_MEGABYTE),
    "megabyte_extended": (MegaByte, dataclasses.replace(SMALL_MEGABYTE, cross_patch=3, conv_sizes=(3, 5, 7))),
}
# These are one byte, longer and shorter than the window, empty, and lengths around MegaByte's patches of 4.
LENGTHS = (1, 50, 0, 3, 9, 4, 8, 1)


def build(name: str, ops: str = "fused", dtype: torch.dtype = torch.float64, **changes: object) -> ByteModel:
    cls, config = CONFIGS[name]
    torch.manual_seed(0)
    return enlarge_additions(cls(dataclasses.replace(config, **changes), ops)).to(dtype)


def enlarge_additions(model: ByteModel) -> ByteModel:
    """Return the model with hash tables and `global_to_local` as large as embeddings, so that logits depend on them."""
    for name, std in (("encoder_hash_tok_embedding", 0.02 / 0.5), ("global_to_local", 0.25)):
        if hasattr(model, name):
            getattr(model, name).weight.data.div_(std)
    return model


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 260, (sum(lengths),), generator=generator)
    return tokens, torch.tensor([0, *lengths]).cumsum(0).int()
