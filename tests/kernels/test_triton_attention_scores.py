"""The Triton kernels of block_causal_attention in the interpreter: scores of any size, NaN."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

import pytest
import torch
from inputs import LARGE_SCORES, eager_attention, large_scores, sizes_of_scores
from triton_interpreter import NAN, inputs, randn

from blt_kernels.testing import assert_close, assert_equal, offsets_of

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"), pytest.mark.slow]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_that_overflow_before_they_are_scaled(run: Callable, dtype: torch.dtype) -> None:
    """Powers of two move from the scale to q and k: results stay as precise, in fp32 the same bit for bit.

    In 16 bits forward starts anew, in smaller steps.
    """
    q, k, v, grad = inputs(70, 70, (2, 1), 32, dtype)
    cu = offsets_of([50, 20])
    q *= 16
    (out, _, *grads), _ = run((q, k, v, cu, None, 25, True, 0.5, None), grad)
    large = (q * 2.0**62, k * 2.0**59, v, cu, None, 25, True, 2.0**-122, None)
    assert not torch.einsum("qhe,khe->hqk", large[0].float(), large[1].float().expand(-1, 2, -1)).isfinite().all()
    (large_out, _, dq, dk, dv), _ = run(large, grad)
    actual = large_out, dq * 2.0**62, dk * 2.0**59, dv
    if dtype == torch.float32:
        torch.testing.assert_close(actual, (out, *grads), rtol=0, atol=2.0**-64)  # subnormal numbers are flushed to 0
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth = eager_attention(*leaves, cu.tolist(), 25, 0.5)
    truths = truth, *torch.autograd.grad(truth, leaves, grad.double())
    for result, plain, exact in zip(actual, (out, *grads), truths, strict=True):
        assert_close(result, plain, exact.detach())


@pytest.mark.parametrize(
    ("case", "dtype", "size"),
    [
        (0, torch.float32, 1e6),
        (1, torch.bfloat16, 3e38),
        (2, torch.bfloat16, 1e6),
        (3, torch.float16, 3e9),
        (4, torch.bfloat16, 3e9),
        (4, torch.float32, 3e38),
    ],
)
def test_scores_of_any_size(run: Callable, case: int, dtype: torch.dtype, size: float) -> None:
    """Outputs are as precise as for ordinary scores, up to near the largest of fp32, of both signs, per document."""
    width, scale, window = LARGE_SCORES[case]
    (q, k, v, _), offsets = large_scores(size, (2, 1), width, scale, dtype)
    cu = torch.tensor(offsets, dtype=torch.int32)
    (out, _), _ = run((q, k, v, cu, None, window, True, scale, None))
    eager, truth = (
        eager_attention(*(x.to(cast) for x in (q, k, v)), offsets, window, scale) for cast in (dtype, torch.float64)
    )
    for begin, end in itertools.pairwise(offsets):
        assert_close(out[begin:end], eager[begin:end], truth[begin:end])


@pytest.mark.parametrize(("dtype", "number"), [(torch.bfloat16, 133120.0), (torch.float16, 65504.0)])
def test_alike_keys_of_huge_scores_weigh_the_same(run: Callable, dtype: torch.dtype, number: float) -> None:
    """The average of values of 1 is exactly 1, whatever 1 / sqrt(128) and its rounding make of the scores."""
    q, k, v = torch.full((70, 2, 128), number, dtype=dtype), *(torch.ones(70, 1, 128, dtype=dtype) for _ in "kv")
    k *= number
    cu = offsets_of([40, 30])
    results, _ = run((q, k, v, cu, None, None, True, None, None), randn(70, 2, 128, dtype=dtype))
    assert_equal(results[0], v.expand_as(q))
    assert all(x.isfinite().all() for x in results)
    last = offsets_of([1, 1])
    for splits in (1, 3):
        (out, lse), _ = run((q[:2], k, v, last, cu, None, True, None, None), splits=splits)
        assert_equal(out, torch.ones_like(out))
        assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_with_scores_of_any_size(run: Callable, dtype: torch.dtype) -> None:
    """Keys of the same score lie in several parts, whose logarithms would have lost their weights."""
    for size in sizes_of_scores(dtype)[1:]:
        for width, scale, window in LARGE_SCORES[1:3]:
            (q, k, v, _), offsets = large_scores(size, (2, 1), width, scale, dtype)
            last = torch.tensor(offsets[1:]) - 1
            cu_q, cu_k = offsets_of([1] * len(last)), torch.tensor(offsets, dtype=torch.int32)
            (out, _), _ = run((q[last], k, v, cu_q, cu_k, window, True, scale, None), splits=3)
            eager, truth = (
                eager_attention(*(x.to(cast) for x in (q, k, v)), offsets, window, scale)[last]
                for cast in (dtype, torch.float64)
            )
            assert_close(out, eager, truth)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e3), (torch.bfloat16, 1e4), (torch.float32, 3e9), (torch.bfloat16, 3e38), (torch.float16, 3e9)],
)
def test_gradients_of_large_scores(run: Callable, dtype: torch.dtype, size: float) -> None:
    """Weights are off by 2^-22 times the size of scores at most, and finite and at most 1 whatever that is."""
    width, scale, _ = LARGE_SCORES[2]
    (q, k, v, grad), offsets = large_scores(size, (2, 1), width, scale, dtype)
    cu = torch.tensor(offsets, dtype=torch.int32)
    (_, _, *grads), _ = run((q, k, v, cu, None, None, True, scale, None), grad)
    assert all(x.isfinite().all() for x in grads)
    eps = torch.finfo(dtype).eps
    for begin, end in itertools.pairwise(offsets):
        most = grad[begin:end].abs().double().sum((0, 1))
        assert (grads[2][begin:end].abs() <= (1 + 2 * eps) * most).all()
    if size <= 1e4:
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        out = eager_attention(*leaves, offsets, None, scale)
        exact, terms = (
            torch.autograd.grad(out, leaves[2], x, retain_graph=True)[0] for x in (grad.double(), grad.double().abs())
        )
        tiny = 1e-30  # weights below the smallest of fp32 are 0
        assert ((grads[2] - exact).abs() <= (2**-22 * size + 2 * eps) * terms + tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_of_a_query_reaches_the_gradients_of_its_keys(run: Callable, dtype: torch.dtype) -> None:
    """Weights are at most 1, and NaN all the same where scores are."""
    q, k, v, grad = inputs(120, 120, (2, 1), 32, dtype)
    q[70, 1] = NAN
    (_, _, dq, dk, dv), _ = run((q, k, v, offsets_of([60, 60]), None, None, True, None, None), grad)
    assert dq[70, 1].isnan().all()
    assert not dq[:70].isnan().any()
    for x in (dk, dv):
        assert x[60:71].isnan().all()
        assert not x[:32].isnan().any()  # the query attends to no key of these tiles
