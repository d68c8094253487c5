"""`test_ops.py` runs these cases of `patch_pool`."""

from __future__ import annotations

from functools import partial

import inputs
from op_case import WIDE, OpCase

import blt_kernels as bk
from blt_kernels.reference.patch_pool import REDUCTIONS, patch_pool_reference

_pool = partial(OpCase, bk.patch_pool, patch_pool_reference, differentiable=("x",))

CASES = [
    _pool("max", inputs.make_patch_pool("max")),
    _pool("all", inputs.make_patch_pool(REDUCTIONS)),
    _pool("tail", inputs.make_patch_pool(REDUCTIONS, "tail"), trace=False),
    _pool("overflow", inputs.make_patch_pool(("mean", "max"), "overflow"), trace=False),
    _pool("slots", inputs.make_patch_pool(REDUCTIONS, "slots"), trace=False),
    _pool("wide", inputs.make_patch_pool(REDUCTIONS, width=WIDE), trace=False),
]
