"""Every op, listed once: what `test_ops.py` needs to run all shared checks on it.

To add an op, append an `OpCase`, with inputs from `inputs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import inputs
import torch
from torch import Tensor

import blt_kernels as bk
from blt_kernels.reference.block_causal_attention import attention_ranges_reference, block_causal_attention_reference
from blt_kernels.reference.entropy_patch import (
    delimiter_patch_reference,
    entropy_patch_reference,
    patch_starts_reference,
    space_patch_reference,
    static_patch_reference,
    topk_patch_reference,
)
from blt_kernels.reference.ngram_hash_embed import ngram_hash_embed_reference, ngram_hash_reference
from blt_kernels.reference.patch_cross_attention import patch_cross_attention_reference
from blt_kernels.reference.patch_pool import patch_pool_reference
from blt_kernels.reference.patch_unpool import patch_unpool_reference
from blt_kernels.reference.token_entropy import linear_entropy_reference, token_entropy_reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = (torch.int64,)
WIDE = 149  # columns: several vectors of every instruction set, side by side and alone, and some left over


@dataclass(frozen=True)
class OpCase:
    """One op with one setting of its options.

    Attributes
    ----------
    op : the file of the op, ``ops/<op>.py``
    function, reference : called with what `make` returns
    label : what is special about the case
    make : (dtype, num_bytes, seed) -> keyword arguments that both take, on the CPU; any `num_bytes` from 0
    differentiable : names of the arguments with gradients
    dtypes : dtypes to test; of ids where there are no floating arguments
    autocast : does autocast cast the floating arguments?
    sparse : are gradients sparse? gradcheck and tracing take dense ones only
    trace : is the case put through opcheck and torch.compile? One of a function's cases is enough unless options differ
    emulated : are the kernels for CUDA written in CUDA C++, which the emulator runs, and not in Triton?
    """

    op: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    label: str
    make: inputs.Make
    differentiable: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    autocast: bool = False
    sparse: bool = False
    trace: bool = True
    emulated: bool = True

    @property
    def name(self) -> str:
        return self.function.__name__ + (f"[{self.label}]" if self.label else "")


# --- token_entropy ----------------------------------------------------------------------------------------------------

_token_entropy = partial(OpCase, "token_entropy", bk.token_entropy, token_entropy_reference, differentiable=("logits",))
_linear_entropy = partial(OpCase, "token_entropy", bk.linear_entropy, linear_entropy_reference, autocast=True)

TOKEN_ENTROPY = [
    *(_token_entropy(f"A={a}", inputs.make_token_entropy(a), trace=a == 260) for a in (1, 5, 64, 260, 1031)),
    _linear_entropy("bias", inputs.make_linear_entropy(bias=True), ("hidden", "weight", "bias")),
    _linear_entropy("no bias", inputs.make_linear_entropy(bias=False), ("hidden", "weight")),
]

# --- entropy_patch ----------------------------------------------------------------------------------------------------


def byte_patch_reference(cu_seqlens: Tensor, num_bytes: int) -> bk.PatchLayout:
    return static_patch_reference(cu_seqlens, num_bytes, 1)


RULES: dict[str, dict[str, Any]] = {
    "": {},
    "monotonic": {"monotonic": True},
    "threshold_add": {"threshold_add": 0.25},
    "max_patch_length": {"max_patch_length": 5},
    "all": {"monotonic": True, "max_patch_length": 3},
    "overflow": {"share": 0.1},
}
_entropy_patch = partial(OpCase, "entropy_patch", bk.entropy_patch, entropy_patch_reference, differentiable=("logits",))
_patch_starts = partial(OpCase, "entropy_patch", bk.patch_starts, patch_starts_reference)
_scheme = partial(OpCase, "entropy_patch", dtypes=IDS)

ENTROPY_PATCH = [
    *(
        _entropy_patch(label, inputs.make_entropy_patch(**rule), trace=label in ("", "all"))
        for label, rule in RULES.items()
    ),
    *(
        _patch_starts(label, inputs.make_patch_starts(**rule), trace=label in ("", "overflow"))
        for label, rule in RULES.items()
    ),
    OpCase("entropy_patch", bk.topk_patch, topk_patch_reference, "", inputs.make_topk()),
    _scheme(bk.space_patch, space_patch_reference, "", inputs.make_tokens()),
    _scheme(bk.delimiter_patch, delimiter_patch_reference, "", inputs.make_tokens(id=ord("\n") + 4)),
    _scheme(bk.static_patch, static_patch_reference, "first=1", inputs.make_offsets(size=4)),
    _scheme(bk.static_patch, static_patch_reference, "first=size", inputs.make_offsets(size=4, first=4)),
    _scheme(bk.byte_patch, byte_patch_reference, "", inputs.make_offsets()),
]

# --- patch_pool, patch_unpool -----------------------------------------------------------------------------------------

_pool = partial(OpCase, "patch_pool", bk.patch_pool, patch_pool_reference, differentiable=("x",))
_unpool = partial(OpCase, "patch_unpool", bk.patch_unpool, patch_unpool_reference, differentiable=("y",))
_EVERY = ("max", "min", "mean", "sum", "first", "last")

POOLING = [
    _pool("max", inputs.make_patch_pool("max")),
    _pool("all", inputs.make_patch_pool(_EVERY)),
    _pool("tail", inputs.make_patch_pool(_EVERY, "tail"), trace=False),
    _pool("overflow", inputs.make_patch_pool(("mean", "max"), "overflow"), trace=False),
    _pool("wide", inputs.make_patch_pool(_EVERY, width=WIDE), trace=False),
    _unpool("patch", inputs.make_patch_unpool("patch")),
    _unpool("decode", inputs.make_patch_unpool("decode")),
    _unpool("patch, tail", inputs.make_patch_unpool("patch", "tail"), trace=False),
    _unpool("decode, overflow", inputs.make_patch_unpool("decode", "overflow"), trace=False),
    _unpool("decode, wide", inputs.make_patch_unpool("decode", width=WIDE), trace=False),
]

# --- ngram_hash_embed -------------------------------------------------------------------------------------------------

_embed = partial(OpCase, "ngram_hash_embed", bk.ngram_hash_embed, ngram_hash_embed_reference)
_make_embed = inputs.make_ngram_hash_embed
_BOTH = ("tables", "byte_table")

NGRAM_HASH_EMBED = [
    _embed("fused", _make_embed(fused=True), _BOTH),
    _embed("list", _make_embed(byte_table=False, ngram_sizes=(2, 4), num_functions=2), ("tables",)),
    _embed("sparse", _make_embed(grad="sparse"), _BOTH, sparse=True, trace=False),
    _embed("wide", _make_embed(fused=True, width=WIDE), _BOTH, trace=False),
    _embed("sparse, wide", _make_embed(grad="sparse", width=WIDE), _BOTH, sparse=True, trace=False),
    _embed("shard", _make_embed(fused=True, row_range=(10, 40), vocab=53, ngram_sizes=(1, 3)), _BOTH),
    OpCase(
        "ngram_hash_embed",
        bk.ngram_hash,
        ngram_hash_reference,
        "",
        inputs.make_tokens(ngram_sizes=(1, 3, 8), num_functions=2, vocab=1009),
        dtypes=IDS,
    ),
]

# --- attention --------------------------------------------------------------------------------------------------------

_attention = partial(
    OpCase,
    "block_causal_attention",
    bk.block_causal_attention,
    block_causal_attention_reference,
    differentiable=("q", "k", "v"),
    autocast=True,
    emulated=False,
)
_ranges = partial(
    OpCase,
    "block_causal_attention",
    bk.attention_ranges,
    attention_ranges_reference,
    dtypes=(torch.int32,),
    emulated=False,
)
_cross = partial(
    OpCase,
    "patch_cross_attention",
    bk.patch_cross_attention,
    patch_cross_attention_reference,
    differentiable=("q", "k", "v"),
    autocast=True,
)
_make_attention, _make_cross = inputs.make_attention, inputs.make_cross_attention

ATTENTION = [
    _attention("causal", _make_attention(return_lse=True)),
    _attention("window", _make_attention(window=5, groups=2)),
    _attention("both sides", _make_attention(window=4, causal=False, scale=0.5, groups=1)),
    _attention("keys", _make_attention(keys=True, groups=2, window=9, return_lse=True)),
    _attention("wide", _make_attention(width=96, groups=2), trace=False),
    _attention("decoding", inputs.make_decoding(return_lse=True), trace=False),
    _attention("decoding, window", inputs.make_decoding(width=64, groups=1, window=40), trace=False),
    _ranges("ranges", inputs.make_attention_ranges(window=5)),
    _ranges("ranges, both sides", inputs.make_attention_ranges(window=4, causal=False)),
    _ranges("ranges, keys", inputs.make_attention_ranges(keys=True)),
    _cross("encode", _make_cross("encode")),
    _cross("decode", _make_cross("decode")),
    _cross("encode, window", _make_cross("encode", "tail", window=3)),
    _cross("decode, window", _make_cross("decode", "overflow", window=3, scale=0.5)),
    _cross("encode, grouped", _make_cross("encode", heads=6, kv_heads=2)),
    _cross("decode, grouped", _make_cross("decode", "tail", heads=4, kv_heads=1, window=2), trace=False),
    _cross("encode, wide", _make_cross("encode", width=80), trace=False),
    _cross("decode, wide", _make_cross("decode", width=80), trace=False),
]

CASES = [*TOKEN_ENTROPY, *ENTROPY_PATCH, *POOLING, *NGRAM_HASH_EMBED, *ATTENTION]
