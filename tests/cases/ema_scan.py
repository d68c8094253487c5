"""`test_ops.py` runs these cases of `ema_scan`."""

from __future__ import annotations

from functools import partial

import inputs
from op_case import WIDE, OpCase

import blt_kernels as bk
from blt_kernels.reference.ema_scan import ema_scan_reference

_scan = partial(OpCase, bk.ema_scan, ema_scan_reference, differentiable=("x", "p"))

CASES = [
    _scan("", inputs.make_ema_scan()),
    _scan("tail", inputs.make_ema_scan(tail=5), trace=False),
    _scan("wide", inputs.make_ema_scan(width=WIDE), trace=False),
]
