"""few_row_layer in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.reference.block_causal_attention import block_causal_attention_reference
from blt_kernels.reference.few_row_linear import few_row_linear_reference


def few_row_layer_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    input_norm: Tensor,
    post_norm: Tensor,
    eps: float,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None = None,
) -> Tensor:
    """h = x + W_o attention(...); return h + W_down (silu(W_gate n) * W_up n), with n = norm(h)."""
    factors: Sequence[Tensor | None] = scales or [None] * len(weights)
    query, key, value, output, gate, up, down = zip(weights, factors, strict=True)
    q, k, v = (
        few_row_linear_reference(x, *weight, input_norm, eps).unflatten(-1, (-1, keys.shape[-1])).to(keys.dtype)
        for weight in (query, key, value)
    )
    q, k = _rotated(q, table), _rotated(k, table)
    keys.index_copy_(0, index, k)
    values.index_copy_(0, index, v)
    attended = block_causal_attention_reference(q, keys, values, cu_seqlens_q, cu_seqlens_k, window=window)
    assert isinstance(attended, Tensor)
    h = few_row_linear_reference(attended.flatten(-2), *output, residual=x)
    gated, raised = (few_row_linear_reference(h, *weight, post_norm, eps) for weight in (gate, up))
    return few_row_linear_reference(F.silu(gated) * raised, *down, residual=h)


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs of each head in the precision of the table."""
    pairs = x.to(torch.view_as_real(table).dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
