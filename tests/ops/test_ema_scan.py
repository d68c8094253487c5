"""ema_scan: hand-worked documents, any documents row by row, long ones, NaN, traffic, and every argument error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import launches, traffic
from hypothesis import given
from hypothesis import strategies as st
from op_calls import cast, check, run
from op_case import FLOATS, OpCase
from tiers import slow_unless
from torch import Tensor

from blt_kernels import ema_scan
from blt_kernels.reference.ema_scan import ema_scan_reference
from blt_kernels.testing import assert_equal, document_lengths, offsets_of, ragged_layout

NAN = float("nan")
CASE = OpCase(ema_scan, ema_scan_reference, "", dict, ("x", "p"))


def by_rows(x: Tensor, p: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute the formula one row at a time."""
    starts, end = set(cu_seqlens[:-1].tolist()), int(cu_seqlens[-1])
    rows: list[Tensor] = []
    for t in range(x.shape[0]):
        if t >= end:
            rows.append(torch.zeros_like(x[t]))
        else:
            rows.append(p[t] * x[t] + (0 if t in starts else (1 - p[t]) * rows[-1]))
    return torch.stack(rows) if rows else x.clone()


def random_arguments(
    lengths: tuple[int, ...], width: int, dtype: torch.dtype, device: str, *, scale: float = 1.0
) -> dict[str, Any]:
    """Return documents of these lengths and three rows beyond them. Weights reach up to `scale`, and some are 1."""
    total = sum(lengths) + 3
    p = torch.rand(total, device=device) * scale
    p[::11] = 1
    x = torch.randn(total, width, device=device)
    return {"x": x.to(dtype), "p": p.to(dtype), "cu_seqlens": offsets_of(list(lengths)).to(device)}


def test_hand_worked(device: str) -> None:
    """Two documents with an empty one between them, and a row beyond them."""
    x = torch.tensor([[2.0, 0], [4, 8], [8, 16], [10, 2], [NAN, NAN]], dtype=torch.float64, device=device)
    p = torch.tensor([1, 0.5, 0.25, 0.5, NAN], dtype=torch.float64, device=device)
    x.requires_grad_(), p.requires_grad_()
    y = ema_scan(x, p, torch.tensor([0, 3, 3, 4], device=device))
    assert y.tolist() == [[2, 0], [3, 4], [4.25, 7], [5, 1], [0, 0]]
    y.backward(torch.tensor([[1.0, 1], [1, 1], [4, 4], [2, 2], [NAN, NAN]], dtype=torch.float64, device=device))
    # g is 4 in row 2, 1 + 0.75 * 4 = 4 in row 1 and 1 + 0.5 * 4 = 3 in row 0.
    assert x.grad.tolist() == [[3, 3], [2, 2], [1, 1], [1, 1], [0, 0]]
    assert p.grad.tolist() == [3 * 2, 4 * (2 + 8), 4 * (5 + 12), 2 * 12, 0]


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (0, 1, 0), (2, 1)])
def test_short_documents(lengths: tuple[int, ...], device: str) -> None:
    total = sum(lengths)
    x = torch.arange(1.0, total + 1, device=device)[:, None].requires_grad_()
    p = torch.full((total,), 0.5, device=device, requires_grad=True)
    y = ema_scan(x, p, offsets_of(list(lengths)).to(device))
    assert y.shape == x.shape
    y.sum().backward()
    expected = {(): [], (0,): [], (0, 0): [], (1,): [0.5], (0, 1, 0): [0.5], (2, 1): [0.5, 1.25, 1.5]}
    assert y.flatten().tolist() == expected[lengths]
    assert x.grad.shape == x.shape
    assert p.grad.shape == p.shape


def test_no_columns(device: str) -> None:
    x, p = (torch.zeros(shape, device=device, requires_grad=True) for shape in ((5, 0), (5,)))
    y = ema_scan(x, p)
    grads = torch.autograd.grad(y, (x, p), torch.zeros_like(y))
    assert (y.shape, grads[0].shape, grads[1].tolist()) == ((5, 0), (5, 0), [0] * 5)


