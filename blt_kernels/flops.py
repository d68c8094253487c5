"""Counts FLOPs of the models: by the paper's formula, of this implementation, and while a model runs.

A multiply-add is two FLOPs. Only products of matrices are counted, those of attention included, and not norms, softmax,
rotary positions, lookups and pooling. Attention counts the unmasked (query, key) pairs, and not the masked pairs of a
tile. Numbers are for a whole text, and those of `paper_flops` for one byte.

There are two views of the entropy model of a BLT, the patcher. `Flops.total` leaves it out, as the paper does.
`Flops.with_patcher` counts its forward, which runs for every byte at inference and in every step of training unless
patches are stored. `Flops.training` counts all that a run costs, the training of the patcher included.

A model over tokens is a `ByteLMConfig` with a larger `vocab_size`, and its rows hold tokens; `Flops.per_byte` divides
by the bytes of the text.

`paper_flops` is appendix B of the BLT paper (arXiv 2412.09871). For a byte or a patch, with width h, r queries a key
and a context of m, a layer costs

    attention 4 h (m + 1) / 2     projections (2 r + 2) 2 h^2     feed-forward 2 * 2 h * 4 h     output 2 h V, once

and a byte of BLT with patches of p bytes costs

    T(global, m = context / p) / p + T(encoder, m = window) + T(decoder, m = window, V = 256)
    + X(encoder, m = p, r = p / K) K / p + X(decoder, m = K, r = K / p)

where T is a whole layer and X its attention and projections. Backward costs twice that. `count_flops` takes the widths
of the model (feed-forwards rounded to 256, grouped heads, the projections between the widths, 260 ids) and its rows. It
counts the scores that the backward of the ops computes again, once (Triton's computes them twice). Importing this file
registers the ops, forward and backward, with `torch.utils.flop_counter.FlopCounterMode`, which then agrees with
`count_flops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from blt_kernels._flop_counter import PAIR_BACKWARD, PAIR_FORWARD
from blt_kernels._flop_counter import counted_parts as counted_parts
from blt_kernels.layout import PatchLayout
from blt_kernels.models.config import BLTConfig, ByteLMConfig, MegaByteConfig
from blt_kernels.nn import TransformerConfig

__all__ = ["PAPER_SIZES", "PARTS", "Config", "Flops", "Part", "Rows", "count_flops", "counted_parts", "paper_flops"]

Config = BLTConfig | ByteLMConfig | MegaByteConfig


@dataclass(frozen=True)
class Part:
    """Holds the FLOPs of one part of a model.

    Attributes
    ----------
    forward, backward : float

    Examples
    --------
    >>> Part(1.0, 2.0) + Part(1.0) * 3
    Part(forward=4.0, backward=2.0)
    """

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Part) -> Part:
        return Part(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Part:
        return Part(self.forward * factor, self.backward * factor)


PARTS = ("encoder", "encoder cross", "global", "decoder cross", "decoder", "projections", "output")


@dataclass(frozen=True)
class Flops:
    """Holds the FLOPs of a model by part.

    Attributes
    ----------
    parts : dict of str to Part
        `PARTS`, as far as the model has them. "encoder cross" and "decoder cross" are the cross attentions,
        "projections" the matrices between the widths around the global transformer. "decoder" is also the stack of a
        ByteLM, and the local model of MegaByte.
    patcher : float
        FLOPs of the forward of the entropy model of a BLT, on the same bytes. Other schemes than "entropy" do not run
        it.
    patcher_training : float
        FLOPs of the forward and the backward of that model, where it is trained itself on as many bytes.

    Examples
    --------
    >>> flops = Flops({"decoder": Part(2.0, 4.0), "output": Part(1.0, 2.0)}, patcher=0.5, patcher_training=1.5)
    >>> flops.total
    Part(forward=3.0, backward=6.0)
    >>> flops.with_patcher
    Part(forward=3.5, backward=6.0)
    """

    parts: dict[str, Part]
    patcher: float = 0.0
    patcher_training: float = 0.0

    @property
    def total(self) -> Part:
        """The sum of all parts without the patcher, as the BLT paper counts."""
        return sum(self.parts.values(), Part())

    @property
    def with_patcher(self) -> Part:
        """The sum of all parts, and of the patcher's forward, where it runs with the model. BLT does not train it."""
        return self.total + Part(self.patcher)

    def training(self, num_bytes: float, *, patched_bytes: float | None = None, patcher_bytes: float = 0.0) -> float:
        """Return the FLOPs of a whole training run. These `Flops` must be those of one byte: see `per_byte`.

        Parameters
        ----------
        num_bytes : float
            Bytes that the model trains on.
        patched_bytes : float, optional
            Bytes that the patcher reads meanwhile. If None it runs in every step: `num_bytes`. With patches that
            ``blt-kernels patch --save`` stored, the bytes of the text, or 0 if that run has paid for them elsewhere.
        patcher_bytes : float
            Bytes that the patcher itself was trained on; 0 for one that is given, and in the count of the paper.

        Returns
        -------
        float

        Examples
        --------
        >>> flops = Flops({"decoder": Part(2.0, 4.0)}, patcher=0.5, patcher_training=1.5)
        >>> flops.training(100), flops.training(100, patched_bytes=0), flops.training(100, patcher_bytes=10)
        (650.0, 600.0, 665.0)
        """
        patched = num_bytes if patched_bytes is None else patched_bytes
        model = (self.total.forward + self.total.backward) * num_bytes
        return model + self.patcher * patched + self.patcher_training * patcher_bytes

    def per_byte(self, num_bytes: float) -> Flops:
        """Divide by the number of bytes.

        Parameters
        ----------
        num_bytes : float
            Those of the text, also for a model over tokens.

        Returns
        -------
        Flops
        """
        parts = {name: part * (1 / num_bytes) for name, part in self.parts.items()}
        return Flops(parts, self.patcher / num_bytes, self.patcher_training / num_bytes)


