"""RMSNorm of transformers' BLT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.integrations._applied import Applied
from blt_kernels.nn.functional import rms_norm


def norm(applied: Applied, stock: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return the forward of ``BltRMSNorm``, which rounds once where transformers rounds twice."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype != hidden_states.dtype:
            applied.fell_back("BltRMSNorm.forward", f"a weight in {weight.dtype} with a {hidden_states.dtype} input")
            return stock(self, hidden_states)
        applied.count("BltRMSNorm.forward")
        if _checks.readable(hidden_states):
            return rms_norm(hidden_states, weight, self.variance_epsilon)
        return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)

    return forward
