"""few_row_layer in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

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


def few_row_layer_step_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: float,
    table: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    index: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
    patch_keys: Sequence[Tensor],
    patch_values: Sequence[Tensor],
    patches: Tensor | None,
    head_norm: Tensor | None,
    head: Tensor | None,
) -> Tensor:
    """Run layers one by one. The first ones have a cross attention in front, whose two weights and norm come first.

    Return the product of the norm of the result with `head`, if there is one.
    """
    factors_of: Sequence[Tensor | None] = scales or [None] * len(weights)
    matrices = iter(zip(weights, factors_of, strict=True))
    norm, cross = iter(norms), iter(zip(patch_keys, patch_values, strict=True))
    for cache in zip(keys, values, strict=True):
        patch_cache = next(cross, None)
        if patch_cache is not None:
            assert patches is not None
            query, output = islice(matrices, 2)
            q = few_row_linear_reference(x, *query, next(norm), eps)
            x = few_row_linear_reference(_read(q, *patch_cache, patches), *output, residual=x, residual_factor=2.0)
        own, factors = zip(*islice(matrices, 7), strict=True)
        x = few_row_layer_reference(
            x, own, factors if scales else (), next(norm), next(norm), eps, table, *cache,
            index, cu_seqlens_q, cu_seqlens_k, window,
        )  # fmt: skip
    return x if head is None else few_row_linear_reference(x, head, None, head_norm, eps)


def _read(q: Tensor, keys: Tensor, values: Tensor, patches: Tensor) -> Tensor:
    """Attend to the vectors ``[C, K, G, E]`` of the patch of each row; without a patch, return 0."""
    q, index = q.unflatten(-1, (-1, keys.shape[-1])), patches.long().clamp(min=0)
    shared = q.shape[1] // keys.shape[2]
    k, v = (x.index_select(0, index).repeat_interleave(shared, 2) for x in (keys, values))  # [T, K, H, E]
    p = (torch.einsum("the,tkhe->thk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    out = torch.einsum("thk,tkhe->the", p, v)
    return torch.where((patches < 0)[:, None, None], 0, out).flatten(1)


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs of each head in the precision of the table."""
    pairs = x.to(torch.view_as_real(table).dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
