"""`test_ops.py` runs these cases of `token_entropy` and `linear_entropy`."""

from __future__ import annotations

from functools import partial

import inputs
from op_case import OpCase

import blt_kernels as bk
from blt_kernels.reference.token_entropy import linear_entropy_reference, token_entropy_reference

_token_entropy = partial(OpCase, bk.token_entropy, token_entropy_reference, differentiable=("logits",))
_linear_entropy = partial(OpCase, bk.linear_entropy, linear_entropy_reference, autocast=True)

CASES = [
    *(_token_entropy(f"A={a}", inputs.make_token_entropy(a), trace=a == 260) for a in (1, 5, 64, 260, 1031)),
    _linear_entropy("bias", inputs.make_linear_entropy(bias=True), ("hidden", "weight", "bias")),
    _linear_entropy("no bias", inputs.make_linear_entropy(bias=False), ("hidden", "weight")),
]
