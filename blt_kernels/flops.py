"""Counts FLOPs of the models: by the paper's formula, of this implementation, and while a model runs.

A multiply-add is two FLOPs. Only products of matrices are counted, those of attention included, and not norms, softmax,
rotary positions, lookups and pooling. Attention counts the unmasked (query, key) pairs, and not the masked pairs of a
tile. Unless they are said to be per byte, numbers are for a whole text; `Flops.per_byte` divides.

`paper_flops` is appendix B of the BLT paper (arXiv 2412.09871). Of a byte or a patch, with width h, r queries a key and
a context of m, a layer costs

    attention 4 h (m + 1) / 2     projections (2 r + 2) 2 h^2     feed-forward 2 * 2 h * 4 h     output 2 h V, once

with which a byte of BLT with patches of p bytes costs

    T(global, m = context / p) / p + T(encoder, m = window) + T(decoder, m = window, V = 256)
    + X(encoder, m = p, r = p / K) K / p + X(decoder, m = K, r = K / p)

for T all of a layer and X attention and projections, and twice that backward. `count_flops` takes the widths of the
model (feed-forwards rounded to 256, grouped heads, the projections between the widths, 260 ids), its rows, and the
scores that the backward of the ops computes again, once (Triton's computes them twice). Importing this file teaches
`torch.utils.flop_counter.FlopCounterMode` the ops, forward and backward, so that it counts what `count_flops` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from blt_kernels.layout import PatchLayout
from blt_kernels.models.config import BLTConfig, ByteLMConfig, MegaByteConfig
from blt_kernels.nn import TransformerConfig
from blt_kernels.reference.block_causal_attention import AttentionMask

Config = BLTConfig | ByteLMConfig | MegaByteConfig

# Of a (query, key) pair and an element of its heads: two products, and five backward, where the scores are made anew.
_FORWARD, _BACKWARD = 4, 10


@dataclass(frozen=True)
class Part:
    """FLOPs of one part of a model."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Part) -> Part:
        return Part(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Part:
        return Part(self.forward * factor, self.backward * factor)


PARTS = ("encoder", "encoder cross", "global", "decoder cross", "decoder", "projections", "output")


@dataclass(frozen=True)
class Flops:
    """FLOPs by part: `PARTS`, as far as the model has them.

    "encoder cross" and "decoder cross" are the cross attentions, "projections" what leads from one width to another
    around the global transformer, "decoder" the layers of a model that has no others, or the local model of MegaByte.
    `patcher` is what the entropy model of a BLT costs besides: forward only.
    """

    parts: dict[str, Part]
    patcher: float = 0.0

    @property
    def total(self) -> Part:
        """The sum of all parts, without the patcher."""
        return sum(self.parts.values(), Part())

    def per_byte(self, num_bytes: float) -> Flops:
        """Divide by the number of bytes."""
        return Flops({name: part * (1 / num_bytes) for name, part in self.parts.items()}, self.patcher / num_bytes)


# --- the paper's formula ----------------------------------------------------------------------------------------------


def paper_flops(config: Config, patch_size: float, context: float = 16384) -> Flops:
    """Return FLOPs of a byte by the formula of the BLT paper.

    Parameters
    ----------
    config : BLTConfig, ByteLMConfig or MegaByteConfig
        Of the MegaByte configuration, `patch_size` counts, not the argument.
    patch_size : float
        Bytes of a patch on average.
    context : float
        Bytes of a row, which attention without a window attends to.
    """
    if isinstance(config, ByteLMConfig):
        return _by_paper({"decoder": _paper_layers(config, context), "output": 2 * config.dim * config.vocab_size})
    if isinstance(config, MegaByteConfig):
        size, local = config.patch_size, config.local_transformer
        parts = {"global": _paper_layers(config.global_transformer, context / size) / size}
        parts |= {"decoder": _paper_layers(local, size), "output": 2 * local.dim * config.vocab_size}
        return _by_paper(parts)
    encoder, decoder, k = config.encoder, config.decoder, config.queries_per_patch
    crossed_encoder = encoder.num_layers if config.cross_attn_all_layers_encoder else 1
    crossed_decoder = decoder.num_layers if config.cross_attn_all_layers_decoder else 1
    parts = {
        "encoder": _paper_layers(encoder, context),
        "encoder cross": crossed_encoder * _paper_cross(encoder.dim, patch_size, patch_size / k) * k / patch_size,
        "global": _paper_layers(config.global_transformer, context / patch_size) / patch_size,
        "decoder cross": crossed_decoder * _paper_cross(decoder.dim, k, k / patch_size),
        "decoder": _paper_layers(decoder, context),
        "output": 2 * decoder.dim * 256,
    }
    patcher = 0.0 if config.patcher is None else paper_flops(config.patcher, patch_size, context).total.forward
    return _by_paper(parts, patcher)


def _by_paper(parts: dict[str, float], patcher: float = 0.0) -> Flops:
    return Flops({name: Part(flops, 2 * flops) for name, flops in parts.items()}, patcher)


def _paper_layers(config: TransformerConfig, context: float) -> float:
    seen = context if config.window is None else min(config.window, context)
    return config.num_layers * (_paper_cross(config.dim, seen, 1) + 16 * config.dim**2)


def _paper_cross(dim: int, context: float, queries_per_key: float) -> float:
    return 4 * dim * (context + 1) / 2 + (2 * queries_per_key + 2) * 2 * dim**2


def _paper_size(
    local: tuple[int, int, int], wide: tuple[int, int, int], decoder_layers: int, queries_per_patch: int
) -> BLTConfig:
    layers, heads, dim = local
    global_layers, global_heads, global_dim = wide
    return BLTConfig(
        encoder=TransformerConfig(dim, layers, heads, window=512),
        global_transformer=TransformerConfig(global_dim, global_layers, global_heads),
        decoder=TransformerConfig(dim, decoder_layers, heads, window=512),
        queries_per_patch=queries_per_patch,
    )


# Table 10 of the BLT paper: (layers, heads, width) of the encoder and of the global transformer, layers of the decoder,
# which is as wide as the encoder, and K.
PAPER_SIZES: dict[str, BLTConfig] = {
    "400M": _paper_size((1, 12, 768), (24, 10, 1280), 7, 2),
    "1B": _paper_size((1, 16, 1024), (25, 16, 2048), 9, 2),
    "2B": _paper_size((1, 16, 1024), (26, 20, 2560), 9, 3),
    "4B": _paper_size((1, 16, 1024), (36, 24, 3072), 9, 3),
    "8B": _paper_size((1, 20, 1280), (32, 32, 4096), 6, 4),
}


# --- this implementation ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The bytes and the patches of every row that a model is run on. Averages need not be whole numbers."""

    num_bytes: Sequence[float]
    num_patches: Sequence[float]

    @staticmethod
    def even(context: float, patch_size: float) -> Rows:
        """Return one row of `context` bytes in patches of `patch_size` bytes."""
        return Rows([context], [context / patch_size])

    @staticmethod
    def of(layout: PatchLayout) -> Rows:
        """Return the rows of a layout, which waits for the device."""
        return Rows(layout.cu_seqlens.diff().tolist(), layout.cu_patches.diff().tolist())


def count_flops(config: Config, rows: Rows) -> Flops:
    """Return FLOPs of this implementation for `rows`, if every row is a document and its patches are equally long.

    A model that is trained computes the gradient of everything but of the patcher. On the CPU, and with the layouts of
    `PatchLayout.compact`, there are no empty patches.
    """
    total = sum(rows.num_bytes)
    if isinstance(config, ByteLMConfig):
        output = _matrices(total, config.dim * config.vocab_size)
        return Flops({"decoder": _layers(config, rows.num_bytes), "output": output})
    if isinstance(config, MegaByteConfig):
        return _count_megabyte(config, rows)
    encoder, decoder, wide, k = config.encoder, config.decoder, config.global_transformer, config.queries_per_patch
    patches = sum(rows.num_patches)
    local = k * encoder.dim  # width of a patch before the global transformer
    entry = 0 if local == wide.dim else local * wide.dim
    every = config.cross_attn_all_layers_encoder and not config.pool_every_layer
    crossed_encoder = encoder.num_layers if every else 1
    crossed_decoder = decoder.num_layers if config.cross_attn_all_layers_decoder else 1
    # Every byte meets the K vectors of the patches in its window: fewer at the start of a row are not counted.
    read, written = config.cross_attn_window_encoder or 1, config.cross_attn_window_decoder or 1
    across = config.cross_attention(encoder), config.cross_attention(decoder)
    parts = {
        "encoder": _layers(encoder, rows.num_bytes),
        "encoder cross": _cross(across[0], patches * k, total, total * k * read) * crossed_encoder,
        "global": _layers(wide, rows.num_patches),
        "decoder cross": _cross(across[1], total, patches * k, total * k * written) * crossed_decoder,
        "decoder": _layers(decoder, rows.num_bytes),
        "projections": _matrices(patches, encoder.dim * local + entry + wide.dim * k * decoder.dim),
        "output": _matrices(total, decoder.dim * config.vocab_size),
    }
    patcher = 0.0 if config.patcher is None else count_flops(config.patcher, rows).total.forward
    return Flops(parts, patcher)


def _count_megabyte(config: MegaByteConfig, rows: Rows) -> Flops:
    """Count a MegaByte. A row has a slot more than bytes, for the byte after its last; patches have the most room."""
    wide, local, size = config.global_transformer, config.local_transformer, config.patch_size
    total, width = sum(rows.num_bytes), wide.dim // size
    slots = [n + 1 for n in rows.num_bytes]
    capacity = total // size + len(slots)
    patches = [-(-n // size) for n in slots]
    own = sum((n // size) * _pairs(size, None) + _pairs(n % size, None) for n in slots)
    before = config.cross_patch * sum(n - min(n, size) for n in slots)  # pairs with the patch before
    parts = {
        "global": _layers(wide, patches) + _matrices(capacity - sum(patches), _weights(wide)),
        "decoder": _matrices(sum(slots), _weights(local)) + _attention(local.dim, own + before) * local.num_layers,
        "projections": _matrices(capacity, wide.dim * local.dim),
        "output": _matrices(total, local.dim * config.vocab_size),
    }
    if config.conv_sizes:
        parts["encoder"] = _matrices(total + 1, sum(config.conv_sizes) * width**2)
    return Flops(parts)


def _cross(config: TransformerConfig, queries: float, keys: float, pairs: float) -> Part:
    """Count one cross attention."""
    key_dim = config.kv_heads * config.head_dim
    matrices = _matrices(queries, 2 * config.dim**2) + _matrices(keys, 2 * config.dim * key_dim)
    return matrices + _attention(config.dim, pairs)


def _layers(config: TransformerConfig, lengths: Sequence[float]) -> Part:
    """Count a stack of layers over rows of these lengths."""
    attention = _attention(config.dim, sum(_pairs(n, config.window) for n in lengths))
    return _matrices(sum(lengths), _weights(config)) + attention * config.num_layers


def _weights(config: TransformerConfig) -> int:
    """Return the number of weights of all matrices of a stack."""
    heads = 2 * config.dim * (config.dim + config.kv_heads * config.head_dim)
    return config.num_layers * (heads + 3 * config.dim * config.hidden_dim)


def _matrices(vectors: float, weights: float) -> Part:
    """Count `vectors` through matrices of so many weights, and backward the gradients of both."""
    return Part(2 * vectors * weights, 4 * vectors * weights)


def _attention(width: int, pairs: float) -> Part:
    return Part(_FORWARD * width * pairs, _BACKWARD * width * pairs)


def _pairs(length: float, window: int | None) -> float:
    """Return the (query, key) pairs of a causal row: the sum of min(i, window) for i = 1 ... length."""
    if window is None or length <= window:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


# --- counted while running --------------------------------------------------------------------------------------------

# Where the parts of a model are: of a module's name, the longest of these that it begins with.
_PLACES = {
    "BLT.local_encoder": "encoder",
    "BLT.local_encoder.cross_attn_layers": "encoder cross",
    "BLT.local_encoder.patch_embedding_projection": "projections",
    "BLT.global_transformer": "global",
    "BLT.global_transformer.token_embedding_projection": "projections",
    "BLT.local_decoder": "decoder",
    "BLT.local_decoder.cross_attn_layers": "decoder cross",
    "BLT.local_decoder.patch_embedding_projection": "projections",
    "BLT.lm_head": "output",
    "BLT.patcher": "patcher",
    "ByteLM.layers": "decoder",
    "ByteLM.lm_head": "output",
    "MegaByte.patch_convolutions": "encoder",
    "MegaByte.global_layers": "global",
    "MegaByte.global_to_local": "projections",
    "MegaByte.local_layers": "decoder",
    "MegaByte.lm_head": "output",
}


def counted_parts(counts: dict[str, dict[Any, int]]) -> dict[str, int]:
    """Return the counts of `FlopCounterMode.get_flop_counts` of a forward pass by part: `PARTS`, and "patcher".

    A backward pass cannot be divided so: the counter ascribes some of it to other modules.
    """
    total = {name: sum(ops.values()) for name, ops in counts.items() if name != "Global"}
    parts: dict[str, int] = {}
    for name, flops in total.items():
        inside = sum(other for child, other in total.items() if _outer(child, total) == name)
        place = name if name in _PLACES else _outer(name, _PLACES)
        if flops > inside:
            part = "unknown" if place is None else _PLACES[place]
            parts[part] = parts.get(part, 0) + flops - inside
    return parts


def _outer(name: str, names: Mapping[str, object]) -> str | None:
    """Return the innermost module of `names` that the module `name` is inside of."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return None


_OPS = torch.ops.blt_kernels


@register_flop_formula(_OPS.block_causal_attention_fwd, get_raw=True)
def _(q: Tensor, k: Tensor, _v: Tensor, *rows: Any, **_out: Any) -> int:
    return _FORWARD * q.shape[1] * q.shape[2] * _visited(q, k, *rows)


@register_flop_formula(_OPS.block_causal_attention_bwd, get_raw=True)
def _(_grad: Tensor, q: Tensor, k: Tensor, _v: Tensor, _out: Tensor, _lse: Tensor, *rows: Any, **_outs: Any) -> int:
    return _BACKWARD * q.shape[1] * q.shape[2] * _visited(q, k, *rows)


@register_flop_formula(_OPS.patch_cross_attention_fwd, get_raw=True)
def _(q: Tensor, _k: Tensor, _v: Tensor, *patches: Any, **_out: Any) -> int:
    return _FORWARD * q.shape[1] * q.shape[2] * _crossed(*patches)


@register_flop_formula(_OPS.patch_cross_attention_bwd, get_raw=True)
def _(_grad: Tensor, q: Tensor, _k: Tensor, _v: Tensor, _out: Tensor, _lse: Tensor, *patches: Any, **_outs: Any) -> int:
    return _BACKWARD * q.shape[1] * q.shape[2] * _crossed(*patches)


def _visited(q: Tensor, k: Tensor, *arguments: Any) -> int:
    """Return the (query, key) pairs of block_causal_attention."""
    mask, _ = AttentionMask.of_schema(*arguments)
    first, last = mask.with_offsets(q, k).keys_of_queries(q.shape[0], k.shape[0])
    return int((last - first).sum())


def _crossed(
    _offsets: Tensor,
    cu_patches: Tensor,
    ids: Tensor,
    direction: str,
    queries_per_patch: int,
    window: int | None,
    _scale: float | None,
) -> int:
    """Return the pairs of patch_cross_attention: a byte meets the K vectors of up to `window` patches of its row."""
    patch = ids[ids >= 0].long()
    row = torch.searchsorted(cu_patches[1:].long(), patch, right=True)
    # Encoding, a byte is read by its patch and those behind; decoding, it reads its patch and those before.
    there = cu_patches[row + 1] - patch if direction == "encode" else patch - cu_patches[row] + 1
    return queries_per_patch * int(there.clamp(max=window or 1).sum())
