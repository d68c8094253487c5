"""patch_unpool: hand-worked ids of both kinds, edges, the segment sum of its gradient, and every argument error."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from backends import launches, traffic
from hypothesis import given
from hypothesis import strategies as st

from blt_kernels import PatchLayout, patch_unpool
from blt_kernels.reference.patch_unpool import patch_unpool_reference
from blt_kernels.testing import assert_close, ragged_layout

NAN = float("nan")
# A document has patches of these lengths. Parts of levels 1 and 2 are 64 bytes and 64 parts.
LONG = [(1, 62, 65, 128, 200, 70), (3, 5000, 130), (20000,), (64, 64 * 260, 64)]


def worked_layout(last_boundary: bool, device: str = "cpu") -> PatchLayout:
    """Return documents of 5, 0, 2 and 1 bytes and one byte beyond them; patches 0 | 1 2 | 3 4, then 5 6, then 7.

    `last_boundary`: the byte after the first document would start a patch.
    """
    boundaries = torch.tensor([True, False, True, False, last_boundary, False, False, False, True], device=device)
    cu_seqlens = torch.tensor([0, 5, 5, 7, 8], dtype=torch.int32, device=device)
    return PatchLayout.from_cuts(boundaries, cu_seqlens, 6)


@pytest.mark.parametrize("last_boundary", [False, True])
def test_hand_worked(last_boundary: bool, device: str) -> None:
    y = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [NAN]], dtype=torch.float64, device=device)
    layout = worked_layout(last_boundary, device)
    # Byte i of a document may read the last patch that ends at i or before; what has none reads zeros.
    expected = {"patch": [1, 2, 2, 3, 3, 4, 4, 5, 0], "decode": [1, 1, 2, 2, 3 if last_boundary else 2, 0, 0, 0, 0]}
    readers = {"patch": [1, 2, 2, 2, 1, 0], "decode": [2, 2, 1, 0, 0, 0] if last_boundary else [2, 3, 0, 0, 0, 0]}
    for ids, values in expected.items():
        leaf = y.clone().requires_grad_()
        out = patch_unpool(leaf, layout, ids)
        assert out.flatten().tolist() == values, ids
        grad_out = torch.ones_like(out)
        if ids == "patch":
            grad_out[8] = NAN  # no gradient is sent from beyond the last document
        out.backward(grad_out)
        assert leaf.grad.flatten().tolist() == readers[ids], ids
    assert torch.equal(patch_unpool(y, layout), patch_unpool(y, layout, "patch"))


def test_gradient_is_the_sum_over_readers(device: str) -> None:
    layout = worked_layout(True, device)
    grad_out = 2.0 ** torch.arange(9, dtype=torch.float64, device=device)[:, None]
    expected = {"patch": [1, 2 + 4, 8 + 16, 32 + 64, 128, 0], "decode": [1 + 2, 4 + 8, 16, 0, 0, 0]}
    for ids, values in expected.items():
        y = torch.zeros(6, 1, dtype=torch.float64, device=device, requires_grad=True)
        patch_unpool(y, layout, ids).backward(grad_out)
        assert y.grad.flatten().tolist() == values, ids


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 3])
@pytest.mark.parametrize("ids", ["patch", "decode"])
def test_short_documents(num_bytes: int, ids: str, device: str) -> None:
    boundaries = torch.ones(num_bytes, dtype=torch.bool, device=device)
    for room in (1, num_bytes + 1):
        layout = PatchLayout.from_cuts(boundaries, torch.tensor([0, num_bytes], dtype=torch.int32, device=device), room)
        y = torch.arange(1.0, room + 1, device=device)[:, None].requires_grad_()
        out = patch_unpool(y, layout, ids)
        if room > num_bytes:  # every byte is a complete patch
            assert out.flatten().tolist() == list(range(1, num_bytes + 1))
        else:  # there is one patch, which is complete only if nothing overflowed
            read = ids == "patch" or num_bytes == 1
            assert out.flatten().tolist() == [1.0 if read else 0.0] * num_bytes
        out.sum().backward()
        assert y.grad.sum() == out.count_nonzero()


@given(st.integers(0, 120), st.integers(0, 1000), st.sampled_from(["patch", "decode"]), st.booleans())
def test_any_layout_against_one_byte_at_a_time(
    device: str, num_bytes: int, seed: int, ids: str, overflow: bool
) -> None:
    layout = ragged_layout(num_bytes, seed, max_patches=8 + num_bytes // 20 if overflow else None, device=device)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(layout.capacity, 3, dtype=torch.float64, generator=generator).to(device).requires_grad_()
    chosen = (layout.patch_ids if ids == "patch" else layout.decode_ids).tolist()
    out = patch_unpool(y, layout, ids)
    grad = torch.randn(num_bytes, 3, dtype=torch.float64, generator=generator).to(device)
    (grad_y,) = torch.autograd.grad(out, y, grad)
    expected = torch.zeros_like(y)
    for i, p in enumerate(chosen):
        assert torch.equal(out[i], y[p] if p >= 0 else torch.zeros_like(y[0]))
        if p >= 0:
            expected[p] += grad[i]
    torch.testing.assert_close(grad_y, expected, rtol=1e-12, atol=1e-12)
    offsets = (layout.patch_offsets if ids == "patch" else layout.decode_offsets).tolist()
    for p, (begin, end) in enumerate(pairwise(offsets)):  # the kernels rely on this
        readers = chosen[begin:end].count(p)
        assert chosen.count(p) == readers
        assert chosen[begin:end] == [p] * readers + [-1] * (end - begin - readers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradient_accumulates_in_fp32(dtype: torch.dtype, device: str) -> None:
    layout = PatchLayout.from_lengths(torch.tensor([[4096]], device=device)).compact()
    y = torch.zeros(1, 1, dtype=dtype, device=device, requires_grad=True)
    for function in (patch_unpool, patch_unpool_reference):
        (grad,) = torch.autograd.grad(function(y, layout).sum(), y)
        assert grad.item() == 4096  # in bf16, 256 + 1 is 256


@pytest.mark.parametrize("ids", ["patch", "decode"])
def test_backward_against_autograd_of_the_reference(ids: str, device: str) -> None:
    layout = ragged_layout(80, 3, device=device)
    y = torch.randn(80, 4, dtype=torch.float64, device=device, requires_grad=True)
    out, reference = patch_unpool(y, layout, ids), patch_unpool_reference(y, layout, ids)
    assert torch.equal(out, reference)
    grad = torch.randn_like(out)
    ours, theirs = torch.autograd.grad(out, y, grad), torch.autograd.grad(reference, y, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda y: patch_unpool(y, layout, ids), y, fast_mode=True)


@pytest.mark.parametrize("ids", ["patch", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(ids: str, dtype: torch.dtype) -> None:
    """The CUDA kernels read and write every row about once, forward and backward."""
    layout = ragged_layout(700).compact()
    y = torch.randn(layout.capacity, 512).to(dtype).requires_grad_()
    grad = torch.randn(700, 512).to(dtype)
    forward = traffic(lambda: patch_unpool(y.detach(), layout, ids))
    minimum = y.element_size() * (y.numel() + grad.numel()) + 4 * 700
    assert forward <= 1.1 * minimum
    both = traffic(lambda: torch.autograd.grad(patch_unpool(y, layout, ids), y, grad))
    assert both - forward <= 1.1 * (minimum + 8 * layout.capacity)


def long_layout(lengths: tuple[int, ...], device: str = "cpu") -> PatchLayout:
    """Return a document of patches of `lengths`, and one of two patches, whose first byte reads nothing decoding."""
    second = (3, lengths[-1] - 3)
    width = max(len(lengths), 2)
    rows = [[*row, *[0] * (width - len(row))] for row in (lengths, second)]
    return PatchLayout.from_lengths(torch.tensor(rows)).to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", ["patch", "decode"])
@pytest.mark.parametrize("lengths", LONG)
def test_gradients_of_long_patches(
    lengths: tuple[int, ...], ids: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Segments with parts of one level and of two, whose first and last rows are in no part or just in one."""
    layout = long_layout(lengths, device)
    width = 8 if backend == "emulated" else 72
    y = torch.zeros(layout.capacity, width, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(layout.num_bytes, width, device=device).to(dtype)
    wide = y.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad(patch_unpool(y, layout, ids), y, grad)
    (eager,) = torch.autograd.grad(patch_unpool_reference(y, layout, ids), y, grad)
    (truth,) = torch.autograd.grad(patch_unpool_reference(wide, layout, ids), wide, grad.double())
    assert_close(ours, eager, truth, name="gradient")


@pytest.mark.parametrize("ids", ["patch", "decode"])
def test_threads_share_a_long_patch_without_a_trace(ids: str) -> None:
    layout = long_layout((1, 700, 9000, 5))
    y = torch.zeros(layout.capacity, 33, requires_grad=True)
    grad = torch.randn(layout.num_bytes, 33)
    out, grads = patch_unpool(y, layout, ids), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grads += torch.autograd.grad(out, y, grad, retain_graph=True)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_no_thread_walks_a_long_patch_alone() -> None:
    """One patch of 64k bytes: 126 rows, and 126 parts of level 1 and 16 of level 2 in two accesses each."""
    layout = PatchLayout.from_lengths(torch.tensor([[1, 65536 + 126]])).compact()
    y = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.ones(layout.num_bytes, 8, dtype=torch.bfloat16)
    done = launches(lambda: torch.autograd.grad(patch_unpool(y, layout), y, grad))
    backward = [launch.longest for launch in done if "unpool_fwd" not in launch.kernel]
    assert len(backward) == 3
    assert max(backward) <= 126 + 2 * (126 + 16) + 8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": None}, TypeError, "y: expected a tensor, got NoneType"),
        ({"y": torch.zeros(20, 3, dtype=torch.int32)}, TypeError, "y: expected dtype in float32.*got torch.int32"),
        ({"y": torch.zeros(2, 10, 3)}, ValueError, r"y: expected 2 dimensions, got shape \[2, 10, 3\]"),
        ({"y": torch.zeros(19, 3)}, ValueError, r"y: expected the capacity of layout, 20 patches, got shape \[19, 3\]"),
        ({"y": torch.zeros(20, 3, device="meta")}, ValueError, "layout: expected device meta of y, got cpu"),
        ({"layout": "x"}, TypeError, "layout: expected a PatchLayout, got str"),
        ({"ids": "byte"}, ValueError, "ids: expected one of 'patch', 'decode', got 'byte'"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"y": torch.zeros(20, 3), "layout": ragged_layout(20), "ids": "patch"}
    with pytest.raises(error, match=message):
        patch_unpool(**{**arguments, **change})
