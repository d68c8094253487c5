"""`test_ops.py` runs these cases of `entropy_patch`, `patch_starts` and the other patching schemes."""

from __future__ import annotations

from functools import partial
from typing import Any

import inputs
import torch
from op_case import IDS, OpCase
from torch import Tensor

import blt_kernels as bk
from blt_kernels.reference.entropy_patch import (
    delimiter_patch_reference,
    entropy_patch_reference,
    patch_starts_reference,
    space_patch_reference,
    static_patch_reference,
    topk_patch_reference,
)


def byte_patch_reference(cu_seqlens: Tensor, num_bytes: int, max_patches: int | None = None) -> bk.PatchLayout:
    return static_patch_reference(cu_seqlens, num_bytes, 1, max_patches=max_patches)


RULES: dict[str, dict[str, Any]] = {
    "": {},
    "monotonic": {"monotonic": True},
    "threshold_add": {"threshold_add": 0.25},
    "max_patch_length": {"max_patch_length": 5},
    "all": {"monotonic": True, "max_patch_length": 3},
    "overflow": {"share": 0.1},
}
_entropy_patch = partial(OpCase, bk.entropy_patch, entropy_patch_reference, differentiable=("logits",))
_patch_starts = partial(OpCase, bk.patch_starts, patch_starts_reference)
_EXACT = (torch.float32, torch.float64)
_scheme = partial(OpCase, dtypes=IDS)

CASES = [
    *(
        _entropy_patch(label, inputs.make_entropy_patch(**rule), trace=label in ("", "all"))
        for label, rule in RULES.items()
    ),
    *(
        _patch_starts(label, inputs.make_patch_starts(**rule), trace=label in ("", "overflow"))
        for label, rule in RULES.items()
    ),
    # In fp32 and fp64, rounding to the model's dtype moves no entropy past a threshold of these.
    _entropy_patch("model", inputs.make_entropy_patch(compare="model"), dtypes=_EXACT, fast=False),
    _patch_starts("model", inputs.make_patch_starts(compare="model", monotonic=True), dtypes=_EXACT, fast=False),
    OpCase(bk.topk_patch, topk_patch_reference, "", inputs.make_topk()),
    _scheme(bk.space_patch, space_patch_reference, "", inputs.make_tokens()),
    _scheme(bk.delimiter_patch, delimiter_patch_reference, "", inputs.make_tokens(id=ord("\n") + 4)),
    _scheme(bk.static_patch, static_patch_reference, "first=1", inputs.make_offsets(size=4)),
    _scheme(bk.static_patch, static_patch_reference, "first=size", inputs.make_offsets(size=4, first=4)),
    _scheme(bk.byte_patch, byte_patch_reference, "", inputs.make_offsets()),
]
