"""The local encoder and decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bytelatent.base_transformer import BaseTransformer, rotations
from bytelatent.model.latent_transformer import CrossAttention
from bytelatent.model.utils import create_causal_mask, downsample


class LocalModel(BaseTransformer):
    def __init__(self, dim: int, n_layers: int, n_heads: int, cross_layers: int, source: int, args: Any) -> None:
        super().__init__(dim, n_layers, n_heads, args)
        heads, eps = args.cross_attn_nheads, args.norm_eps
        self.cross_attn_layers = nn.ModuleList(
            CrossAttention(dim, dim // heads, heads, heads, eps) for _ in range(cross_layers)
        )
        self.patch_embedding_projection = nn.Linear(source, dim * args.cross_attn_k, bias=False)
        self.bias = "causal" if args.attn_impl == "sdpa" else "local_block_causal"
        self.window = args.local_attention_window_len

    def prepared(self, tokens: Tensor) -> tuple[Any, Tensor]:
        """Return the mask of self-attention, and positions."""
        mask = create_causal_mask(
            tokens.shape[1], self.attn_impl, self.bias, sliding_window=self.window, tokens=tokens, eos_id=self.eos_id
        )
        return mask, rotations(self.rope[0], tokens.shape[1], self.rope[1])

    def vectors(self, patches: Tensor) -> Tensor:
        """Project every patch to its vectors, ``[B, patches * K, D]``."""
        return self.patch_embedding_projection(patches).unflatten(-1, (-1, self.dim)).flatten(1, 2)


class LocalEncoder(LocalModel):
    def __init__(self, args: Any) -> None:
        layers, dim = args.n_layers_local_encoder, args.dim_local_encoder
        every = args.cross_attn_all_layers_encoder
        super().__init__(dim, layers, args.n_heads_local_encoder, layers if every else 1, dim, args)
        self.every, self.downsampling_by_pooling = every, args.downsampling_by_pooling
        self.tok_embeddings = nn.Embedding(args.vocab_size, dim)

    def forward(
        self, tokens: Tensor, embeds: Tensor, cross_mask: Any, num_patches: int, patch_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, vectors = embeds, None
        mask, freq_cis = self.prepared(tokens)
        for i, layer in enumerate(self.layers):
            h = layer(h, freq_cis, mask=mask, attn_impl=self.attn_impl)
            if not self.every and i < len(self.layers) - 1:
                continue
            if vectors is None:
                pooled = downsample(
                    h, num_patches, patch_ids=patch_ids, downsampling_by_pooling=self.downsampling_by_pooling
                )
                vectors = self.vectors(pooled)
            vectors = vectors + self.cross_attn_layers[i if self.every else 0](x=vectors, kv=h, mask=cross_mask)
        return h, vectors


class LocalDecoder(LocalModel):
    def __init__(self, args: Any) -> None:
        layers, dim = args.n_layers_local_decoder, args.dim_local_decoder
        every = args.cross_attn_all_layers_decoder
        super().__init__(dim, layers, args.n_heads_local_decoder, layers if every else 1, args.dim_global, args)
        self.every = every
        self.norm = nn.RMSNorm(dim, eps=args.norm_eps)
        self.output = nn.Linear(dim, args.vocab_size, bias=False)

    def forward(self, tokens: Tensor, embeds: Tensor, patch_embeds: Tensor, cross_mask: Any) -> Tensor:
        h, vectors = embeds, self.vectors(patch_embeds)
        mask, freq_cis = self.prepared(tokens)
        for i, layer in enumerate(self.layers):
            if i == 0 or self.every:
                h = h + self.cross_attn_layers[i](x=h, kv=vectors, mask=cross_mask)
            h = layer(h, freq_cis, mask=mask, attn_impl=self.attn_impl)
        return self.output(self.norm(h))
