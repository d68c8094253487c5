"""`test_ops.py` runs these cases of `boundary_patch`."""

from __future__ import annotations

from functools import partial

import inputs
import torch
from op_case import OpCase

import blt_kernels as bk
from blt_kernels.reference.boundary_patch import boundary_patch_reference

_boundary = partial(OpCase, bk.boundary_patch, boundary_patch_reference)
_bool = {"dtypes": (torch.float32,)}  # marks come from scores of one dtype

CASES = [
    _boundary("scores", inputs.make_marks()),
    _boundary("scores, start, first", inputs.make_marks(thresholds="each", at="start", first=3)),
    _boundary("scores, overflow", inputs.make_marks(0.1, first=1), trace=False),
    _boundary("marks", inputs.make_marks(thresholds="none"), **_bool),
    _boundary("marks, start", inputs.make_marks(thresholds="none", at="start", first=1), trace=False, **_bool),
]
