"""`test_ops.py` runs these cases of `patch_unpool`."""

from __future__ import annotations

from functools import partial

import inputs
from op_case import WIDE, OpCase

import blt_kernels as bk
from blt_kernels.reference.patch_unpool import patch_unpool_reference

_unpool = partial(OpCase, bk.patch_unpool, patch_unpool_reference, differentiable=("y",))

CASES = [
    _unpool("patch", inputs.make_patch_unpool("patch")),
    _unpool("decode", inputs.make_patch_unpool("decode")),
    _unpool("patch, tail", inputs.make_patch_unpool("patch", "tail"), trace=False),
    _unpool("decode, overflow", inputs.make_patch_unpool("decode", "overflow"), trace=False),
    _unpool("patch, slots", inputs.make_patch_unpool("patch", "slots"), trace=False),
    _unpool("decode, slots", inputs.make_patch_unpool("decode", "slots"), trace=False),
    _unpool("decode, wide", inputs.make_patch_unpool("decode", width=WIDE), trace=False),
]
