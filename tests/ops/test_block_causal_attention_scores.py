"""block_causal_attention: scores of any size, half precision, NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inputs
import pytest
import torch
import torch.nn.functional as F
from attention_oracle import NAN, oracle, randn
from torch import Tensor

from blt_kernels import block_causal_attention
from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import assert_close, offsets_of

pytestmark = pytest.mark.triton


def attend_on_cpu(scale: float | None, window: int | None) -> Callable[..., tuple[Tensor, ...]]:
    """Return out and the gradients of q, k and v, for `inputs.check_large_scores`."""

    def attend(tensors: list[Tensor], offsets: list[int]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        out = block_causal_attention(*leaves, torch.tensor(offsets), window=window, scale=scale)
        return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "scale", "window"), inputs.LARGE_SCORES)
def test_scores_of_any_size(
    width: int, scale: float | None, window: int | None, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Outputs and gradients are as precise as for ordinary scores, up to near the largest of fp32, of both signs."""
    if device != "cpu":
        pytest.skip("test_triton_attention.py has the same for Triton")
    for size in inputs.sizes_of_scores(dtype):
        inputs.check_large_scores(attend_on_cpu(scale, window), size, (4, 2), width, scale, window, dtype)


@pytest.mark.parametrize("size", [1e12, 1e290])
def test_scores_of_any_size_in_fp64(size: float, device: str) -> None:
    for scale in (None, -0.25):  # powers of two, since the reference scales before it multiplies
        tensors, offsets = inputs.large_scores(size, (4, 2), 64, scale, torch.float64)
        leaves = [x.to(device).requires_grad_() for x in tensors[:3]]
        expected = inputs.eager_attention(*leaves, offsets, None, scale)
        out = block_causal_attention(*leaves, torch.tensor(offsets, device=device), scale=scale)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        grad = tensors[3].to(device)
        ours, theirs = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
        torch.testing.assert_close(ours[0][..., 32:], theirs[0][..., 32:], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "scale", "window"), inputs.LARGE_SCORES)
def test_decoding_with_scores_of_any_size(
    width: int, scale: float | None, window: int | None, dtype: torch.dtype, device: str
) -> None:
    """The last query of each document, on its own tile, and lse, which is as precise as fp32 is."""
    for size in inputs.sizes_of_scores(dtype):
        (q, k, v, _), offsets = inputs.large_scores(size, (4, 2), width, scale, dtype)
        last = torch.tensor(offsets[1:]) - 1
        cu_q, cu_k = (torch.tensor(x, device=device) for x in (range(len(offsets)), offsets))
        options = {"window": window, "scale": scale, "return_lse": True}
        out, lse = block_causal_attention(*(x.to(device) for x in (q[last], k, v)), cu_q, cu_k, **options)
        eager, truth = (
            inputs.eager_attention(*(x.to(cast) for x in (q, k, v)), offsets, window, scale)[last]
            for cast in (dtype, torch.float64)
        )
        assert_close(out.cpu(), eager, truth)
        _, expected = oracle(*(x.double() for x in (q, k, v)), offsets, offsets, window, scale=scale)
        torch.testing.assert_close(lse.cpu().double(), expected[last], rtol=3e-6, atol=3e-5)
        _, whole = block_causal_attention(*(x.to(device) for x in (q, k, v)), cu_k, **options)
        torch.testing.assert_close(whole.cpu().double(), expected, rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("slope", [-0.5, 0.5])
def test_scores_far_apart(slope: float, device: str) -> None:
    """Weights of next to nothing, and a largest score that rises at every key, up to 150.

    Backward starts from the rounded lse, as torch's own flash attention does, which with such scores is what errs most.
    """
    q = torch.ones(300, 1, 64, device=device)
    k = (torch.arange(300, device=device) * slope / 64)[:, None, None].expand(300, 1, 64).contiguous()
    v, grad = (randn(300, 1, 64, seed=i, device=device, dtype=torch.float32) for i in (1, 2))

    def torchs_own(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, scale=1.0)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    truth = run(reference.block_causal_attention_reference, torch.float64)
    ours, *eager = (
        [(x - y).abs().max() for x, y in zip(run(function, torch.float32), truth, strict=True)]
        for function in (block_causal_attention, reference.block_causal_attention_reference, torchs_own)
    )
    for error, *others in zip(ours, *eager, strict=True):
        assert error <= 2 * max(others)


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_in_half_precision(dtype: torch.dtype, width: int, device: str) -> None:
    """Long and short documents, whole and windowed, scales of either sign: at most twice the error of the reference."""
    cu_seqlens = offsets_of([1, 130, 0, 64, 333, 17], device=device)
    q, k, v = (randn(548, heads, width, seed=heads, device=device, dtype=dtype) for heads in (4, 2, 2))
    q[545:], k[545:], v[545:] = NAN, NAN, NAN  # these rows lie beyond the last document
    grad = randn(548, 4, width, seed=3, device=device, dtype=dtype)

    def results(function: Callable[..., Tensor], cast: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
        leaves = [x.to(cast).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, cu_seqlens, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(cast))

    for options in ({}, {"window": 70}, {"scale": -0.2}, {"causal": False}):
        ours = results(block_causal_attention, dtype, **options)
        eager, truth = (
            results(reference.block_causal_attention_reference, cast, **options) for cast in (dtype, torch.float64)
        )
        for name, *triple in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
            assert_close(*triple, name=f"{name} {options}")
            assert not triple[0][545:].any()


@pytest.mark.parametrize("row", [0, 100, 400])
def test_nan_in_bf16_reaches_those_that_attend_to_it(row: int, device: str) -> None:
    cu_seqlens = offsets_of([300, 200], device=device)
    q, k, v = (randn(500, 2, 64, seed=i, device=device, dtype=torch.bfloat16) for i in range(3))
    clean = block_causal_attention(q, k, v, cu_seqlens)
    k[row, 1, 5] = NAN
    out = block_causal_attention(q, k, v, cu_seqlens)
    end = 300 if row < 300 else 500
    assert out[row:end, 1].isnan().all()
    out[row:end, 1] = clean[row:end, 1]
    assert torch.equal(out, clean)
