"""token_entropy and linear_entropy: accuracy, extremes, gradients of masked logits, shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import emulator, launches, order, use
from torch import Tensor

import blt_kernels as bk
from blt_kernels.reference import token_entropy as reference
from blt_kernels.testing import assert_close, assert_equal, ragged_logits


def eager_entropy(logits: Tensor) -> Tensor:
    """Compute entropies by the usual steps of eager PyTorch, in the dtype of the logits."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alphabet", [260, 700])
@pytest.mark.parametrize("size", [1e4, 2.0**22, 1e9, 1e30, -1e4, -1e30, -3e38])
def test_logits_around_a_large_value(size: float, alphabet: int, dtype: torch.dtype, device: str) -> None:
    """Small differences of large numbers, and maxima that grow from tile to tile, with ties among them."""
    generator = torch.Generator().manual_seed(int(abs(size)) % 1000)
    logits = torch.randn(64, alphabet, generator=generator) * 2
    logits[1::2, alphabet // 3 :] += size  # earlier logits are smaller or larger than these
    logits[::2] += size
    logits[3:9, -5:] = size
    x = logits.to(dtype).to(device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    ours, eager, truth = bk.token_entropy(x), reference.token_entropy_reference(x), eager_entropy(wide)
    assert_close(ours, eager.detach(), truth)
    assert_accurate(gradients(ours, [x]), gradients(eager, [x]), gradients(truth, [wide]), dtype)


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


def assert_accurate(ours: Any, eager: Any, truth: Any, dtype: torch.dtype) -> None:
    """Allow 16-bit inputs twice the error of eager PyTorch, others 32 units in the last place of the largest."""
    for a, p, e in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, eager, truth)), strict=True):
        if dtype.itemsize == 2:
            assert_close(a, p, e)
        else:
            bound = 32 * torch.finfo(dtype).eps * max(1.0, float(e.detach().abs().max()))
            torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=bound)


def gradients(entropy: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, entropy.numel(), dtype=entropy.dtype, device=entropy.device)
    return torch.autograd.grad((entropy * weights).sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alphabet", "offset"), [(1, 0), (7, 1), (260, 0), (260, 1), (261, 0), (700, 2)])
def test_any_alphabet_and_alignment(alphabet: int, offset: int, dtype: torch.dtype, device: str) -> None:
    """Rows that start and end anywhere between two vectors, one short of a vector and longer than a tile among them."""
    x = ragged_logits((9, alphabet + offset), dtype=dtype, device=device)[:, offset:].requires_grad_()
    ours, wide = bk.token_entropy(x), x.detach().double().requires_grad_()
    eager, truth = reference.token_entropy_reference(x), reference.token_entropy_reference(wide)
    assert_accurate(ours, eager, truth, dtype)
    eager_grad = gradients(eager, [x])
    assert_accurate(gradients(ours, [x]), eager_grad, gradients(truth, [wide]), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "alphabet"), [(70, 40, 260), (5, 33, 89), (600, 4, 3), (1, 1, 1)])
