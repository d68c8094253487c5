"""The whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bytelatent.data.patcher import Patcher
from bytelatent.model.latent_transformer import GlobalTransformer
from bytelatent.model.local_models import LocalDecoder, LocalEncoder
from bytelatent.model.utils import downsample  # noqa: F401

primes = (1000000007, 5915587277, 1500450271)


def compute_hash_embeddings(
    local_encoder_tokens: Tensor,
    local_encoder: nn.Module,
    encoder_hash_tok_embedding: nn.ModuleList | None,
    encoder_hash_byte_group_nb_functions: int,
    encoder_hash_byte_group_size: list[int],
    encoder_hash_byte_group_vocab: int,
) -> Tensor | None:
    if encoder_hash_tok_embedding is None:
        return None
    out = local_encoder.tok_embeddings(local_encoder_tokens)
    tables = iter(encoder_hash_tok_embedding)
    for prime in primes[:encoder_hash_byte_group_nb_functions]:
        for size in encoder_hash_byte_group_size:
            hashes = torch.zeros_like(local_encoder_tokens)
            for age in range(size):  # the oldest id of the n-gram has the power 0
                shifted = torch.roll(local_encoder_tokens, age, 1)
                shifted[:, :age] = 0
                power = torch.tensor(prime) ** (size - 1 - age)
                hashes = hashes + shifted * power
            out = out + next(tables)(hashes % encoder_hash_byte_group_vocab)
    return out


def patch_ids_from_lengths(patch_lengths: Tensor, seq_len: int) -> Tensor:
    return (patch_lengths.cumsum(-1)[:, None] <= torch.arange(seq_len)[:, None]).sum(-1)


def cross_attn_mask(
    patch_ids: Tensor,
    patch_lengths: Tensor,
    N: int,
    patches_as_queries: bool = False,
    cross_attn_k: int = 1,
    window: int | None = None,
    block_mask: bool = True,
) -> Tensor:
    assert patch_ids.shape[1] == N
    slots = torch.arange(patch_lengths.shape[1]).repeat_interleave(cross_attn_k).expand(patch_ids.shape[0], -1)
    q, k = (slots, patch_ids) if patches_as_queries else (patch_ids, slots)
    distance = q[:, :, None] - k[:, None]
    return ((distance >= 0) & (distance < (1 if window is None else window)))[:, None]


class ByteLatentTransformer(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        self.args = args
        self.local_encoder, self.global_transformer = LocalEncoder(args), GlobalTransformer(args)
        self.local_decoder = LocalDecoder(args)
        tables = args.encoder_hash_byte_group_nb_functions * len(args.encoder_hash_byte_group_size)
        self.encoder_hash_tok_embedding = nn.ModuleList(
            nn.Embedding(args.encoder_hash_byte_group_vocab, args.dim_local_encoder) for _ in range(tables)
        )
        self.patcher: Patcher | None = None

    def forward(self, tokens: Tensor, patch_lengths: Tensor | None = None) -> Tensor:
        args, (rows, size) = self.args, tokens.shape
        if patch_lengths is None:
            assert self.patcher is not None
            patch_lengths, _ = self.patcher.patch(tokens, include_next_token=True)
        slots = patch_lengths.shape[1]
        patch_ids = patch_ids_from_lengths(patch_lengths, size)
        encoder_mask = cross_attn_mask(
            patch_ids, patch_lengths, size, patches_as_queries=True, cross_attn_k=args.cross_attn_k,
            window=args.cross_attn_window_encoder,
        )  # fmt: skip
        embeds = compute_hash_embeddings(
            tokens, self.local_encoder, self.encoder_hash_tok_embedding, args.encoder_hash_byte_group_nb_functions,
            args.encoder_hash_byte_group_size, args.encoder_hash_byte_group_vocab,
        )  # fmt: skip
        h, vectors = self.local_encoder(tokens, embeds, encoder_mask, slots, patch_ids)
        marks = tokens.new_zeros(rows, slots).scatter_reduce(1, patch_ids, (tokens == args.eos_id).long() * 2, "amax")
        patches = self.global_transformer(marks, vectors.view(rows, slots, -1))
        decode_ids = patch_ids_from_lengths(patch_lengths[:, 1:], size)
        decoder_mask = cross_attn_mask(
            decode_ids, patch_lengths, size, cross_attn_k=args.cross_attn_k, window=args.cross_attn_window_decoder
        )
        return self.local_decoder(tokens, h, patches, decoder_mask)