# --- the paper's formula ----------------------------------------------------------------------------------------------


def paper_flops(config: Config, patch_size: float, context: float = 16384) -> Flops:
    """Return the FLOPs of one byte by the formula of the BLT paper.

    Parameters
    ----------
    config : BLTConfig, ByteLMConfig or MegaByteConfig
        A MegaByteConfig has its own `patch_size`, and the argument is ignored.
    patch_size : float
        Mean number of bytes of a patch.
    context : float
        Bytes of a row, which attention without a window attends to.

    Returns
    -------
    Flops

    Examples
    --------
    >>> flops = paper_flops(BLTConfig(), patch_size=4.5)  # of BLT-1B
    >>> f"{flops.total.forward / 1e9:.2f} GFLOPs a byte"
    '0.97 GFLOPs a byte'
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
    return _with_patcher(config, _by_paper(parts), lambda patcher: paper_flops(patcher, patch_size, context))


def _by_paper(parts: dict[str, float]) -> Flops:
    return Flops({name: Part(flops, 2 * flops) for name, flops in parts.items()})


def _with_patcher(config: BLTConfig, model: Flops, count: Callable[[ByteLMConfig], Flops]) -> Flops:
    """Add the patcher to the FLOPs of a model, if its scheme runs it."""
    if config.patcher is None or config.patching != "entropy":
        return model
    total = count(config.patcher).total
    return replace(model, patcher=total.forward, patcher_training=total.forward + total.backward)


def _paper_layers(config: TransformerConfig, context: float) -> float:
    keys = context if config.window is None else min(config.window, context)
    return config.num_layers * (_paper_cross(config.dim, keys, 1) + 16 * config.dim**2)


def _paper_cross(dim: int, context: float, queries_per_key: float) -> float:
    return 4 * dim * (context + 1) / 2 + (2 * queries_per_key + 2) * 2 * dim**2


def _paper_size(
    dim: int, num_heads: int, wide: TransformerConfig, decoder_layers: int, queries_per_patch: int
) -> BLTConfig:
    encoder = TransformerConfig(dim, 1, num_heads, window=512)
    decoder = replace(encoder, num_layers=decoder_layers)
    return BLTConfig(encoder, wide, decoder, queries_per_patch=queries_per_patch)


# Table 10 of the BLT paper gives width and heads of encoder and decoder; width, layers and heads of the global
# transformer; layers of the decoder; K. The encoder has one layer.
PAPER_SIZES: dict[str, BLTConfig] = {
    "400M": _paper_size(768, 12, TransformerConfig(1280, 24, 10), 7, 2),
    "1B": _paper_size(1024, 16, TransformerConfig(2048, 25, 16), 9, 2),
    "2B": _paper_size(1024, 16, TransformerConfig(2560, 26, 20), 9, 3),
    "4B": _paper_size(1024, 16, TransformerConfig(3072, 36, 24), 9, 3),
    "8B": _paper_size(1280, 20, TransformerConfig(4096, 32, 32), 6, 4),
}


# --- this implementation ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Holds the sizes of the rows that a model runs on. Averages need not be whole numbers.

    Attributes
    ----------
    num_bytes, num_patches : sequence of float
        Those of every row. `num_bytes` counts the ids: bytes, or the tokens of a model over tokens.

    Examples
    --------
    >>> Rows.even(8192, 4.5).num_bytes
    [8192]
    """

    num_bytes: Sequence[float]
    num_patches: Sequence[float]

    @staticmethod
    def even(context: float, patch_size: float) -> Rows:
        """Return one row whose patches are equally long.

        Parameters
        ----------
        context, patch_size : float
            Bytes of the row and of a patch.

        Returns
        -------
        Rows
        """
        return Rows([context], [context / patch_size])

    @staticmethod
    def of(layout: PatchLayout) -> Rows:
        """Return the rows of a layout. It waits for the device.

        Parameters
        ----------
        layout : PatchLayout

        Returns
        -------
        Rows
        """
        return Rows(layout.cu_seqlens.diff().tolist(), layout.cu_patches.diff().tolist())


def count_flops(config: Config, rows: Rows) -> Flops:
    """Return the FLOPs of this implementation, if every row is a document and its patches are equally long.

    Training computes the gradients of all parts but the patcher. Empty patches are not counted: on the CPU, and in a
    layout of `PatchLayout.compact`, there are none.

    Parameters
    ----------
    config : BLTConfig, ByteLMConfig or MegaByteConfig
    rows : Rows

    Returns
    -------
    Flops

    Examples
    --------
    >>> flops = count_flops(ByteLMConfig.small(), Rows.even(1000, 4.5))
    >>> flops.parts["output"].forward == 1000 * 2 * 256 * 260
    True
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
    # A byte is paired with the K vectors of every patch in its window. At the start of a row that is too many.
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
    return _with_patcher(config, Flops(parts), lambda patcher: count_flops(patcher, rows))


def _count_megabyte(config: MegaByteConfig, rows: Rows) -> Flops:
    """Count a MegaByte. A row has one slot more than bytes, which predicts the byte after its last."""
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
    """Count the product of `vectors` with matrices of `weights` elements, and backward the gradients of both."""
    return Part(2 * vectors * weights, 4 * vectors * weights)


def _attention(width: int, pairs: float) -> Part:
    return Part(PAIR_FORWARD * width * pairs, PAIR_BACKWARD * width * pairs)


def _pairs(length: float, window: int | None) -> float:
    """Return the (query, key) pairs of a causal row: the sum of min(i, window) for i = 1 ... length."""
    if window is None or length <= window:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window
