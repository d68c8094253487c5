"""Peers of ngram_hash_embed: tokens ``[B, S]``, one hash function, N n-gram sizes, N tables ``[V, D]`` or one fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

PRIME = 1000000007


def blt_hash(tokens: Tensor, size: int, vocab: int) -> Tensor:
    """Hash as facebookresearch/blt: sum every window of `size` ids, times powers of the prime; int64 ``[B, S]``."""
    with torch.no_grad():
        windows = F.pad(tokens, (size - 1, 0)).unfold(1, size, 1)
        prime = torch.tensor(PRIME, device=tokens.device)
        powers = torch.stack([prime**i for i in range(size)])
        return (windows * powers).sum(-1) % vocab


def blt_hashes(tokens: Tensor, sizes: Sequence[int], vocab: int) -> Tensor:
    """Return the rows of all tables, ``[N, B, S]``."""
    return torch.stack([blt_hash(tokens, size, vocab) for size in sizes])


def blt_embed(
    tokens: Tensor, tables: Sequence[Tensor], byte_table: Tensor, sizes: Sequence[int], *, sparse: bool = False
) -> Tensor:
    """Hash, embed and add for each table in turn, as facebookresearch/blt does."""
    out = F.embedding(tokens, byte_table, sparse=sparse)
    for table, size in zip(tables, sizes, strict=True):
        out = out + F.embedding(blt_hash(tokens, size, table.shape[0]), table, sparse=sparse)
    return out


def transformers_hashes() -> Callable[[Tensor, Sequence[int], int], Tensor] | None:
    """Return transformers' hash function over all sizes, or None if it is not installed."""
    try:
        from transformers.models.blt.modeling_blt import byte_group_hash_function
    except ImportError:
        return None

    def hashes(tokens: Tensor, sizes: Sequence[int], vocab: int) -> Tensor:
        return torch.stack([byte_group_hash_function(tokens, size, PRIME, vocab) for size in sizes])

    return hashes


def transformers_embed() -> Callable[..., Tensor] | None:
    """Return transformers' embeddings, of one fused table ``[N * V, D]``, or None if it is not installed."""
    try:
        from transformers.models.blt.modeling_blt import compute_hash_embeddings
    except ImportError:
        return None

    def embed(
        tokens: Tensor, fused: Tensor, byte_table: Tensor, sizes: Sequence[int], *, sparse: bool = False
    ) -> Tensor:
        encoder = SimpleNamespace(embed_tokens=partial(F.embedding, weight=byte_table, sparse=sparse))
        table = partial(F.embedding, weight=fused, sparse=sparse)
        return compute_hash_embeddings(tokens, encoder, table, 1, list(sizes), fused.shape[0] // len(sizes))

    return embed


def bag_embed(tokens: Tensor, rows: Tensor, fused: Tensor, byte_table: Tensor, *, sparse: bool = False) -> Tensor:
    """Call torch's embedding_bag on given rows ``[T, N]`` of the fused table, and add the byte embedding."""
    out = F.embedding_bag(rows, fused, mode="sum", sparse=sparse).view(*tokens.shape, -1)
    return out + F.embedding(tokens, byte_table, sparse=sparse)
