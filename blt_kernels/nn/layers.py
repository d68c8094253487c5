"""`ByteLM`, `BLT` and `MegaByte` are composed of these layers over packed data.

They are Llama's blocks: RMSNorm, rotary positions in interleaved pairs, SwiGLU, no biases.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels.layout import AttentionRanges, PatchLayout
from blt_kernels.nn.cache import CachedKeys
from blt_kernels.nn.config import TransformerConfig
from blt_kernels.nn.functional import swiglu
from blt_kernels.nn.matrices import RMSNorm, add_product, linear, multiply_normed
from blt_kernels.nn.positions import rotate
from blt_kernels.nn.recompute import again, block_rows, documents_within, joined, recomputes, run_block


class SelfAttention(nn.Module):
    """Attends causally within documents, with rotary positions.

    With `CachedKeys` in the place of documents, queries attend to the keys of earlier calls as well.

    Parameters
    ----------
    config : TransformerConfig
    ops : namespace
        The functions of `load_ops`.

    Examples
    --------
    >>> config = TransformerConfig(dim=8, num_layers=1, num_heads=2)
    >>> table = rotary_table(torch.arange(5), config, torch.float32)
    >>> SelfAttention(config, load_ops("fused"))(torch.randn(5, 8), table, torch.tensor([0, 3, 5])).shape
    torch.Size([5, 8])
    """

    def __init__(self, config: TransformerConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.attention, self.window, self.head_dim = ops.block_causal_attention, config.window, config.head_dim
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.dim, config.dim)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        documents: Tensor | Documents | CachedKeys,
        ranges: AttentionRanges | None = None,
    ) -> Tensor:
        """Return the update of `x`, without its residual.

        Parameters
        ----------
        x : floating ``[T, D]``
        table : complex ``[T, 1, E/2]``
            Of `rotary_table`.
        documents : int32 ``[B+1]``
        ranges : AttentionRanges, optional
            Of `layer_ranges`.

        Returns
        -------
        ``[T, D]``
        """
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, table), rotate(k, table)
        if isinstance(documents, CachedKeys):
            out = self.attention(q, *documents.write(k, v), window=self.window, **documents.documents)
        else:
            out = self.attention(q, k, v, documents, window=self.window, ranges=ranges)
        return self.o_proj(out.flatten(-2))


class CrossAttention(nn.Module):
    """Attends from patches to their bytes, or from bytes to patches.

    Parameters
    ----------
    config : TransformerConfig
        Width and heads.
    ops : namespace
        The functions of `load_ops`.
    direction : "encode" or "decode"
        Patches are the queries, or bytes are: see `patch_cross_attention`.
    queries_per_patch : int
    window : int, optional
        In patches.

    Attributes
    ----------
    recompute : bool, optional
        As in `TransformerLayer`.

    Examples
    --------
    >>> layer = CrossAttention(TransformerConfig(8, 1, 2), load_ops("fused"), "encode", queries_per_patch=1)
    >>> layout = static_patch(torch.tensor([0, 5]), 2).compact()  # 3 patches
    >>> layer(torch.randn(3, 8), torch.randn(5, 8), layout).shape
    torch.Size([3, 8])
    """

    recompute: bool | None = None

    def __init__(
        self,
        config: TransformerConfig,
        ops: SimpleNamespace,
        direction: str,
        queries_per_patch: int,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.head_dim, self.window = ops.patch_cross_attention, config.head_dim, window
        self.direction, self.queries_per_patch = direction, queries_per_patch
        self.num_layers, self.kept = config.num_layers, 3 * config.dim  # floats a row of queries
        self.q_norm = RMSNorm(config.dim, config.norm_eps)
        self.k_norm = RMSNorm(config.dim, config.norm_eps)
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.dim, config.dim)

    def forward(
        self,
        queries: Tensor,
        states: Tensor | tuple[Tensor, Tensor],
        layout: PatchLayout,
        residual_factor: float = 0.0,
    ) -> Tensor:
        """Return the update of the queries, and `residual_factor` times the queries themselves.

        Parameters
        ----------
        queries : floating ``[C * K, D]`` to encode, ``[T, D]`` to decode
        states : floating ``[T, D]`` to encode, ``[C * K, D]`` to decode
            Keys and values are computed from them. Or what `keys` returned for them, with a dimension of patches.
        layout : PatchLayout
        residual_factor : float

        Returns
        -------
        ``queries.shape``
        """
        if not isinstance(states, tuple):
            rows = queries.shape[0] + states.shape[0]
            if recomputes(self.recompute, queries, self.num_layers * rows * self.kept):
                return again(self._attend, queries, states, layout, residual_factor)
        return self._attend(queries, states, layout, residual_factor)

    def _attend(
        self, queries: Tensor, states: Tensor | tuple[Tensor, Tensor], layout: PatchLayout, residual_factor: float
    ) -> Tensor:
        k, v = (x.flatten(0, 1) for x in states) if isinstance(states, tuple) else self.keys(states)
        (q,) = multiply_normed(self.q_norm, queries, self.q_proj)
        q = q.unflatten(-1, (-1, self.head_dim))
        out = self.attention(
            q, k, v, layout, direction=self.direction, queries_per_patch=self.queries_per_patch, window=self.window
        )
        return add_product(self.o_proj, out.flatten(-2), queries, residual_factor)

    def keys(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of what is read.

        Parameters
        ----------
        states : floating ``[*, D]``

        Returns
        -------
        k, v : ``[*, G, E]``
        """
        k, v = multiply_normed(self.k_norm, states, self.k_proj, self.v_proj)
        heads = *states.shape[:-1], k.shape[-1] // self.head_dim, self.head_dim
        return k.view(heads), v.view(heads)


