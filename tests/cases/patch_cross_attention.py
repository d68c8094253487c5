"""`test_ops.py` runs these cases of `patch_cross_attention`."""

from __future__ import annotations

from functools import partial

import inputs
import torch
from op_case import OpCase

import blt_kernels as bk
from blt_kernels.reference.patch_cross_attention import patch_cross_attention_reference

_cross = partial(
    OpCase,
    bk.patch_cross_attention,
    patch_cross_attention_reference,
    differentiable=("q", "k", "v"),
    autocast=True,
)
_make_cross = inputs.make_cross_attention
# Every dtype meets windows and grouped heads in one direction; the plain cases have all of them.
_BF16, _FP16 = ((torch.float32, torch.bfloat16), (torch.float32, torch.float16))

CASES = [
    _cross("encode", _make_cross("encode"), fast=False),
    _cross("decode", _make_cross("decode")),
    _cross("encode, window", _make_cross("encode", "tail", window=3), dtypes=_BF16),
    _cross("decode, window", _make_cross("decode", "overflow", window=3, scale=0.5), dtypes=_FP16, fast=False),
    _cross("encode, grouped", _make_cross("encode", heads=6, kv_heads=2), dtypes=_FP16, fast=False),
    _cross(
        "decode, grouped",
        _make_cross("decode", "tail", heads=4, kv_heads=1, window=2),
        dtypes=_BF16,
        trace=False,
        fast=False,
    ),
    _cross("encode, slots", _make_cross("encode", "slots"), trace=False, fast=False),
    _cross("decode, slots", _make_cross("decode", "slots"), trace=False, fast=False),
    _cross("encode, slots, window", _make_cross("encode", "slots", window=3), dtypes=_FP16, trace=False, fast=False),
    _cross("decode, slots, window", _make_cross("decode", "slots", window=3), dtypes=_BF16, trace=False, fast=False),
    _cross("encode, wide", _make_cross("encode", width=80), trace=False, fast=False),
    _cross("decode, wide", _make_cross("decode", width=80), trace=False, fast=False),
]
