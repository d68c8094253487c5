"""linear_cross_entropy: values and gradients beside F.cross_entropy, extreme logits, targets, panels."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import launches, order, use
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import blt_kernels as bk
import blt_kernels.flops
from blt_kernels.cli import bench
from blt_kernels.testing import assert_close, assert_equal

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100


def stored(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, ignore_index: int = IGNORED
) -> Tensor:
    """Compute the same from stored logits, in fp32 from the logits on."""
    logits = F.linear(hidden, weight, bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets.long(), reduction="none", ignore_index=ignore_index)


def head(rows: int, width: int, alphabet: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> list[Tensor]:
    """Return hidden, weight and bias; logits have a few nats times `scale`."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, width), (alphabet, width), (alphabet,))
    scales = (1.0, scale * width**-0.5, scale)
    return [
        (torch.randn(*s, generator=generator) * scale).to(device, dtype)
        for s, scale in zip(shapes, scales, strict=True)
    ]


def targets_of(rows: int, alphabet: int, device: str) -> Tensor:
    """Return targets of which every seventh is ignored."""
    targets = torch.randint(alphabet, (rows,), generator=torch.Generator().manual_seed(alphabet))
    targets[::7] = IGNORED
    return targets.to(device)


def results(function: Any, inputs: list[Tensor], targets: Tensor) -> list[Tensor]:
    """Return the loss and the gradients of hidden, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = function(leaves[0], leaves[1], targets, *leaves[2:])
    factors = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * factors).sum(), leaves)]


def check(inputs: list[Tensor], targets: Tensor) -> None:
    """Allow 16-bit inputs twice the error of stored logits, others 32 units in the last place of the largest."""
    ours, eager = (results(f, inputs, targets) for f in (bk.linear_cross_entropy, stored))
    truth = results(stored, [x.double() for x in inputs], targets)
    for a, p, e in zip(ours, eager, truth, strict=True):
        if inputs[0].dtype.itemsize == 2:
            assert_close(a, p, e)
        else:
            bound = 32 * torch.finfo(inputs[0].dtype).eps * max(1.0, float(e.abs().max()))
            torch.testing.assert_close(a.double(), e, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "alphabet"), [(70, 40, 260), (5, 33, 89), (600, 4, 3), (1, 1, 1)])
def test_losses_and_gradients(rows: int, width: int, alphabet: int, dtype: torch.dtype, device: str) -> None:
    """Rows with whole vectors and without, and a single logit."""
    check(head(rows, width, alphabet, dtype, device), targets_of(rows, alphabet, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "alphabet"), [(2100, 5), (1100, 4200)])
def test_more_rows_than_a_panel(rows: int, alphabet: int, dtype: torch.dtype, device: str) -> None:
    """A panel has at most 1024 rows on the CPU, and 8 MB of logits but at least 1024 rows on CUDA."""
    check(head(rows, 3, alphabet, dtype, device), targets_of(rows, alphabet, device))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_small_and_large_logits(scale: float, device: str) -> None:
    """Losses of a few thousand nats, and those of a target whose probability is almost 1."""
    inputs = head(90, 16, 260, torch.float32, device, scale)
    logits = F.linear(*(x.double() for x in inputs))
    check(inputs, logits.argmax(-1))
    check(inputs, logits.argmin(-1))


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 0), (2, 3, 4)])
def test_any_leading_shape(leading: tuple[int, ...], device: str) -> None:
    hidden, weight, bias = (torch.randn(*shape, device=device) for shape in ((*leading, 6), (5, 6), (5,)))
    targets = torch.randint(5, leading, device=device)
    ours = results(bk.linear_cross_entropy, [hidden, weight, bias], targets)
    assert ours[0].shape == leading
    flat = results(
        stored, [hidden.view(-1, 6) if hidden.numel() else hidden.new_empty(0, 6), weight, bias], targets.flatten()
    )
    for a, e in zip(ours, flat, strict=True):
        torch.testing.assert_close(a, e.view(a.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alphabet", [3, 260, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_nan_logits(dtype: torch.dtype, alphabet: int, device: str) -> None:
    """Losses and gradients are finite, infinite and NaN where those of stored logits are."""
    hidden, weight, _ = head(9, 2, alphabet, dtype, device)
    bad = hidden.clone()
    bad[4] = math.nan
    column = torch.arange(alphabet, device=device)
    masked = torch.where(column == 1, -math.inf, 0.0).to(dtype)
    for rows, bias in (
        (hidden, masked),
        (bad, masked),
        (hidden, torch.full_like(masked, -math.inf)),
        (hidden, torch.where(column == 1, math.inf, 0.0).to(dtype)),
        (hidden, torch.where(column == 2, math.nan, 0.0).to(dtype)),
    ):
        targets = torch.tensor([0, 1, 2, 1, 0, IGNORED, 1, 0, 2], device=device)
        ours, expected = (results(f, [rows, weight, bias], targets) for f in (bk.linear_cross_entropy, stored))
        expected[1][5] = 0  # stored logits that are NaN send NaN from ignored rows
        for a, e in zip(ours, expected, strict=True):
            loose = 32 * torch.finfo(dtype).eps
            torch.testing.assert_close(a, e.to(a.dtype), rtol=loose, atol=loose, equal_nan=True)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "ignore_index"),
    [(torch.int32, IGNORED), (torch.int32, 3), (torch.int64, 3), (torch.int64, 2**40), (torch.int64, -(2**63) + 1)],
)
def test_ignored_rows_are_zero_and_send_no_gradient(ids: torch.dtype, ignore_index: int, device: str) -> None:
    inputs = [x.requires_grad_() for x in head(40, 8, 11, torch.float32, device)]
    targets = (torch.arange(40, device=device) * 5 % 11).to(ids)
    targets[::3] = ignore_index
    loss = bk.linear_cross_entropy(inputs[0], inputs[1], targets, inputs[2], ignore_index=ignore_index)
    kept = targets != ignore_index
    assert_equal(loss[~kept], torch.zeros_like(loss[~kept]))
    # A NaN that comes from above does not pass an ignored row.
    upstream = torch.where(kept, 0.5, math.nan)
    grads = torch.autograd.grad(loss, inputs, upstream)
    assert_equal(grads[0][~kept], torch.zeros_like(grads[0][~kept]))
    truth = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(stored(truth[0][kept], truth[1], targets[kept], truth[2]).sum() / 2, truth)
    for a, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_all_rows_may_be_ignored(device: str) -> None:
    inputs = head(30, 8, 11, torch.float32, device)
    targets = torch.full((30,), IGNORED, device=device)
    for x in results(bk.linear_cross_entropy, inputs, targets):
        assert_equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_other_targets_give_nan_and_lead_nowhere(ids: torch.dtype, device: str) -> None:
    """The operators are called as on CUDA, where no value of a target is read on the host."""
    inputs = head(9, 8, 11, torch.float32, device)
    info = torch.iinfo(ids)
    targets = torch.tensor([11, -1, 3, info.max, info.min, IGNORED, 2**31 - 1, -(2**31), 10], dtype=ids, device=device)
    bad = torch.tensor([True, True, False, True, True, False, True, True, False], device=device)
    ops = torch.ops.blt_kernels
    loss, log_sum = ops.linear_cross_entropy_fwd(inputs[0], inputs[1], targets, inputs[2], IGNORED)
    assert_equal(loss.isnan(), bad)
    upstream = torch.ones_like(loss)
    grads = ops.linear_cross_entropy_bwd(upstream, inputs[0], inputs[1], targets, inputs[2], IGNORED, log_sum)
    assert_equal(grads[0].isnan().all(1), bad)
    good = torch.where(bad, IGNORED, targets.long())
    expected = results(bk.linear_cross_entropy, inputs, good)
    assert_equal(loss[~bad], expected[0][~bad])


X, W, TARGETS = torch.zeros(4, 5), torch.zeros(3, 5), torch.tensor([0, 1, 2, 0])
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("weight shape", lambda: bk.linear_cross_entropy(X, X[:, 1:], TARGETS), ValueError, r"weight.*\[4, 4\]"),
    ("weight dtype", lambda: bk.linear_cross_entropy(X, W.half(), TARGETS), TypeError, "weight.*float16"),
    ("targets shape", lambda: bk.linear_cross_entropy(X, W, TARGETS[:3]), ValueError, r"targets.*\[3\]"),
    ("targets dims", lambda: bk.linear_cross_entropy(X, W, TARGETS[None]), ValueError, r"targets.*\[1, 4\]"),
    ("targets dtype", lambda: bk.linear_cross_entropy(X, W, TARGETS.float()), TypeError, "targets.*float32"),
    ("targets device", lambda: bk.linear_cross_entropy(X, W, TARGETS.to("meta")), ValueError, "targets.*meta"),
    ("bias shape", lambda: bk.linear_cross_entropy(X, W, TARGETS, X[0]), ValueError, r"bias.*\[5\]"),
    ("large", lambda: bk.linear_cross_entropy(X, W, TARGETS + 1), ValueError, "targets: expected ids from 0 to 2.*3"),
    ("negative", lambda: bk.linear_cross_entropy(X, W, TARGETS - 1), ValueError, "ignore_index = -100, got -1"),
    (
        "not ignored",
        lambda: bk.linear_cross_entropy(X, W, TARGETS - 100, ignore_index=-1),
        ValueError,
        "ignore_index = -1, got -100",
    ),
    ("index", lambda: bk.linear_cross_entropy(X, W, TARGETS, ignore_index=2**63), ValueError, "ignore_index.*int64"),
    ("index type", lambda: bk.linear_cross_entropy(X, W, TARGETS, ignore_index=1.5), TypeError, "ignore_index.*1.5"),
    (
        "alphabet",
        lambda: bk.linear_cross_entropy(X[:, :1], X[:1, :1].expand(2**31, 1), TARGETS),
        ValueError,
        "weight: expected an alphabet of at most",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_targets_are_not_read_where_the_host_would_wait() -> None:
    hidden, weight = X.to("meta").requires_grad_(), W.to("meta")
    loss = bk.linear_cross_entropy(hidden, weight, TARGETS.to("meta"))
    loss.sum().backward()
    assert loss.shape == (4,)
    assert hidden.grad is not None


# --- flops ------------------------------------------------------------------------------------------------------------


def test_flops_are_counted() -> None:
    """Forward is one product, backward three: it computes the logits anew."""
    hidden, weight, bias = (x.requires_grad_() for x in head(6, 8, 11, torch.float32, "cpu"))
    targets = targets_of(6, 11, "cpu")
    for function in (
        lambda: bk.linear_cross_entropy(hidden, weight, targets, bias),
        lambda: bk.linear_entropy(hidden, weight, bias),
    ):
        with FlopCounterMode(display=False) as forward:
            out = function()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert [forward.get_total_flops(), backward.get_total_flops()] == [2 * 6 * 8 * 11, 6 * 6 * 8 * 11]


# --- memory, and the CUDA kernels on the emulator ---------------------------------------------------------------------


def test_logits_are_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on the CPU hold a panel of 1024 rows of logits, and gradients and values of rows."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("blt_kernels::linear_cross_entropy_fwd", "CPU"):
        pytest.skip("no compiled module")
    monkeypatch.syspath_prepend(str(bench.SOURCE))
    memory = importlib.import_module("memory")
    rows, width, alphabet = 4000, 4, 2100
    inputs, targets = head(rows, width, alphabet, torch.float32, "cpu"), targets_of(rows, alphabet, "cpu")
    panel, others = 1024 * alphabet, rows * (width + 8) + 3 * alphabet * (width + 1)
    held = memory.peak_extra_bytes(lambda: results(bk.linear_cross_entropy, inputs, targets))
    assert 4 * panel <= held <= 4 * (panel + others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(dtype: torch.dtype) -> None:
    """Bytes as in linear_cross_entropy.cuh, for rows that are padded to 16 bytes."""
    rows, row_bytes = 200, -(-260 * dtype.itemsize // 16) * 16
    inputs = [x.requires_grad_() for x in head(rows, 16, 260, dtype, "cpu")]
    targets = targets_of(rows, 260, "cpu")
    forward, backward = launches(lambda: bk.linear_cross_entropy(*inputs[:2], targets, inputs[2]).sum().backward())
    assert forward.read + forward.written <= 1.1 * rows * (row_bytes + 16)
    assert backward.read + backward.written <= 1.1 * rows * (2 * row_bytes + 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_in_any_order_of_threads(dtype: torch.dtype) -> None:
    inputs, targets = head(70, 8, 700, dtype, "cpu"), targets_of(70, 700, "cpu")
    with use("emulated"):
        expected = results(bk.linear_cross_entropy, inputs, targets)
        for name in ("BACKWARD", "RANDOM"):
            with order(name, seed=1):
                assert_equal(results(bk.linear_cross_entropy, inputs, targets), expected)
