"""`test_ops.py` runs these cases of `linear_cross_entropy`."""

from __future__ import annotations

from functools import partial

import inputs
from op_case import OpCase

import blt_kernels as bk
from blt_kernels.reference.linear_cross_entropy import linear_cross_entropy_reference

_linear_cross_entropy = partial(OpCase, bk.linear_cross_entropy, linear_cross_entropy_reference, autocast=True)

CASES = [
    _linear_cross_entropy("bias", inputs.make_linear_cross_entropy(bias=True), ("hidden", "weight", "bias")),
    _linear_cross_entropy("no bias", inputs.make_linear_cross_entropy(bias=False), ("hidden", "weight")),
]
