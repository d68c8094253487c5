"""The hash embedding of transformers' BLT: one pass of our op, or our hashes and lookups of their module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from blt_kernels.integrations._applied import Applied
from blt_kernels.integrations._embeddings import unreadable
from blt_kernels.ops.ngram_hash_embed import ngram_hash, ngram_hash_embed
from blt_kernels.reference.ngram_hash_embed import PRIMES

LABEL = "compute_hash_embeddings"


def hash_embeddings(applied: Applied, stock: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return ``compute_hash_embeddings``."""

    def compute_hash_embeddings(
        local_encoder_tokens: Tensor,
        local_encoder: Any,
        encoder_hash_tok_embedding: Any,
        encoder_hash_byte_group_nb_functions: int,
        encoder_hash_byte_group_size: Sequence[int],
        encoder_hash_byte_group_vocab: int,
    ) -> Tensor:
        tokens, byte_table, tables = local_encoder_tokens, local_encoder.embed_tokens, encoder_hash_tok_embedding
        sizes, functions = list(encoder_hash_byte_group_size), encoder_hash_byte_group_nb_functions
        vocab = encoder_hash_byte_group_vocab
        if functions > len(PRIMES) or not sizes or functions < 1 or min(sizes) < 1:
            applied.fell_back(LABEL, f"{functions} hash functions of sizes {sizes}")
            return stock(tokens, local_encoder, encoder_hash_tok_embedding, functions, sizes, vocab)
        applied.count(LABEL)
        reason = unreadable(byte_table, [tables])
        if reason is None:
            return ngram_hash_embed(
                tokens, tables.weight, byte_table.weight, ngram_sizes=sizes, num_functions=functions, vocab=vocab
            )
        applied.fell_back(f"lookups of {LABEL}", reason)
        out = byte_table(tokens)
        hashes = ngram_hash(tokens, ngram_sizes=sizes, num_functions=functions, vocab=vocab)
        for number, rows in enumerate(hashes):
            out = out + tables(rows + number * vocab).to(out.device)
        return out

    return compute_hash_embeddings