@given(st.integers(0, 90), st.integers(0, 1000), st.integers(0, 40))
def test_any_documents_against_one_row_at_a_time(device: str, num_rows: int, seed: int, tail: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = offsets_of(document_lengths(num_rows, seed))
    x = torch.randn(num_rows + tail, 3, dtype=torch.float64, generator=generator).requires_grad_()
    p = torch.rand(num_rows + tail, dtype=torch.float64, generator=generator).requires_grad_()
    grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    x_here, p_here = (v.detach().to(device).requires_grad_() for v in (x, p))
    y, expected = ema_scan(x_here, p_here, cu_seqlens.to(device)), by_rows(x, p, cu_seqlens)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-12, atol=1e-12)
    if num_rows == 0:
        return
    grads = torch.autograd.grad(y, (x_here, p_here), grad.to(device))
    for ours, theirs in zip(grads, torch.autograd.grad(expected, (x, p), grad), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-11, atol=1e-11)


# Chunks have 32 rows and groups 1024 on CUDA: no document, some and many begin in one.
LONG = [(4000,), (31, 1, 32, 1024, 33, 2100), (1024, 2048, 64)]


@pytest.mark.parametrize("dtype", slow_unless(FLOATS, (torch.float64, torch.bfloat16)))
@pytest.mark.parametrize("lengths", LONG)
def test_long_documents(lengths: tuple[int, ...], dtype: torch.dtype, backend: str, device: str) -> None:
    torch.manual_seed(0)
    check(CASE, [random_arguments(lengths, 4 if backend == "emulated" else 150, dtype, device)])


@pytest.mark.parametrize("scale", [0.1, 1e-3])
def test_averages_of_many_rows(scale: float, backend: str, device: str) -> None:
    """Small weights carry sums over many chunks. Rounding errors of 2 / scale rows add up like a random walk."""
    torch.manual_seed(1)
    arguments = random_arguments((5000,), 4 if backend == "emulated" else 40, torch.float32, device, scale=scale)
    arguments["p"][1:] = arguments["p"][1:].clamp(max=scale)
    ours, our_grads = run(CASE, ema_scan, arguments)
    truth, true_grads = run(CASE, ema_scan_reference, cast(arguments, torch.float64))
    for actual, exact in zip((ours, *our_grads), (truth, *true_grads), strict=True):
        assert (
            float((actual.double() - exact).norm() / exact.norm()) < torch.finfo(torch.float32).eps * (2 / scale) ** 0.5
        )


@pytest.mark.parametrize("first_length", [40, 31, 64, 1100])
def test_a_nan_stays_in_its_document(first_length: int, device: str) -> None:
    """Values, weights and gradients of a document show in no other, wherever chunks begin."""
    torch.manual_seed(2)
    arguments = random_arguments((70, first_length, 75), 4, torch.float32, device)
    begin, end = 70, 70 + first_length
    spoiled = {name: value.clone() for name, value in arguments.items()}
    spoiled["x"][begin + 5], spoiled["p"][end - 1], spoiled["p"][begin] = NAN, NAN, NAN

    def results(given: dict[str, Tensor], spoil: bool) -> list[Tensor]:
        leaves = [given[name].clone().requires_grad_() for name in ("x", "p")]
        y = ema_scan(*leaves, given["cu_seqlens"])
        grad = torch.ones_like(y)
        if spoil:
            grad[begin:end] = NAN
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    for clean, actual in zip(results(arguments, False), results(spoiled, True), strict=True):
        assert_equal(actual[:begin], clean[:begin])
        assert_equal(actual[end:], clean[end:])
        assert actual[begin:end].isnan().any()


