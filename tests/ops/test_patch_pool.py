"""patch_pool: hand-worked patches, ties, NaN, edges, agreement with what BLT runs, and every argument error."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from backends import launches, traffic, use
from hypothesis import given
from hypothesis import strategies as st
from inputs import random_normal

from blt_kernels import PatchLayout, _extension, patch_pool
from blt_kernels.reference.patch_pool import REDUCTIONS as ALL
from blt_kernels.reference.patch_pool import patch_pool_reference
from blt_kernels.testing import assert_close, ragged_layout

NAN, INF = float("nan"), float("inf")


def longer(layout: PatchLayout, more: int) -> PatchLayout:
    """Return `layout` with bytes beyond its last document."""
    beyond = layout.patch_ids.new_full((more,), -1)
    ids = {name: torch.cat((getattr(layout, name), beyond)) for name in ("patch_ids", "decode_ids")}
    return dataclasses.replace(layout, **ids)


def worked_layout(device: str = "cpu") -> PatchLayout:
    """Return patches 0 | 1 2 3 | 4 of documents of 4, 0 and 1 bytes, room for two more, and 2 bytes beyond them."""
    boundaries = torch.tensor([True, False, False, False, False, False, False], device=device)
    return PatchLayout.from_cuts(boundaries, torch.tensor([0, 4, 4, 5], dtype=torch.int32, device=device), 5)


def oracle(x: torch.Tensor, layout: PatchLayout, reduce: str) -> torch.Tensor:
    """Reduce one patch at a time."""
    functions = {
        "max": lambda rows: rows.amax(0),
        "min": lambda rows: rows.amin(0),
        "mean": lambda rows: rows.mean(0),
        "sum": lambda rows: rows.sum(0),
        "first": lambda rows: rows[0],
        "last": lambda rows: rows[-1],
    }
    out = x.new_zeros(layout.capacity, x.shape[1])
    for patch, (start, end) in enumerate(pairwise(layout.patch_offsets.tolist())):
        if start < end:
            out[patch] = functions[reduce](x[start:end])
    return out


def test_hand_worked(device: str) -> None:
    x = torch.tensor([[5.0], [-3.0], [7.0], [2.0], [-1.0], [NAN], [INF]], device=device)
    expected = {
        "max": [5, 7, -1, 0, 0],
        "min": [5, -3, -1, 0, 0],
        "mean": [5, 2, -1, 0, 0],
        "sum": [5, 6, -1, 0, 0],
        "first": [5, -3, -1, 0, 0],
        "last": [5, 2, -1, 0, 0],
    }
    layout = worked_layout(device)
    for reduce, values in expected.items():
        assert patch_pool(x, layout, reduce).flatten().tolist() == values, reduce
    assert torch.equal(patch_pool(x, layout), patch_pool(x, layout, "max"))
    assert torch.equal(patch_pool(x, layout, ("max",)), patch_pool(x, layout, "max"))


def test_gradients_by_hand(device: str) -> None:
    values = [5.0, -3.0, 7.0, 2.0, -1.0, NAN, INF]
    expected = {
        "max": [1, 0, 10, 0, 100, 0, 0],
        "min": [1, 10, 0, 0, 100, 0, 0],
        "mean": [1, 10 / 3, 10 / 3, 10 / 3, 100, 0, 0],
        "sum": [1, 10, 10, 10, 100, 0, 0],
        "first": [1, 10, 0, 0, 100, 0, 0],
        "last": [1, 0, 0, 10, 100, 0, 0],
    }
    grad_out = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [NAN]], dtype=torch.float64, device=device)
    for reduce, grads in expected.items():
        x = torch.tensor(values, dtype=torch.float64, device=device)[:, None].requires_grad_()
        patch_pool(x, worked_layout(device), reduce).backward(grad_out)
        assert x.grad.flatten().tolist() == grads, reduce


def test_several_reductions_come_in_the_given_order(device: str) -> None:
    layout = ragged_layout(50, device=device)
    x = torch.randn(50, 3, device=device)
    for names in (ALL, ["mean", "min", "max"], ("last", "last")):
        expected = torch.cat([patch_pool(x, layout, name) for name in names], -1)
        assert torch.equal(patch_pool(x, layout, names), expected)


@pytest.mark.parametrize("value", [0.0, 2.0, -INF])
def test_ties_share_the_gradient(value: float, device: str) -> None:
    """Ties at 0 do too, where scatter_reduce counts the zero that its output starts from."""
    layout = worked_layout(device)
    for reduce, sign in (("max", 1), ("min", -1)):
        column = sign * torch.tensor([9.0, value, value, -INF, value, 0, 0], device=device)
        x = column[:, None].to(torch.bfloat16).requires_grad_()
        out = patch_pool(x, layout, reduce)
        assert out.flatten().tolist() == [sign * 9, sign * value, sign * value, 0, 0]
        out[:3].sum().backward()
        share = 1 / 3 if value == -INF else 0.5
        third = share if value == -INF else 0
        torch.testing.assert_close(
            x.grad.flatten().double().cpu(),
            torch.tensor([1, share, share, third, 1, 0, 0]).double(),
            rtol=2**-8,
            atol=0,
        )


@pytest.mark.parametrize("width", [2, 150])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("byte", [1, 2, 3])
def test_nan_stays_in_its_patch_and_column(byte: int, dtype: torch.dtype, width: int, device: str) -> None:
    x = torch.arange(7.0 * width, device=device).view(7, width).to(dtype)
    column = width // 2
    x[byte, column] = NAN
    for reduce in ("max", "min", "mean", "sum"):
        leaf = x.clone().requires_grad_()
        out = patch_pool(leaf, worked_layout(device), reduce)
        assert out.isnan().nonzero().tolist() == [[1, column]]
        out.sum().backward()
        hit = [[1, column], [2, column], [3, column]] if reduce in ("max", "min") else []
        assert leaf.grad.isnan().nonzero().tolist() == hit


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 3])
def test_short_documents(num_bytes: int, device: str) -> None:
    x = torch.randn(num_bytes, 2, dtype=torch.float64, device=device, requires_grad=True)
    for room in (1, num_bytes + 1):
        boundaries = torch.ones(num_bytes, dtype=torch.bool, device=device)
        layout = PatchLayout.from_cuts(boundaries, torch.tensor([0, num_bytes], dtype=torch.int32, device=device), room)
        out = patch_pool(x, layout, ALL)
        expected = torch.cat([oracle(x, layout, name) for name in ALL], -1)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.shape == x.shape
        assert grad.isfinite().all()


def test_no_documents_at_all(device: str) -> None:
    layout = PatchLayout.from_cuts(
        torch.ones(3, dtype=torch.bool, device=device), torch.zeros(1, dtype=torch.int32, device=device), 2
    )
    x = torch.full((3, 4), NAN, device=device, requires_grad=True)
    out = patch_pool(x, layout, ALL)
    assert torch.equal(out, torch.zeros(2, 4 * len(ALL), device=device))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@given(st.integers(0, 120), st.integers(0, 1000), st.sampled_from(ALL), st.booleans())
def test_any_layout_against_one_patch_at_a_time(
    device: str, num_bytes: int, seed: int, reduce: str, overflow: bool
) -> None:
    layout = ragged_layout(num_bytes, seed, max_patches=8 + num_bytes // 20 if overflow else None, device=device)
    x = torch.randn(num_bytes, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)
    torch.testing.assert_close(patch_pool(x, layout, reduce), oracle(x, layout, reduce), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduce", ["amax", "amin", "mean"])
def test_agrees_with_padded_scatter_reduce(reduce: str, device: str) -> None:
    """facebookresearch/blt and transformers run this, forward and backward."""
    rows, length, width = 3, 40, 5
    lengths = torch.tensor([[1, 9, 30, 0], [1, 1, 1, 37], [1, 39, 0, 0]], device=device)
    layout = PatchLayout.from_lengths(lengths, seq_len=length)
    x = torch.randn(rows, length, width, dtype=torch.float64, device=device, requires_grad=True)
    ids = (torch.arange(length, device=device) >= lengths.cumsum(1)[..., None]).sum(1)
    index = ids[..., None].expand_as(x)
    padded = torch.zeros(rows, 4, width, dtype=torch.float64, device=device)
    padded = padded.scatter_reduce(1, index, x, reduce, include_self=False)
    ours = patch_pool(x, layout, reduce.removeprefix("a"))
    expected = padded[lengths > 0]
    torch.testing.assert_close(ours[: expected.shape[0]], expected, rtol=1e-12, atol=0)
    assert not ours[expected.shape[0] :].any()
    grad = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(torch.autograd.grad(ours[: grad.shape[0]], x, grad), theirs, rtol=1e-12, atol=0)


def test_padded_is_packed(device: str) -> None:
    layout = PatchLayout.from_lengths(torch.tensor([[1, 4], [2, 3]], device=device))
    x = torch.randn(2, 5, 3, device=device)
    assert torch.equal(patch_pool(x, layout, ALL), patch_pool(x.flatten(0, 1), layout, ALL))
    assert torch.equal(patch_pool_reference(x, layout, ALL), patch_pool_reference(x.flatten(0, 1), layout, ALL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_fp32(dtype: torch.dtype, device: str) -> None:
    layout = PatchLayout.from_lengths(torch.tensor([[4096]], device=device))
    x = torch.ones(4096, 1, dtype=dtype, device=device)  # in bf16, 256 + 1 is 256
    assert patch_pool(x, layout, ("sum", "mean")).tolist() == [[4096, 1]] + [[0, 0]] * (layout.capacity - 1)


@pytest.mark.parametrize("reduce", [*ALL, ALL])
def test_backward_against_autograd_of_the_reference(reduce: str | tuple[str, ...], device: str) -> None:
    layout = ragged_layout(80, 3, device=device)
    x = torch.randn(80, 4, dtype=torch.float64, device=device, requires_grad=True)
    out, reference = patch_pool(x, layout, reduce), patch_pool_reference(x, layout, reduce)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
    ours, theirs = torch.autograd.grad(out, x, grad), torch.autograd.grad(reference, x, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: patch_pool(x, layout, reduce), x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_fp64(dtype: torch.dtype, device: str) -> None:
    layout = ragged_layout(500, 4, device=device)
    x = torch.randn(500, 16, device=device).to(dtype)
    for reduce in ALL:
        eager, truth = patch_pool_reference(x, layout, reduce), patch_pool_reference(x.double(), layout, reduce)
        assert_close(patch_pool(x, layout, reduce), eager, truth, name=reduce)


@pytest.mark.parametrize(("num_bytes", "width"), [(5000, 3), (4000, 33), (40, 2100)])
def test_long_patches_and_wide_rows(num_bytes: int, width: int, device: str) -> None:
    layout = PatchLayout.from_lengths(torch.tensor([[1, num_bytes - 20, 19]], device=device)).compact()
    x = (torch.randn(num_bytes, width, device=device) * 8).round().requires_grad_()  # sums are exact, ties are many
    out, expected = patch_pool(x, layout, ALL), patch_pool_reference(x, layout, ALL)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)  # a mean is rounded
    grad = torch.ones_like(out)
    theirs = torch.autograd.grad(patch_pool_reference(x.double(), layout, ALL), x, grad.double())
    torch.testing.assert_close(torch.autograd.grad(out, x, grad), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduce", ["max", "mean", ("min", "first"), ALL])
@pytest.mark.parametrize("lengths", [(1, 62, 65, 128, 200, 70), (3, 5000, 130), (64, 64 * 260, 64), (20000,)])
def test_parts_of_long_patches(
    lengths: tuple[int, ...], reduce: str | tuple[str, ...], dtype: torch.dtype, backend: str, device: str
) -> None:
    """Parts of one level and of two; rows before and behind them or none; ties in several parts; bytes beyond."""
    layout = longer(PatchLayout.from_lengths(torch.tensor([lengths])).to(device), 70)
    width = 8 if backend == "emulated" else 72
    x = (random_normal(layout.num_bytes, width, dtype=torch.float32, seed=1).to(device) * 2).round().to(dtype) / 2
    x[::500] = x[::500].abs() + 9  # these are maxima, 500 bytes apart
    x.requires_grad_()
    truth = x.detach().double().requires_grad_()
    out, expected = patch_pool(x, layout, reduce), patch_pool_reference(truth, layout, reduce)
    eager = patch_pool_reference(x.detach(), layout, reduce)
    assert_close(out.detach(), eager, expected.detach(), name="out")
    grad = random_normal(*out.shape, dtype=torch.float32, seed=2).to(device, dtype)
    leaf = x.detach().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(patch_pool_reference(leaf, layout, reduce), leaf, grad)
    (exact,) = torch.autograd.grad(expected, truth, grad.double())
    (ours,) = torch.autograd.grad(out, x, grad)
    assert_close(ours, theirs, exact, name="gradient")
    assert not ours[-70:].any()


def test_threads_share_a_long_patch_without_a_trace() -> None:
    layout = PatchLayout.from_lengths(torch.tensor([[1, 700, 9000, 5, 1024]])).compact()
    x = (torch.randn(layout.num_bytes, 33) * 4).round().requires_grad_()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = patch_pool(x / 3, layout, ALL)
        results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("byte", [0, 3, 100, 8191, 16383])
def test_nan_in_a_long_patch(byte: int, reduce: str, device: str) -> None:
    layout = PatchLayout.from_lengths(torch.tensor([[3, 16000, 381]])).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(layout.num_bytes, 8, dtype=dtype, device=device)
        x[byte, 5] = NAN
        x.requires_grad_()
        out = patch_pool(x, layout, reduce)
        patch = layout.patch_ids[byte].item()
        assert out.isnan().nonzero().tolist() == [[patch, 5]]
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        expected = torch.zeros_like(grad)
        expected[:, 5] = (layout.patch_ids == patch).where(layout.patch_ids == patch, 0)
        assert torch.equal(grad.isnan(), expected.bool())


@pytest.mark.parametrize(
    ("reduce", "dtype", "forward", "backward"),
    [
        ("max", torch.bfloat16, 126 + 126 + 16, 190 * 2 + 2 * (126 + 16)),
        ("min", torch.float32, 126 + 126 + 16, 190 * 2 + 126 + 16),
        ("mean", torch.bfloat16, 126 + 2 * (126 + 16), 190),
        (("max", "mean"), torch.bfloat16, 126 + 3 * (126 + 16), 190 * 2 + 2 * (126 + 16)),
    ],
)
def test_no_thread_walks_a_long_patch_alone(
    reduce: str | tuple[str, ...], dtype: torch.dtype, forward: int, backward: int
) -> None:
    """One patch of 64k bytes: 126 rows before and behind its parts, 126 parts of level 1 and 16 of level 2.

    Backward, 190 rows of a part, read and written, and the ties of all parts. Sums of bf16 take two accesses a part.
    """
    layout = PatchLayout.from_lengths(torch.tensor([[1, 65536 + 126]])).compact()
    x = torch.randn(layout.num_bytes, 8).to(dtype).requires_grad_()
    done = launches(lambda: patch_pool(x, layout, reduce).backward(torch.ones(2, 8 * len(_names(reduce)), dtype=dtype)))
    longest = {name: max(x.longest for x in done if name in x.kernel) for name in ("fwd", "bwd", "segment_parts")}
    assert longest["fwd"] <= forward + 8
    assert longest["bwd"] <= backward + 16
    assert longest["segment_parts"] <= 64 * 3 + 8
    assert max((x.longest for x in done if "ties" in x.kernel), default=0) <= 190 + 8


@pytest.mark.parametrize(("reduce", "kept"), [("mean", 0), (("sum", "first"), 0), ("max", 2), (("mean", "min"), 2)])
def test_keeps_activations_only_for_ties(reduce: str | tuple[str, ...], kept: int, device: str) -> None:
    saved = []
    x = torch.randn(30, 4, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        patch_pool(x, ragged_layout(30, device=device), reduce)
    assert sum(t.is_floating_point() for t in saved) == kept


@pytest.mark.parametrize(("reduce", "reads_x"), [("max", 1), ("mean", 0), (ALL, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(reduce: str | tuple[str, ...], reads_x: int, dtype: torch.dtype) -> None:
    """The CUDA kernels read x and write out once; backward reads grad_out, and x and out for extremes, once too."""
    layout = ragged_layout(700).compact()
    x = torch.randn(700, 512).to(dtype).requires_grad_()
    out = patch_pool(x, layout, reduce)
    grad = torch.randn_like(out)
    size = x.element_size()
    index = 8 * layout.capacity
    assert traffic(lambda: patch_pool(x.detach(), layout, reduce)) <= 1.1 * (size * (x.numel() + out.numel()) + index)
    backward = traffic(lambda: torch.autograd.grad(patch_pool(x, layout, reduce), x, grad))
    forward = traffic(lambda: patch_pool(x.detach(), layout, reduce))
    minimum = size * (x.numel() * (1 + reads_x) + out.numel()) + index
    if reads_x:
        minimum += size * layout.capacity * 512 * sum(name in ("max", "min") for name in _names(reduce))
    assert backward - forward <= 1.1 * minimum


def _names(reduce: str | tuple[str, ...]) -> tuple[str, ...]:
    return (reduce,) if isinstance(reduce, str) else reduce


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(20, 3, dtype=torch.int64)}, TypeError, "x: expected dtype in float32.*got torch.int64"),
        ({"x": torch.zeros(20)}, ValueError, r"x: expected 2 or 3 dimensions, got shape \[20\]"),
        ({"x": torch.zeros(19, 3)}, ValueError, r"x: expected the 20 bytes of layout, got shape \[19, 3\]"),
        ({"x": torch.zeros(3, 7, 3)}, ValueError, r"x: expected the 20 bytes of layout, got shape \[3, 7, 3\]"),
        ({"x": torch.zeros(20, 3, device="meta")}, ValueError, "layout: expected device meta of x, got cpu"),
        ({"layout": None}, TypeError, "layout: expected a PatchLayout, got NoneType"),
        ({"reduce": "amax"}, ValueError, "reduce: expected one of 'max', 'min', .*got 'amax'"),
        ({"reduce": ("max", "median")}, ValueError, "reduce: expected one of .*got 'median'"),
        ({"reduce": ()}, TypeError, r"reduce: expected a string or a sequence of at least one, got \(\)"),
        ({"reduce": 1}, TypeError, "reduce: expected a string or a sequence of at least one, got 1"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(20, 3), "layout": ragged_layout(20), "reduce": "max"}
    with pytest.raises(error, match=message):
        patch_pool(**{**arguments, **change})


def test_second_derivative_of_many_ties_in_fp16(device: str) -> None:
    """Cotangents that add up to more than fp16 holds, shared by 1000 ties; NaN in a patch with a NaN."""
    layout = PatchLayout.from_lengths(torch.tensor([[1000, 2]])).to(device)
    x = torch.zeros(1002, 1, dtype=torch.half, device=device)
    x[1001] = torch.nan
    x.requires_grad_()
    out = patch_pool(x, layout)
    grad_out = torch.ones_like(out, requires_grad=True)
    (grad_x,) = torch.autograd.grad(out, x, grad_out, create_graph=True)
    (second,) = torch.autograd.grad(grad_x, grad_out, torch.full_like(grad_x, 100.0))
    assert second[0].item() == 100
    assert second[1].isnan()


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
def test_the_kernels_have_the_reductions_of_the_package(backend: str) -> None:
    """The table in csrc/common/args/patch_pool.h lists the same names in the same order."""
    if _extension.load_cpu().isa is None:
        pytest.skip("no compiled module")
    offsets, ids = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    names = ", ".join(ALL)
    with use(backend), pytest.raises(RuntimeError, match=f"reduce: expected one of {names}, got median"):
        torch.ops.blt_kernels.patch_pool_fwd(torch.ones(1, 1), offsets, ids, ["median"])
