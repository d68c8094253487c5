"""Attention one document at a time, and checks of block_causal_attention against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from blt_kernels import block_causal_attention
from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import assert_close

NAN = float("nan")


# fp64 is exact but takes the reference on a GPU; kernels there take the others.
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def randn(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: list[int],
    cu_k: list[int],
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    used: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend one document at a time, with a full matrix of scores."""
    repeat = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=q.dtype, device=q.device)
    for b in range(len(cu_q) - 1):
        rows = slice(cu_q[b], cu_q[b + 1])
        keys = slice(cu_k[b], cu_k[b + 1] if used is None else cu_k[b] + used[b])
        n, m = rows.stop - rows.start, keys.stop - keys.start
        if not n or not m:
            continue
        ahead = torch.arange(m, device=q.device) - torch.arange(n, device=q.device)[:, None] - (m - n)
        attended = torch.ones_like(ahead, dtype=torch.bool)
        if causal:
            attended &= ahead <= 0
        if window is not None:
            attended &= ahead.abs() < window
        scores = torch.einsum("qhe,khe->hqk", q[rows], k[keys].repeat_interleave(repeat, 1))
        scores = (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~attended, -math.inf)
        p = scores.softmax(-1).masked_fill(~attended, 0)
        out[rows] = torch.einsum("hqk,khe->qhe", p, v[keys].repeat_interleave(repeat, 1))
        lse[rows] = scores.logsumexp(-1).mT
    return out, lse


def check_close(actual: Tensor, expected: Callable[[torch.dtype], Tensor]) -> None:
    """`actual` is ``expected(fp64)``: to rounding in fp64, else about as closely as `expected` of its own dtype."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected(torch.float64), rtol=1e-11, atol=1e-11)
    else:
        assert_close(actual, expected(actual.dtype), expected(torch.float64))


def check_attention(
    batch: Sequence[dict[str, Any]],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    offsets: Sequence[list[int]],
    *,
    used: list[int] | None = None,
    grad: Tensor | None = None,
) -> None:
    """Check out, lse and, for a `grad` of out, the gradients of q, k and v rounded to `dtype` against `oracle`.

    In fp64 to rounding, else about as closely as those of the reference in `dtype`. `offsets` are of queries, and of
    keys if these have their own. Errors for the options in `batch` are judged together: those of few numbers are luck.
    """
    device = tensors[0].device
    cu_seqlens = [torch.tensor(x, device=device) for x in offsets]
    seqused_k = None if used is None else torch.tensor(used, device=device)

    def results(who: str, cast: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
        q, k, v = (x.to(dtype).to(cast).requires_grad_() for x in tensors)
        if who == "oracle":
            out, lse = oracle(q, k, v, offsets[0], offsets[-1], used=used, **options)
        else:
            function = block_causal_attention if who == "op" else reference.block_causal_attention_reference
            out, lse = function(q, k, v, *cu_seqlens, seqused_k=seqused_k, return_lse=True, **options)
        found = {"out": out.detach(), "lse": lse.detach()}
        if grad is None:
            return found
        grads = torch.autograd.grad(out, (q, k, v), grad.to(dtype).to(cast))
        return found | dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))

    actual, eager, truth = (
        [results(who, cast, options) for options in batch]
        for who, cast in (("op", dtype), ("reference", dtype), ("oracle", torch.float64))
    )
    for name in actual[0]:
        values = [[x[name] for x in column] for column in (actual, eager, truth)]
        if dtype == torch.float64:
            torch.testing.assert_close(values[0], values[2], rtol=1e-10, atol=1e-10)
        elif name == "lse":
            torch.testing.assert_close([x.double() for x in values[0]], values[2], rtol=3e-6, atol=3e-5)
        else:
            assert_close(*values, name=name)
