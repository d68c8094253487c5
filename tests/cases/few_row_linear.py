"""`test_ops.py` runs these cases of `few_row_linear`."""

from __future__ import annotations

from functools import partial

import inputs
from op_case import OpCase

import blt_kernels as bk
from blt_kernels.reference.few_row_linear import few_row_linear_reference

_few_row_linear = partial(OpCase, bk.few_row_linear, few_row_linear_reference, autocast=True, trace=False)

CASES = [
    _few_row_linear("whole vectors", inputs.make_few_row_linear(256, 2048)),
    _few_row_linear("odd sizes", inputs.make_few_row_linear(131, 4007)),
]
