"""`test_ops.py` runs these cases of `block_causal_attention` and `attention_ranges`."""

from __future__ import annotations

from functools import partial

import inputs
import torch
from op_case import OpCase

import blt_kernels as bk
from blt_kernels.reference.block_causal_attention import attention_ranges_reference, block_causal_attention_reference

_attention = partial(
    OpCase,
    bk.block_causal_attention,
    block_causal_attention_reference,
    differentiable=("q", "k", "v"),
    autocast=True,
)
_ranges = partial(
    OpCase,
    bk.attention_ranges,
    attention_ranges_reference,
    dtypes=(torch.int32,),
)
_make_attention = inputs.make_attention

CASES = [
    _attention("causal", _make_attention(return_lse=True)),
    _attention("window", _make_attention(window=5, kv_heads=2)),
    _attention("both sides", _make_attention(window=4, causal=False, scale=0.5, kv_heads=1)),
    _attention("keys", _make_attention(keys=True, kv_heads=2, window=9, return_lse=True)),
    _attention("wide", _make_attention(width=96, kv_heads=2), trace=False),
    _attention("decoding", inputs.make_decoding(return_lse=True), trace=False),
    _attention("decoding, window", inputs.make_decoding(width=64, kv_heads=1, window=40), trace=False),
    _ranges("ranges", inputs.make_attention_ranges(window=5)),
    _ranges("ranges, both sides", inputs.make_attention_ranges(window=4, causal=False)),
    _ranges("ranges, keys", inputs.make_attention_ranges(keys=True)),
]
