"""The local encoder of facebookresearch/blt on our ops: the hash embedding, and pooling of bytes to patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from blt_kernels.integrations._embeddings import unreadable
from blt_kernels.integrations.bytelatent.replacement import Function, Place
from blt_kernels.layout import PatchLayout
from blt_kernels.ops.ngram_hash_embed import ngram_hash, ngram_hash_embed
from blt_kernels.ops.patch_pool import patch_pool
from blt_kernels.reference.ngram_hash_embed import PRIMES

# Reductions in the order in which they are concatenated, each with the parts of a mode that ask for it.
REDUCTIONS = (("mean", ("avg", "mean")), ("min", ("min",)), ("max", ("max",)))


def compute_hash_embeddings(place: Place) -> Function:
    """Return ``compute_hash_embeddings``: one pass of our op, or our hashes and lookups of their modules."""

    def compute_hash_embeddings(
        local_encoder_tokens: Tensor,
        local_encoder: Any,
        encoder_hash_tok_embedding: Any,
        encoder_hash_byte_group_nb_functions: int,
        encoder_hash_byte_group_size: Sequence[int],
        encoder_hash_byte_group_vocab: int,
    ) -> Tensor | None:
        tokens, tables, vocab = local_encoder_tokens, encoder_hash_tok_embedding, encoder_hash_byte_group_vocab
        if tables is None:
            return None
        sizes, functions = list(encoder_hash_byte_group_size), encoder_hash_byte_group_nb_functions
        if not 0 < functions <= len(PRIMES) or not sizes or functions * len(sizes) != len(tables):
            place.fell_back(f"{functions} functions of sizes {sizes} for {len(tables)} tables")
            return place.theirs(tokens, local_encoder, tables, functions, sizes, vocab)
        place.count()
        byte_table = local_encoder.tok_embeddings
        reason = unreadable(byte_table, tables)
        if reason is None and all(table.weight.shape[0] == vocab for table in tables):
            weights = [table.weight for table in tables]
            return ngram_hash_embed(tokens, weights, byte_table.weight, ngram_sizes=sizes, num_functions=functions)
        place.fell_back(f"lookups: {reason or f'tables of other than {vocab} rows'}")
        out = byte_table(tokens)
        for table, rows in zip(
            tables, ngram_hash(tokens, ngram_sizes=sizes, num_functions=functions, vocab=vocab), strict=True
        ):
            out = out + table(rows)
        return out

    return compute_hash_embeddings


def pooling_downsample(place: Place) -> Function:
    """Return ``pooling_downsample``: mean, min and max, each if the mode names it."""

    def pooling_downsample(h: Tensor, max_num_patches: int, pooling_mode: str, patch_ids: Tensor) -> Tensor:
        reduce = tuple(name for name, asked in REDUCTIONS if any(part in pooling_mode for part in asked))
        if not reduce:
            raise ValueError(f"pooling_mode: expected avg, mean, min or max in it, got {pooling_mode!r}")
        layout = PatchLayout.from_ids(patch_ids, patch_ids, max_num_patches)
        return patch_pool(h.flatten(0, 1), layout, reduce).unflatten(0, (h.shape[0], max_num_patches))

    return place.counted(pooling_downsample)
