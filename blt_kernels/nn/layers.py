"""`ByteLM`, `BLT` and `MegaByte` are composed of these layers over packed data.

They are Llama's blocks: RMSNorm, rotary positions in interleaved pairs, SwiGLU, no biases.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from blt_kernels import _checks
from blt_kernels._checks import Documents
from blt_kernels.layout import AttentionRanges, PatchLayout
from blt_kernels.nn.cache import CachedKeys
from blt_kernels.nn.config import TransformerConfig
from blt_kernels.nn.functional import rms_norm, swiglu
from blt_kernels.nn.positions import rotate
from blt_kernels.ops.few_row_linear import linear as product


def init_normal(weight: Tensor, std: float) -> None:
    """Draw a weight from a normal distribution, truncated at three deviations.

    Parameters
    ----------
    weight : floating, any shape
        Written in place. A fake tensor is left as it is.
    std : float

    Examples
    --------
    >>> weight = torch.empty(1000)
    >>> init_normal(weight, std=0.1)
    >>> bool(weight.abs().max() <= 0.3)
    True
    """
    if not isinstance(weight, FakeTensor):  # torch reads the values and draws again until all of them fit
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


class Linear(nn.Linear):
    """Multiplies by its weight, a few rows by the kernel of `few_row_linear`.

    It takes the arguments of `torch.nn.Linear`.

    Examples
    --------
    >>> layer = Linear(3, 2, bias=False)
    >>> layer(torch.zeros(4, 3)).tolist() == [[0.0, 0.0]] * 4
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last dimension.

        Parameters
        ----------
        x : floating ``[..., K]``

        Returns
        -------
        ``[..., N]``
        """
        return product(x, self.weight) if self.bias is None else super().forward(x)


def linear(in_features: int, out_features: int) -> Linear:
    """Return a layer without bias, drawn by `init_normal` with deviation ``in_features^-0.5``.

    Parameters
    ----------
    in_features, out_features : int

    Returns
    -------
    Linear

    Examples
    --------
    >>> linear(4, 2)
    Linear(in_features=4, out_features=2, bias=False)
    """
    layer = Linear(in_features, out_features, bias=False)
    init_normal(layer.weight, in_features**-0.5)
    return layer


def embedding(rows: int, dim: int) -> nn.Embedding:
    """Return a table drawn by `init_normal` with deviation 0.5, about that of the update of a layer.

    Parameters
    ----------
    rows, dim : int

    Returns
    -------
    torch.nn.Embedding

    Examples
    --------
    >>> embedding(260, 8)
    Embedding(260, 8)
    """
    table = nn.Embedding(rows, dim)
    init_normal(table.weight, 0.5)
    return table


class RMSNorm(nn.RMSNorm):
    """Computes ``x / sqrt(mean(x^2) + eps) * weight`` in the dtype of the weight.

    It takes the arguments of `torch.nn.RMSNorm`.

    Examples
    --------
    >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, -3.0])).detach().round(decimals=3).tolist()
    [1.0, -1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension.

        Parameters
        ----------
        x : floating ``[..., D]``
            Converted to the dtype of the weight: autocast gives bf16.

        Returns
        -------
        dtype of the weight ``x.shape``
        """
        x = x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
        if not _checks.readable(x):
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps  # as torch does
        return rms_norm(x, self.weight, eps)


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

    Examples
    --------
    >>> layer = CrossAttention(TransformerConfig(8, 1, 2), load_ops("fused"), "encode", queries_per_patch=1)
    >>> layout = static_patch(torch.tensor([0, 5]), 2).compact()  # 3 patches
    >>> layer(torch.randn(3, 8), torch.randn(5, 8), layout).shape
    torch.Size([3, 8])
    """

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
        self.q_norm = RMSNorm(config.dim, config.norm_eps)
        self.k_norm = RMSNorm(config.dim, config.norm_eps)
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.dim, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.dim, config.dim)

    def forward(self, queries: Tensor, states: Tensor | tuple[Tensor, Tensor], layout: PatchLayout) -> Tensor:
        """Return the update of the queries, without their residual.

        Parameters
        ----------
        queries : floating ``[C * K, D]`` to encode, ``[T, D]`` to decode
        states : floating ``[T, D]`` to encode, ``[C * K, D]`` to decode
            Keys and values are computed from them. Or what `keys` returned for them.
        layout : PatchLayout

        Returns
        -------
        ``queries.shape``
        """
        k, v = states if isinstance(states, tuple) else self.keys(states)
        q = self.q_proj(self.q_norm(queries)).unflatten(-1, (-1, self.head_dim))
        out = self.attention(
            q, k, v, layout, direction=self.direction, queries_per_patch=self.queries_per_patch, window=self.window
        )
        return self.o_proj(out.flatten(-2))

    def keys(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of what is read.

        Parameters
        ----------
        states : floating ``[*, D]``

        Returns
        -------
        k, v : ``[*, G, E]``
        """
        states = self.k_norm(states)
        k, v = (p(states).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        return k, v


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
    recompute : bool
        If True, backward computes the layer again, and only its input is kept until then.

    Examples
    --------
    >>> config = TransformerConfig(dim=8, num_layers=1, num_heads=2)
    >>> table = rotary_table(torch.arange(5), config, torch.float32)
    >>> TransformerLayer(config, load_ops("fused"))(torch.randn(5, 8), table, torch.tensor([0, 5])).shape
    torch.Size([5, 8])
    """

    recompute = False

    def __init__(self, config: TransformerConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = SelfAttention(config, ops)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

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
        if self.recompute and torch.is_grad_enabled():  # a layer draws no random numbers
            return checkpoint(self._layer, x, table, documents, ranges, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x, table, documents, ranges)

    def _layer(
        self, x: Tensor, table: Tensor, documents: Tensor | Documents | CachedKeys, ranges: AttentionRanges | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), table, documents, ranges)
        return x + self.mlp(self.post_attention_layernorm(x))
