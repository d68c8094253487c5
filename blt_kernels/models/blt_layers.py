"""A BLT has three parts: encoder, global transformer and decoder.

Each takes packed data and its documents, or a list of the `CachedKeys` of its layers in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from blt_kernels.layout import AttentionRanges, PatchLayout
from blt_kernels.models.config import BLTConfig
from blt_kernels.nn import CrossAttention, RMSNorm, TransformerLayer, embedding, linear, run_layers
from blt_kernels.nn.cache import of_layers
from blt_kernels.nn.few_rows import few_rows
from blt_kernels.nn.matrices import multiply_normed


class LocalEncoder(nn.Module):
    """Encodes bytes as patches: layers over bytes, max pooling, cross attention from the patches to their own bytes."""

    def __init__(self, config: BLTConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        layer, queries = config.encoder, config.queries_per_patch
        self.patch_pool, self.queries_per_patch = ops.patch_pool, queries
        self.all_layers, self.pool_every_layer = config.cross_attn_all_layers_encoder, config.pool_every_layer
        self.embed_tokens = embedding(config.vocab_size, layer.dim)
        self.layers = nn.ModuleList(TransformerLayer(layer, ops) for _ in range(layer.num_layers))
        self.patch_embedding_projection = linear(layer.dim, queries * layer.dim)
        count = layer.num_layers if self.all_layers else 1
        cross, window = config.cross_attention(layer), config.cross_attn_window_encoder
        self.cross_attn_layers = nn.ModuleList(
            CrossAttention(cross, ops, "encode", queries, window) for _ in range(count)
        )

    @property
    def num_states(self) -> int:
        """The number of states of the bytes that `pool` reads."""
        return len(self.layers) if self.all_layers and not self.pool_every_layer else 1

    def forward(
        self, x: Tensor, table: Tensor, documents: Any, layout: PatchLayout, ranges: AttentionRanges | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return bytes ``[T, D]`` after the layers, and patches ``[C, K * D]``."""
        states = self.states(x, table, documents, ranges)
        return states[-1], self.pool(states, layout)

    def states(self, x: Tensor, table: Tensor, documents: Any, ranges: AttentionRanges | None = None) -> list[Tensor]:
        """Return bytes ``[T, D]`` after the layers that patches read: every one, or the last."""
        if self.num_states == 1:
            return [run_layers(self.layers, x, table, documents, ranges)]
        states = []
        for layer, own in zip(self.layers, of_layers(documents, len(self.layers)), strict=True):
            x = run_layers((layer,), x, table, [own] if isinstance(documents, list) else own, ranges)
            states.append(x)
        return states

    def pool(self, states: Sequence[Tensor], layout: PatchLayout) -> Tensor:
        """Return patches ``[C, K * D]`` of the bytes after these layers."""
        pooled = self.patch_pool(states[0], layout, "max")
        patches = self.patch_embedding_projection(pooled).view(-1, pooled.shape[-1]).to(pooled.dtype)  # [C * K, D]
        for x, cross in zip(states, self.cross_attn_layers[-len(states) :], strict=True):
            # The residual is added twice: the released models were trained so.
            patches = cross(patches, x, layout, residual_factor=2.0)
        return patches.unflatten(0, (-1, self.queries_per_patch)).flatten(1)


class GlobalTransformer(nn.Module):
    """Runs layers over patches, after a projection to their width."""

    def __init__(self, config: BLTConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        layer, width = config.global_transformer, config.queries_per_patch * config.encoder.dim
        self.token_embedding_projection = nn.Identity() if width == layer.dim else linear(width, layer.dim)
        self.layers = nn.ModuleList(TransformerLayer(layer, ops) for _ in range(layer.num_layers))

    def forward(self, patches: Tensor, table: Tensor, documents: Any, ranges: AttentionRanges | None = None) -> Tensor:
        x = self.token_embedding_projection(patches).to(patches.dtype)  # residuals keep their dtype under autocast
        return run_layers(self.layers, x, table, documents, ranges)


class LocalDecoder(nn.Module):
    """Decodes patches to bytes: before each layer, or the first, bytes read the last patch that closed before them."""

    def __init__(self, config: BLTConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        layer, queries = config.decoder, config.queries_per_patch
        self.queries_per_patch = queries
        count = layer.num_layers if config.cross_attn_all_layers_decoder else 1
        self.patch_embedding_projection = linear(config.global_transformer.dim, queries * layer.dim)
        cross, window = config.cross_attention(layer), config.cross_attn_window_decoder
        self.cross_attn_layers = nn.ModuleList(
            CrossAttention(cross, ops, "decode", queries, window) for _ in range(count)
        )
        self.layers = nn.ModuleList(TransformerLayer(layer, ops) for _ in range(layer.num_layers))
        self.norm = RMSNorm(layer.dim, layer.norm_eps)

    def forward(
        self, x: Tensor, patches: Tensor | list[tuple[Tensor, Tensor]], table: Tensor, documents: Any,
        layout: PatchLayout, ranges: AttentionRanges | None = None,
    ) -> Tensor:  # fmt: skip
        """Return bytes ``[T, D]`` after layers and norm.

        `patches` may also be keys and values ``[C, K, G, E]`` for every cross attention: those that `keys` returned.
        """
        return self.norm(self.states(x, patches, table, documents, layout, ranges))

    def states(
        self, x: Tensor, patches: Tensor | list[tuple[Tensor, Tensor]], table: Tensor, documents: Any,
        layout: PatchLayout, ranges: AttentionRanges | None = None, head: Sequence[Any] = (),
    ) -> Tensor:  # fmt: skip
        """Return bytes ``[T, D]`` after the layers, or what the norm and the matrix of a `head` make of them."""
        if isinstance(patches, list) and isinstance(documents, list):
            y = few_rows(
                [*self.layers], x, table, documents, [*self.cross_attn_layers], patches, layout.decode_ids, head
            )
            if y is not None:
                return y
        read = patches if isinstance(patches, list) else [self.vectors(patches)] * len(self.cross_attn_layers)
        for i, (layer, own) in enumerate(zip(self.layers, of_layers(documents, len(self.layers)), strict=True)):
            if i < len(self.cross_attn_layers):
                x = self.cross_attn_layers[i](x, read[i], layout, residual_factor=2.0)
            x = layer(x, table, own, ranges)
        return multiply_normed(head[0], x, head[1])[0] if head else x

    def vectors(self, patches: Tensor) -> Tensor:
        """Return the vectors that bytes read, ``[C * K, D]``."""
        return self.patch_embedding_projection(patches).view(-1, self.norm.weight.shape[0])

    def keys(self, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values ``[C, K, G, E]`` of patches for every cross attention."""
        vectors = self.vectors(patches)
        pairs = [cross.keys(vectors) for cross in self.cross_attn_layers]  # type: ignore[operator]
        shape = patches.shape[0], self.queries_per_patch, *pairs[0][0].shape[1:]
        return [(k.view(shape), v.view(shape)) for k, v in pairs]