class FeedForward(nn.Module):
    """Computes SwiGLU: ``down(silu(gate(x)) * up(x))``.

    Parameters
    ----------
    config : TransformerConfig

    Examples
    --------
    >>> FeedForward(TransformerConfig(dim=8, num_layers=1, num_heads=2))(torch.randn(5, 8)).shape
    torch.Size([5, 8])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = linear(config.dim, config.hidden_dim)
        self.up_proj = linear(config.dim, config.hidden_dim)
        self.down_proj = linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x`, without its residual.

        Parameters
        ----------
        x : floating ``[T, D]``

        Returns
        -------
        ``[T, D]``
        """
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up) if _checks.readable(gate) else F.silu(gate) * up)


class TransformerLayer(nn.Module):
    """Applies attention and feed-forward, each with a norm before and a residual around it.

    Parameters
    ----------
    config : TransformerConfig
    ops : namespace
        The functions of `load_ops`.

    Attributes
    ----------
    recompute : bool, optional
        If True, backward computes the layer again, and only its input is kept until then. If None, it does so if the
        layers of `config` would keep more than `blt_kernels.nn.recompute.KEPT_BYTES` of these rows.

    Notes
    -----
    Where backward computes it again, and without gradients, a layer with a window computes many rows in blocks, each
    with the rows before it that its window reaches. The numbers are the same up to rounding.

    Examples
    --------
    >>> config = TransformerConfig(dim=8, num_layers=1, num_heads=2)
    >>> table = rotary_table(torch.arange(5), config, torch.float32)
    >>> TransformerLayer(config, load_ops("fused"))(torch.randn(5, 8), table, torch.tensor([0, 5])).shape
    torch.Size([5, 8])
    """

    recompute: bool | None = None

    def __init__(self, config: TransformerConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = SelfAttention(config, ops)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)
        widths = 6 * config.dim + 2 * config.kv_heads * config.head_dim + 3 * config.hidden_dim
        self.kept = config.num_layers * widths  # floats a row that the stack keeps for backward

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        documents: Tensor | Documents | CachedKeys,
        ranges: AttentionRanges | None = None,
    ) -> Tensor:
        """Return `x` with the updates of attention and feed-forward.

        Parameters
        ----------
        x, table, documents, ranges
            As in `SelfAttention.forward`. Layers of the same documents and window can share `ranges`.

        Returns
        -------
        ``[T, D]``
        """
        recompute = recomputes(self.recompute, x, x.shape[0] * self.kept)
        if (recompute or not torch.is_grad_enabled()) and isinstance(documents, (Tensor, Documents)):
            window = self.self_attn.window
            if window is not None and x.shape[0] > block_rows(window) and _checks.readable(x):
                return self._in_blocks(x, table, documents, block_rows(window), window - 1)
        if recompute:
            return again(self._layer, x, table, documents, ranges)
        return self._layer(x, table, documents, ranges)

    def _layer(
        self, x: Tensor, table: Tensor, documents: Tensor | Documents | CachedKeys, ranges: AttentionRanges | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), table, documents, ranges)
        return x + self.mlp(self.post_attention_layernorm(x))

    def _in_blocks(self, x: Tensor, table: Tensor, documents: Tensor | Documents, size: int, reach: int) -> Tensor:
        """Return the layer of blocks of `size` rows. Attention also reads the `reach` rows before a block."""
        blocks = x.split(size)

        def parts() -> Iterator[Tensor]:
            for i, block in enumerate(blocks):
                # Gradients of parts of a block are padded to the block, and of parts of `x` they would be to all of it.
                before = blocks[i - 1][max(size - reach, 0) :] if i else block[:0]
                first, stop = i * size - before.shape[0], i * size + block.shape[0]
                yield run_block(self._block, before, block, table[first:stop], documents_within(documents, first, stop))

        return joined(parts(), x.shape[0])

    def _block(self, before: Tensor, block: Tensor, table: Tensor, documents: Tensor | Documents) -> Tensor:
        """Return the rows of a block; the outputs of those before it are dropped, since they lack keys."""
        x = torch.cat((before, block))
        x = block + self.self_attn(self.input_layernorm(x), table, documents)[before.shape[0] :]
        return x + self.mlp(self.post_attention_layernorm(x))