def test_weights_of_another_dtype(device: str) -> None:
    """H-Net has weights in fp32 for vectors in bf16; they are not rounded, nor is their gradient."""
    torch.manual_seed(3)
    arguments = random_arguments((300, 50), 24, torch.float32, device)
    half = {**arguments, "x": arguments["x"].bfloat16()}
    y, (grad_x, grad_p) = run(CASE, ema_scan, half)
    assert (y.dtype, grad_x.dtype, grad_p.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = {**half, "x": half["x"].float()}
    whole, (_, whole_grad) = run(CASE, ema_scan, exact)
    assert_equal(y, whole.bfloat16())
    assert float((grad_p - whole_grad).norm() / whole_grad.norm()) < 2**-8  # y is stored in bf16
    wide = ema_scan(half["x"], arguments["p"].double(), arguments["cu_seqlens"])
    assert_equal(wide, y)


def test_padded_rows_are_documents(device: str) -> None:
    x, p = torch.randn(3, 50, 7, device=device), torch.rand(3, 50, device=device)
    offsets = torch.arange(4, device=device) * 50
    packed, packed_grads = run(CASE, ema_scan, {"x": x.flatten(0, 1), "p": p.flatten(), "cu_seqlens": offsets})
    y, grads = run(CASE, ema_scan, {"x": x, "p": p})
    assert_equal(y, packed.view(3, 50, 7))
    assert_equal(grads, [g.view(v.shape) for g, v in zip(packed_grads, (x, p), strict=True)])
    assert_equal(ema_scan(x[0], p[0]), packed[:50])  # one document


def test_patches_of_a_layout(device: str) -> None:
    """Patches are documents by `cu_patches`; spare ones give 0."""
    layout = ragged_layout(200, max_patches=150, device=device)
    used = int(layout.cu_patches[-1])
    assert used < layout.capacity
    x, p = torch.randn(layout.capacity, 5, device=device), torch.rand(layout.capacity, device=device)
    y = ema_scan(x, p, layout.cu_patches)
    assert not y[used:].any()
    torch.testing.assert_close(y, by_rows(x, p, layout.cu_patches), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(dtype: torch.dtype) -> None:
    """The CUDA kernels read x twice and write y; backward they read the gradient twice and x and y once."""
    x = torch.randn(512, 512).to(dtype).requires_grad_()
    p = torch.rand(512, requires_grad=True)
    tensor, ends = x.numel() * x.element_size(), 16 * 512 * 4  # 16 chunks are written, read, replaced and read again
    forward = traffic(lambda: ema_scan(x.detach(), p.detach()))
    assert forward <= 1.05 * (3 * tensor + 4 * ends)
    grad = torch.randn_like(x)  # memory of its own, or x would be read once less
    both = traffic(lambda: torch.autograd.grad(ema_scan(x, p), (x, p), grad))
    assert both - forward <= 1.05 * (5 * tensor + 4 * ends)


def test_no_thread_walks_a_long_document_alone() -> None:
    """One document of 16384 rows: a thread visits a chunk, the 32 chunks of a group, or these and 15 groups."""
    x = torch.randn(16384, 8, dtype=torch.bfloat16, requires_grad=True)
    p = torch.rand(16384, requires_grad=True)
    done = launches(lambda: torch.autograd.grad(ema_scan(x, p), (x, p), torch.ones_like(x)))
    assert [launch.kernel.split("<")[0].removeprefix("blt::ema_scan_") for launch in done] == [
        *("ends_kernel", "groups_kernel", "carries_kernel", "fwd_kernel"),
        *("ends_kernel", "groups_kernel", "carries_kernel", "bwd_kernel"),
    ]
    assert max(launch.longest for launch in done) <= 32 * 5 + 16


@pytest.mark.parametrize("lengths", [(3000,), (1, 700, 2000, 5, 5, 5)])
def test_threads_share_documents_without_a_trace(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    arguments = random_arguments(lengths, 700, torch.bfloat16, "cpu")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(CASE, ema_scan, arguments))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
        ({"x": torch.zeros(20, 3, dtype=torch.int32)}, TypeError, "x: expected dtype in float32.*got torch.int32"),
        ({"x": torch.zeros(20)}, ValueError, r"x: expected 2 or 3 dimensions, got shape \[20\]"),
        ({"p": [0.5] * 20}, TypeError, "p: expected a tensor, got list"),
        ({"p": torch.zeros(20, dtype=torch.bool)}, TypeError, "p: expected dtype in float32.*got torch.bool"),
        ({"p": torch.zeros(19)}, ValueError, r"p: expected shape \[T\] of x = \[20\], got \[19\]"),
        ({"p": torch.zeros(20, 1)}, ValueError, r"p: expected shape \[T\] of x = \[20\], got \[20, 1\]"),
        ({"p": torch.zeros(20, device="meta")}, ValueError, "p: expected device cpu of x, got meta"),
        (
            {"cu_seqlens": torch.tensor([0, 21])},
            ValueError,
            "cu_seqlens: expected offsets that start at 0.*at most at 20",
        ),
        ({"cu_seqlens": torch.tensor([0.0, 20])}, TypeError, "cu_seqlens: expected dtype in int32, int64"),
        (
            {"x": torch.zeros(2, 10, 3), "p": torch.zeros(2, 10)},
            ValueError,
            r"cu_seqlens: expected None, since x is padded with shape \[2, 10, 3\]",
        ),
        (
            {"x": torch.zeros(2, 10, 3), "cu_seqlens": None},
            ValueError,
            r"p: expected shape \[B, S\] of x = \[2, 10\], got \[20\]",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(20, 3), "p": torch.zeros(20), "cu_seqlens": torch.tensor([0, 20])}
    with pytest.raises(error, match=message):
        ema_scan(**{**arguments, **change})
