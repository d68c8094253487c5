"""token_entropy and linear_entropy: accuracy, extremes, gradients of masked logits, shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import assert_close, assert_equal, ragged_logits


def eager_entropy(logits: Tensor) -> Tensor:
    """The usual steps of eager PyTorch, in the dtype of the logits."""
    log_p = logits.log_softmax(-1)
    return -(log_p * log_p.exp()).sum(-1)


@pytest.mark.parametrize("alphabet", [2, 64, 260, 1000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_entropy_is_at_least_as_accurate_as_eager_fp32(alphabet: int, scale: float, device: str) -> None:
    logits = torch.randn(1000, alphabet, generator=torch.Generator().manual_seed(alphabet)).to(device) * scale
    truth = eager_entropy(logits.double())
    assert_close(bk.token_entropy(logits), eager_entropy(logits), truth, factor=1.0)
    entropy, _ = bk.entropy_patch(logits, threshold=1.0)
    assert_equal(entropy, bk.token_entropy(logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_lose_nothing_more(dtype: torch.dtype, device: str) -> None:
    logits = ragged_logits((1000, 260), dtype=dtype, device=device)
    truth = eager_entropy(logits.double())
    out = bk.token_entropy(logits)
    assert out.dtype == torch.float32
    assert_close(out, eager_entropy(logits.float()), truth, factor=1.0)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 3e38])
def test_entropy_of_equal_logits_is_log_alphabet(shift: float, device: str) -> None:
    for alphabet in (1, 2, 7, 260):
        out = bk.token_entropy(torch.full((3, alphabet), shift, device=device))
        torch.testing.assert_close(out, torch.full((3,), math.log(alphabet), device=device), rtol=3e-7, atol=1e-7)


def test_entropy_by_hand(device: str) -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [-math.inf, 0.0]], dtype=torch.float64, device=device)
    expected = [math.log(4) - 0.75 * math.log(3), 0.0]
    torch.testing.assert_close(bk.token_entropy(logits), torch.tensor(expected, dtype=torch.float64, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alphabet", [5, 260])
def test_infinite_and_nan_logits(dtype: torch.dtype, alphabet: int, device: str) -> None:
    logits = ragged_logits((7, alphabet), dtype=torch.float32, device=device).to(dtype)
    masked = logits.clone()
    masked[:, [0, -1]] = -math.inf
    out = bk.token_entropy(masked)
    torch.testing.assert_close(out.double(), eager_entropy(masked[:, 1:-1].double()), rtol=1e-5, atol=1e-6)
    bad = logits.clone()
    bad[1, 2] = math.nan
    bad[2, 0] = math.inf
    bad[3] = -math.inf
    bad[4, -1] = math.nan
    expected = [False, True, True, True, True, False, False]
    assert bk.token_entropy(bad).isnan().tolist() == expected
    entropy, layout = bk.entropy_patch(bad, threshold=-1.0)
    assert entropy.isnan().tolist() == expected
    # NaN is above no threshold; every other byte is above -1.
    assert layout.to_lengths(include_next_byte=True).tolist() == [[1, 5, 1, 1]]


def test_masked_logits_get_no_gradient(device: str) -> None:
    logits = ragged_logits((4, 9), device=device).requires_grad_()
    masked = logits.masked_fill(torch.arange(9, device=device) == 3, -math.inf)
    masked.retain_grad()
    bk.token_entropy(masked).sum().backward()
    assert masked.grad is not None
    assert masked.grad[:, 3].eq(0).all()
    assert masked.grad.isfinite().all()
    rest = logits.detach()[:, [0, 1, 2, 4, 5, 6, 7, 8]].double().requires_grad_()
    eager_entropy(rest).sum().backward()
    torch.testing.assert_close(masked.grad[:, [0, 1, 2, 4, 5, 6, 7, 8]].double(), rest.grad, rtol=1e-5, atol=1e-6)


def test_large_logits_neither_overflow_nor_vanish(device: str) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [88.0, 89.0, 90.0], [-1e30, -1e30, -2e30]], device=device)
    assert_close(
        bk.token_entropy(logits), eager_entropy(logits.double()).float(), eager_entropy(logits.double()), factor=4
    )


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 0), (2, 3, 4)])
def test_token_and_linear_entropy_take_any_leading_shape(leading: tuple[int, ...], device: str) -> None:
    hidden, weight = torch.randn(*leading, 6, device=device), torch.randn(5, 6, device=device)
    out = bk.linear_entropy(hidden, weight)
    assert out.shape == leading
    torch.testing.assert_close(out, bk.token_entropy(hidden @ weight.T), rtol=1e-4, atol=1e-5)


def test_linear_entropy_is_no_less_accurate_at_the_size_of_a_model(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(*s, generator=generator).to(device) for s in ((300, 768), (260, 768), (260,)))
    weight *= 0.05
    truth = eager_entropy(torch.nn.functional.linear(hidden.double(), weight.double(), bias.double()))
    eager = eager_entropy(torch.nn.functional.linear(hidden, weight, bias))
    assert_close(bk.linear_entropy(hidden, weight, bias), eager, truth)