def test_linear_entropy_and_its_gradients(
    rows: int, width: int, alphabet: int, dtype: torch.dtype, device: str
) -> None:
    """Rows with whole vectors and without, and a single logit."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, width), (alphabet, width), (alphabet,))
    scales = (1.0, width**-0.5, 1.0)  # logits have a few nats
    inputs = [
        (torch.randn(*s, generator=generator) * scale).to(device, dtype).requires_grad_()
        for s, scale in zip(shapes, scales, strict=True)
    ]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    ours, eager, truth = bk.linear_entropy(*inputs), eager_linear(*inputs), eager_linear(*wide)
    assert_accurate(ours, eager, truth, dtype)
    eager_grads, truth_grads = gradients(eager, inputs), gradients(truth, wide)
    assert_accurate(gradients(ours, inputs), eager_grads, truth_grads, dtype)
    without_bias = bk.linear_entropy(*inputs[:2])
    torch.testing.assert_close(
        without_bias, bk.linear_entropy(*inputs[:2], torch.zeros_like(inputs[2])), rtol=1e-6, atol=1e-6
    )


def eager_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.token_entropy_reference(torch.nn.functional.linear(hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "alphabet"), [(2100, 5), (1100, 4200)])
def test_linear_entropy_of_more_rows_than_a_panel(rows: int, alphabet: int, dtype: torch.dtype, device: str) -> None:
    """A panel has at most 1024 rows on the CPU, and 8 MB of logits but at least 1024 rows on CUDA."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((rows, 3), (alphabet, 3), (alphabet,))
    inputs = [torch.randn(*s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    ours, eager, truth = bk.linear_entropy(*inputs), eager_linear(*inputs), eager_linear(*wide)
    assert_accurate(ours, eager, truth, dtype)
    assert_accurate(gradients(ours, inputs), gradients(eager, inputs), gradients(truth, wide), dtype)


# --- wrong input ------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 5)
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("weight shape", lambda: bk.linear_entropy(X, torch.zeros(3, 4)), ValueError, r"weight.*\[3, 4\]"),
    ("weight dtype", lambda: bk.linear_entropy(X, torch.zeros(3, 5).half()), TypeError, "weight.*float16"),
    ("bias shape", lambda: bk.linear_entropy(X, torch.zeros(3, 5), torch.zeros(4)), ValueError, r"bias.*\[4\]"),
    ("scalar", lambda: bk.token_entropy(torch.tensor(1.0)), ValueError, "logits"),
]


@pytest.mark.parametrize(("call", "error", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- CUDA kernels on the emulator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_of_token_entropy(dtype: torch.dtype) -> None:
    """Bytes as in token_entropy.cuh: the logits once, and once more for their gradient."""
    rows, row_bytes = 500, 260 * dtype.itemsize
    logits = ragged_logits((rows, 260), dtype=dtype).requires_grad_()
    with use("emulated"):
        emulator().take_launches()
        entropy = bk.token_entropy(logits)
        (forward,) = emulator().take_launches()
        entropy.backward(torch.ones(rows))
        (backward,) = emulator().take_launches()
    assert forward.read + forward.written <= 1.1 * rows * (row_bytes + 8)
    assert backward.read + backward.written <= 1.1 * rows * (2 * row_bytes + 12)


def test_traffic_of_linear_entropy() -> None:
    """Forward reads logits in rows that are padded to 16 bytes; backward writes gradients in their place."""
    rows, width, alphabet = 200, 16, 260
    hidden, weight = (torch.randn(n, width, dtype=torch.bfloat16).requires_grad_() for n in (rows, alphabet))
    (forward,) = launches(lambda: bk.linear_entropy(hidden, weight))
    assert forward.read + forward.written <= 1.1 * rows * (2 * 264 + 8)
    forward, backward = launches(lambda: bk.linear_entropy(hidden, weight).sum().backward())
    assert backward.read + backward.written <= 1.1 * rows * (2 * 2 * 264 + 12)


def test_linear_entropy_takes_logits_in_panels() -> None:
    """A kernel reads at most a panel: 1024 rows of 2100 fp32 logits, 16 of them to a block."""
    hidden, weight = torch.randn(1100, 3), torch.randn(2100, 3)
    assert [launch.grid[0] for launch in launches(lambda: bk.linear_entropy(hidden, weight))] == [64, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies_are_the_same_in_any_order_of_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = ragged_logits((70, 260), dtype=dtype)
    head = [torch.randn(*s, generator=generator).to(dtype) for s in ((70, 8), (20, 8), (20,))]

    def run() -> list[Tensor]:
        results = []
        for function, inputs in ((bk.token_entropy, [logits]), (bk.linear_entropy, head)):
            leaves = [x.clone().requires_grad_() for x in inputs]
            entropy = function(*leaves)
            results += [entropy.detach(), *gradients(entropy, leaves)]
        return results

    with use("emulated"):
        expected = run()
        for name in ("BACKWARD", "RANDOM"):
            with order(name, seed=1):
                assert_equal(run(), expected)
