"""The models of the study. Every family has four sizes, S, A, B and C, of about 0.3, 0.5, 0.8 and 1.5 MFLOP a byte
forward. Transformers over bytes have less, those over 32k tokens twice as much.

The families are transformers over bytes and over BPE tokens, MegaByte with patches of 8 bytes, and BLT with patches at
spaces and by entropies. All have Llama's blocks, with feed-forwards of 8/3 the width. The models over tokens are
`ByteLM` with a larger alphabet. `variants` are BLT and a transformer over bytes with one part changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from blt_kernels._checks import Documents
from blt_kernels.flops import Config
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, MegaByte, MegaByteConfig
from blt_kernels.models.base import ByteModel
from blt_kernels.nn import TransformerConfig, embedding, init_normal, load_ops

NGRAM_VOCAB = 4096  # rows of one hash table
WINDOW, WIDE_WINDOW = 128, 512  # of attention over bytes; models over tokens and MegaByte have none
GLOBAL_THETA = 500000.0
SIZES = "SABC"  # the smallest first


@dataclass(frozen=True)
class Model:
    """Describes a model.

    `vocabulary` is the number of BPE tokens, None for models over bytes. `patch_size` is the mean size that the
    threshold of entropy patches is chosen for, and `rule` has further options of `patch_starts`. `change` names what
    `build` changes in the model.
    """

    name: str
    family: str
    size: str
    config: Config
    vocabulary: int | None = None
    patch_size: float | None = None
    rule: dict[str, Any] = field(default_factory=dict)
    change: str | None = None

    @property
    def kind(self) -> str:
        """Return the name that `blt_kernels.train` has for it."""
        return {BLTConfig: "blt", ByteLMConfig: "entropy", MegaByteConfig: "megabyte"}[type(self.config)]


def layers(dim: int, count: int, window: int | None = None) -> TransformerConfig:
    """Return layers with heads of 64, or of 32 where the width asks for them, and a feed-forward of 8/3 the width."""
    heads = dim // (64 if dim % 64 == 0 else 32)
    return TransformerConfig(dim, count, heads, ffn_dim=32 * round(dim / 12), window=window, rope_theta=GLOBAL_THETA)


def byte_lm(dim: int, count: int, window: int | None, **fields: Any) -> ByteLMConfig:
    return ByteLMConfig(**{**asdict(layers(dim, count, window)), **fields})


def blt(patching: str, local: int, decoder_layers: int, wide: TransformerConfig, **fields: Any) -> BLTConfig:
    encoder = layers(local, 1, WINDOW)
    decoder = replace(encoder, num_layers=decoder_layers)
    values = {"patcher": None, "patching": patching, "ngram_vocab": NGRAM_VOCAB, **fields}
    return BLTConfig(encoder=encoder, global_transformer=wide, decoder=decoder, **values)


PATCHER = Model("patcher", "patcher", "", byte_lm(96, 2, WINDOW))

_BLT_SIZES = {
    "S": (48, 1, layers(96, 2)),
    "A": (64, 1, layers(128, 2)),
    "B": (64, 1, layers(160, 3)),
    "C": (96, 1, layers(192, 4)),
}
_BYTES = {"S": (48, 2), "A": (64, 2), "B": (96, 2), "C": (128, 2)}
_TOKENS = {  # by vocabulary: of the larger one, most FLOPs are those of the output matrix
    4096: {"S": (64, 2), "A": (96, 2), "B": (128, 3), "C": (192, 4)},
    32768: {"S": (32, 2), "A": (64, 2), "B": (96, 2), "C": (128, 3)},
}
_MEGABYTE = {
    "S": (layers(96, 3), layers(48, 2)),
    "A": (layers(128, 3), layers(64, 2)),
    "B": (layers(192, 4), layers(96, 2)),
    "C": (layers(256, 4), layers(96, 3)),
}


def bytes_of(size: str) -> Model:
    return Model(f"bytes {size}", "bytes", size, byte_lm(*_BYTES[size], WINDOW))


def tokens_of(size: str, vocabulary: int) -> Model:
    name = f"tokens {vocabulary // 1024}k"
    config = byte_lm(*_TOKENS[vocabulary][size], None, vocab_size=vocabulary)
    return Model(f"{name} {size}", name, size, config, vocabulary)


def megabyte_of(size: str) -> Model:
    return Model(f"MegaByte {size}", "MegaByte", size, MegaByteConfig(8, *_MEGABYTE[size]))


def space_of(size: str) -> Model:
    return Model(f"BLT-Space {size}", "BLT-Space", size, blt("space", *_BLT_SIZES[size]))


def entropy_of(size: str) -> Model:
    config = blt("entropy", *_BLT_SIZES[size])
    return Model(f"BLT-Entropy {size}", "BLT-Entropy", size, config, patch_size=4.5)


FAMILIES: dict[str, Callable[[str], Model]] = {
    "bytes": bytes_of,
    "tokens 4k": lambda size: tokens_of(size, 4096),
    "tokens 32k": lambda size: tokens_of(size, 32768),
    "MegaByte": megabyte_of,
    "BLT-Space": space_of,
    "BLT-Entropy": entropy_of,
}


def longer_patches() -> list[Model]:
    """Return BLT-Entropy B and models of the same FLOPs a byte with longer patches and a wider global transformer."""
    base, found = entropy_of("B"), []
    for patch_size, wide in (
        (6.0, replace(layers(192, 3), ffn_dim=448)),
        (8.0, replace(layers(224, 3), ffn_dim=512)),
    ):
        config = blt("entropy", *_BLT_SIZES["B"][:2], wide)
        found.append(
            replace(base, name=f"{base.name}, patches of {patch_size:g}", config=config, patch_size=patch_size)
        )
    return [base, *found]


def over_layers_of_tokens() -> tuple[Model, Model]:
    """Return a transformer over tokens, and BLT-Entropy whose global transformer has the same layers."""
    tokens = tokens_of("B", 4096)
    wide = layers(*_TOKENS[4096]["B"])
    return tokens, Model("BLT-Entropy 128", "BLT-Entropy", "", blt("entropy", 64, 1, wide), patch_size=4.5)


def variants(size: str = "B") -> list[Model]:
    """Return BLT-Entropy with one part changed, and a transformer over bytes with tables or with a wider window."""
    base, transformer = entropy_of(size), bytes_of(size)
    wide = byte_lm(*_BYTES[size], WIDE_WINDOW)
    few, many = (blt("entropy", *_BLT_SIZES[size], ngram_vocab=rows) for rows in (NGRAM_VOCAB // 4, NGRAM_VOCAB * 4))
    fixed = blt("static", *_BLT_SIZES[size], patch_size=5)

    def changed(what: str, **fields: Any) -> Model:
        return replace(base, name=f"{base.name}, {what}", **fields)

    return [
        changed("without tables", change="no tables"),
        changed("a quarter of the table rows", config=few),
        changed("4 times the table rows", config=many),
        replace(transformer, name=f"{transformer.name} with tables", change="tables"),
        replace(transformer, name=f"{transformer.name} with a window of {WIDE_WINDOW}", config=wide),
        changed("no cross attention in the encoder", change="no encoder cross attention"),
        changed("patches where the entropy rises", rule={"monotonic": True}),
        changed("patches of at most 12", rule={"max_patch_length": 12}),
        replace(base, name=f"BLT-Static {size}, patches of 5", config=fixed, patch_size=None),
        changed("tables that begin at random", change="random tables"),
    ]


def build(model: Model, seed: int) -> ByteModel:
    """Return a freshly initialised model.

    What is added to the embeddings of bytes begins at 0: random hash tables, or a random global model of MegaByte, are
    noise that is larger than the embeddings, until each of their rows has been trained.
    """
    torch.manual_seed(seed)
    cls: Any = {"blt": BLT, "entropy": ByteLM, "megabyte": MegaByte}[model.kind]
    built = ByteLMWithTables(model.config) if model.change == "tables" else cls(model.config)
    if (name := begins_at_zero(model)) is not None:
        torch.nn.init.zeros_(built.get_parameter(name))
    if model.change == "random tables":
        init_normal(built.encoder_hash_tok_embedding.weight, 0.5)  # as the embeddings of bytes
    elif model.change == "no tables":
        built.encoder_hash_tok_embedding.requires_grad_(False)
    elif model.change == "no encoder cross attention":
        built.local_encoder.cross_attn_layers = nn.ModuleList([PoolingAlone()])
    return built


def begins_at_zero(model: Model) -> str | None:
    """Return the name of the parameter that begins at 0, None if there is none."""
    if model.change == "tables":
        return "embed_tokens.tables.weight"
    if model.change == "random tables":
        return None
    return {"blt": "encoder_hash_tok_embedding.weight", "megabyte": "global_to_local.weight"}.get(model.kind)


class PoolingAlone(nn.Module):
    """Stands where the cross attention of BLT's encoder is: patches are the projections of their pooled bytes."""

    def forward(self, patches: Tensor, x: Tensor, layout: Any, residual_factor: float = 0.0) -> Tensor:
        return residual_factor * patches


class NgramEmbedding(nn.Module):
    """Embeds bytes as BLT's encoder does: the embedding of the byte, and rows of the hash tables."""

    def __init__(self, vocab_size: int, dim: int, ops: SimpleNamespace) -> None:
        super().__init__()
        self.embed, self.ops = embedding(vocab_size, dim), ops
        self.sizes = BLTConfig.ngram_sizes
        self.tables = embedding(len(self.sizes) * NGRAM_VOCAB, dim)
        self.rows: Any = None  # the documents of the ids to come

    def forward(self, ids: Tensor) -> Tensor:
        return self.ops.ngram_hash_embed(
            ids, self.tables.weight, self.embed.weight, self.rows, ngram_sizes=self.sizes, num_functions=1
        )


class ByteLMWithTables(ByteLM):
    """Computes a transformer over bytes with the hash tables of BLT's encoder."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens: Any = NgramEmbedding(config.vocab_size, config.dim, load_ops("fused"))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | Documents | None = None, **options: Any) -> Tensor:
        self.embed_tokens.rows = cu_seqlens
        return super().forward(tokens, cu_seqlens, **options)
