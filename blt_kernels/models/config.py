"""The configurations of the models are frozen dataclasses that check their fields."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from blt_kernels import _checks
from blt_kernels.ids import ALPHABET, EOS
from blt_kernels.nn import TransformerConfig
from blt_kernels.ops.ngram_hash_embed import check_sizes

RELEASED_THRESHOLD = 1.335442066192627  # nats; the released BLT models have it
SCHEMES = ("entropy", "space", "static", "byte", "bpe")
_OWN_FIELDS = {  # one scheme alone reads each of these
    "entropy": ("threshold", "threshold_add", "monotonic", "reset_at_newlines"),
    "static": ("patch_size",),
}
RULE_FIELDS = frozenset(name for names in _OWN_FIELDS.values() for name in names)


def check_eos_id(eos_id: int, vocab_size: int) -> None:
    """Raise unless `eos_id`, the id that ends a document, is one of the vocabulary."""
    _checks.check_int("eos_id", eos_id, 0)
    if eos_id >= vocab_size:
        raise ValueError(f"eos_id: expected a value < vocab_size = {vocab_size}, got {eos_id}")


@dataclass(frozen=True)
class ByteLMConfig(TransformerConfig):
    """The defaults are the entropy model of the BLT paper (arXiv 2412.09871, section 4.2).

    Attributes
    ----------
    dim, num_layers, num_heads, num_kv_heads, ffn_dim, window, rope_theta, norm_eps, rope_scaling
        As in `TransformerConfig`.
    vocab_size : int
    threshold : float
        A patch starts after an entropy above it, in nats.
    split_documents : bool
        Attention also stops after every `eos_id` inside a row, as in facebookresearch/blt. Without it, as in
        transformers, EOS is a byte like any other.
    reset_at_newlines : bool
        The context starts anew at every newline, 0x0A (the BLT paper, section 4.4): attention reaches back to the last
        one and no further. The newline is the first byte of the new context, as BOS is of a document, so that the
        entropy of the byte after it does not depend on the lines before. The paper does not say on which side it is,
        and facebookresearch/blt has no such option.
    eos_id : int

    Raises
    ------
    TypeError, ValueError
        A field has the wrong type or value; the message names it.

    Examples
    --------
    >>> ByteLMConfig().num_layers, ByteLMConfig.small().dim
    (14, 256)
    """

    dim: int = 768
    num_layers: int = 14
    num_heads: int = 12
    window: int | None = 512
    rope_theta: float = 10000.0
    vocab_size: int = ALPHABET
    threshold: float = RELEASED_THRESHOLD
    split_documents: bool = False
    reset_at_newlines: bool = False
    eos_id: int = EOS

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.check_int("vocab_size", self.vocab_size, 1)
        _checks.check_number("threshold", self.threshold)
        check_eos_id(self.eos_id, self.vocab_size)

    @staticmethod
    def small() -> ByteLMConfig:
        """Return the sizes of the bundled model: 1.84M parameters, 3.7 MB in bf16."""
        return ByteLMConfig(dim=256, num_layers=2, num_heads=2, window=128)


@dataclass(frozen=True)
class BLTConfig:
    """The defaults are the released 1B model, whose hash tables hold 3.1B parameters more.

    Attributes
    ----------
    encoder, decoder : TransformerConfig
        Layers over bytes, of the same width.
    global_transformer : TransformerConfig
        Layers over patches.
    patcher : ByteLMConfig, optional
        The entropy model. Other schemes and layouts of the caller's need none.
    vocab_size : int
    queries_per_patch : int
        K, the vectors of the local width that represent a patch.
    ngram_sizes, ngram_vocab, num_functions
        Sizes of the hashed n-grams, rows V of one table, and hash functions: see `blt_kernels.ngram_hash_embed`.
    cross_attn_all_layers_encoder, cross_attn_all_layers_decoder : bool
        Every local layer has a cross attention, or one does: the last of the encoder, the first of the decoder.
    cross_attn_heads : int, optional
        As many as the layers around if None.
    cross_attn_window_encoder, cross_attn_window_decoder : int, optional
        How many patches cross attention reads, back from a patch's or byte's own; one if None.
    patching : str
        "entropy" (by `patcher`, with the rules of `blt_kernels.patch_starts`), "space", "static" (every `patch_size`
        bytes), "byte" or "bpe" (after every id 3, as facebookresearch/blt puts them between the tokens of a BPE
        tokenizer).
    patch_size : int
        In bytes, for "static".
    threshold, threshold_add, monotonic
        The rules for "entropy".
    max_patch_length : int, optional
        Cuts the longer patches of every scheme, as in facebookresearch/blt.
    split_documents : bool
        Self-attention also stops after every `eos_id` inside a row, and the global one after the patch that holds it,
        as in facebookresearch/blt. Without it, as in transformers, EOS is a byte like any other.
    pool_every_layer : bool
        It matters only where `cross_attn_all_layers_encoder` has several layers. With it, as in transformers, the
        patches are pooled anew at every layer, so only the cross attention of the last layer has an effect, and only
        that is computed here. Without it, as in facebookresearch/blt, they are pooled at the first layer, and each
        cross attention adds to them.
    cross_attn_grouped_heads : bool
        Cross attention has as few key/value heads as the layers around it, as in transformers. Without it, as in
        facebookresearch/blt, it has as many as query heads.
    whole_characters : bool
        A patch of any scheme starts only where a character of UTF-8 ends, aside from those that start at 0 and 1:
        decisions inside of a character are dropped, and `max_patch_length` cuts after the character
        (`blt_kernels.models.characters`).
    reset_at_newlines : bool
        The context of the entropy model starts anew at newlines (`ByteLMConfig`), even if its own configuration does
        not say so.
    global_across_documents : bool
        With `split_documents`, only the layers over bytes stop at EOS, and the global transformer attends to its whole
        row, as facebookresearch/blt does with the ``attn_bias_type`` "causal".
    eos_id : int

    Raises
    ------
    TypeError, ValueError
        A field has the wrong type or value; the message names it.

    Examples
    --------
    >>> BLTConfig().global_transformer.num_layers, BLTConfig(patching="space", patcher=None).patching
    (25, 'space')
    """

    encoder: TransformerConfig = TransformerConfig(1024, 1, 16, window=512)
    global_transformer: TransformerConfig = TransformerConfig(2048, 25, 16)
    decoder: TransformerConfig = TransformerConfig(1024, 9, 16, window=512)
    patcher: ByteLMConfig | None = ByteLMConfig()
    vocab_size: int = ALPHABET
    queries_per_patch: int = 2
    ngram_sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    ngram_vocab: int = 500002
    num_functions: int = 1
    cross_attn_all_layers_encoder: bool = False
    cross_attn_all_layers_decoder: bool = True
    cross_attn_heads: int | None = None
    cross_attn_window_encoder: int | None = None
    cross_attn_window_decoder: int | None = None
    patching: str = "entropy"
    patch_size: int = 4
    threshold: float = RELEASED_THRESHOLD
    threshold_add: float | None = None
    monotonic: bool = False
    max_patch_length: int | None = None
    split_documents: bool = False
    pool_every_layer: bool = False
    cross_attn_grouped_heads: bool = False
    whole_characters: bool = False
    reset_at_newlines: bool = False
    global_across_documents: bool = False
    eos_id: int = EOS

    def __post_init__(self) -> None:
        _checks.check_choice("patching", self.patching, SCHEMES)
        for name in ("vocab_size", "queries_per_patch", "ngram_vocab", "patch_size"):
            _checks.check_int(name, getattr(self, name), 1)
        for name in ("cross_attn_heads", "cross_attn_window_encoder", "cross_attn_window_decoder", "max_patch_length"):
            if getattr(self, name) is not None:
                _checks.check_int(name, getattr(self, name), 1)
        check_sizes(self.ngram_sizes, self.num_functions)
        _checks.check_number("threshold", self.threshold)
        check_eos_id(self.eos_id, self.vocab_size)
        if self.encoder.dim != self.decoder.dim:
            raise ValueError(f"decoder.dim: expected encoder.dim = {self.encoder.dim}, got {self.decoder.dim}")
        self.cross_attention(self.encoder)  # raises if heads and width do not go together
        self.cross_attention(self.decoder)

    def cross_attention(self, around: TransformerConfig) -> TransformerConfig:
        """Return the configuration of the cross attention in the encoder or in the decoder.

        Parameters
        ----------
        around : TransformerConfig
            `encoder` or `decoder`.

        Returns
        -------
        TransformerConfig
            Only its width and heads matter.
        """
        kv_heads = around.kv_heads if self.cross_attn_grouped_heads else None
        return replace(around, num_heads=self.cross_attn_heads or around.num_heads, num_kv_heads=kv_heads)

    @property
    def patch_rule(self) -> dict[str, Any]:
        """The fields that decide, with the patcher, where `BLT.patch` starts patches."""
        names = ("patching", *_OWN_FIELDS.get(self.patching, ()), "max_patch_length", "whole_characters")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def small() -> BLTConfig:
        """Return sizes that train on a laptop: 7.8M parameters without the patcher, 3.1M of them in hash tables."""
        return BLTConfig(
            encoder=TransformerConfig(128, 1, 2, window=128),
            global_transformer=TransformerConfig(256, 4, 4, window=256),
            decoder=TransformerConfig(128, 2, 2, window=128),
            patcher=ByteLMConfig.small(),
            ngram_vocab=4096,
        )


@dataclass(frozen=True)
class MegaByteConfig:
    """The defaults are the paper's 1.3B global and 218M local model, without extensions.

    Attributes
    ----------
    patch_size : int
        P, in bytes.
    global_transformer : TransformerConfig
        Layers over patches, as wide as P byte embeddings together.
    local_transformer : TransformerConfig
        Layers over the bytes of a patch. They attend to no other bytes, apart from `cross_patch`, and ignore `window`.
    vocab_size : int
    cross_patch : int
        The paper's r: in every local layer a patch also attends to the keys and values of the last r positions of the
        patch before, 0 to P. The paper uses it and does not give r.
    conv_sizes : tuple of int
        Filter sizes of causal convolutions over the byte embeddings of the global model, in turn; the paper's are
        ``(3, 5, 7)``. It says no more about them: see `CausalConvolution`.

    Raises
    ------
    TypeError, ValueError
        A field has the wrong type or value; the message names it.

    Examples
    --------
    >>> MegaByteConfig().global_transformer.dim, MegaByteConfig.small().patch_size
    (2048, 4)
    """

    patch_size: int = 8
    global_transformer: TransformerConfig = TransformerConfig(2048, 24, 16)
    local_transformer: TransformerConfig = TransformerConfig(1024, 15, 16)
    vocab_size: int = ALPHABET
    cross_patch: int = 0
    conv_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _checks.check_int("patch_size", self.patch_size, 1)
        if self.global_transformer.dim % self.patch_size:
            expected = f"a multiple of patch_size = {self.patch_size}"
            raise ValueError(f"global_transformer.dim: expected {expected}, got {self.global_transformer.dim}")
        _checks.check_int("cross_patch", self.cross_patch, 0)
        if self.cross_patch > self.patch_size:
            raise ValueError(f"cross_patch: expected at most patch_size = {self.patch_size}, got {self.cross_patch}")
        for size in self.conv_sizes:
            _checks.check_int("conv_sizes", size, 1)

    @staticmethod
    def small() -> MegaByteConfig:
        """Return sizes that train on a laptop: 4.6M parameters."""
        return MegaByteConfig(
            patch_size=4,
            global_transformer=TransformerConfig(256, 4, 4, window=256),
            local_transformer=TransformerConfig(192, 2, 3),
        )
