"""patch_cross_attention on padded tensors of any strides: the same bits as on packed ones, and no copies on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_oracle import randn
from op_calls import bytes_without_copies, first_of_a_cache, heads_outside
from torch import Tensor

from blt_kernels import PatchLayout, patch_cross_attention

RAW = torch.ops.blt_kernels
K, ROWS, LENGTH, SLOTS = 2, 3, 9, 4
EVERY_PLACE = pytest.mark.parametrize("place", [heads_outside, first_of_a_cache])
BOTH = pytest.mark.parametrize("direction", ["encode", "decode"])
PATCH_IDS = torch.tensor([[0, 1, 1, 1, 3, 3, 3, 3, 3], [0, 2, 2, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2, 2, 3]])
DECODE_IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 3], [-1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 2, 3]])


def rows_of_documents(device: str = "cpu") -> PatchLayout:
    """Return a document a row, some of whose patches are empty."""
    return PatchLayout.from_ids(PATCH_IDS.to(device), DECODE_IDS.to(device), SLOTS)


def one_document(device: str = "cpu") -> PatchLayout:
    """Return one document over the rows, whose second and third patch are in two rows each."""
    ids = torch.tensor([0] * 7 + [4] * 9 + [8] * 11).view(1, -1).to(device)
    return PatchLayout.from_ids(ids, ids, ROWS * SLOTS)


def make(direction: str, dtype: torch.dtype, device: str = "cpu", heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    """Return contiguous q, k, v and a gradient, all padded."""
    lengths = (SLOTS * K, LENGTH) if direction == "encode" else (LENGTH, SLOTS * K)
    sizes = ((lengths[0], heads), (lengths[1], kv_heads), (lengths[1], kv_heads), (lengths[0], heads))
    return [randn(ROWS, n, h, 24, seed=i, dtype=dtype, device=device) for i, (n, h) in enumerate(sizes)]


def run(tensors: list[Tensor], layout: PatchLayout, direction: str, **options: Any) -> list[Tensor]:
    """Return the output and the gradients of q, k and v, as padded tensors."""
    *leaves, grad = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = patch_cross_attention(*leaves, layout, direction=direction, queries_per_patch=K, **options)
    results = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    return [x if x.dim() == 4 else x.unflatten(0, (ROWS, -1)) for x in results]


@BOTH
@EVERY_PLACE
@pytest.mark.parametrize("layout", [rows_of_documents, one_document])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_bits(
    direction: str,
    place: Callable[[Tensor], Tensor],
    layout: Callable[[str], PatchLayout],
    dtype: torch.dtype,
    device: str,
) -> None:
    """The bits are the same also where a patch crosses the end of a row, and where only one side is padded."""
    tensors, own = make(direction, dtype, device), layout(device)
    for window in (None, 3):
        expected = run([x.flatten(0, 1) for x in tensors], own, direction, window=window)
        q, k, v, grad = moved = [place(x) for x in tensors]
        flat = tensors[0].flatten(0, 1), tensors[1].flatten(0, 1)
        for given in (moved, [flat[0], k, v, grad.flatten(0, 1)], [q, flat[1], tensors[2].flatten(0, 1), grad]):
            for one, other in zip(run(given, own, direction, window=window), expected, strict=True):
                assert torch.equal(one, other)


@BOTH
def test_gradients_are_in_the_order_of_the_inputs(direction: str, device: str) -> None:
    for layout in (rows_of_documents(device), one_document(device)):
        out, *grads = run([heads_outside(x) for x in make(direction, torch.float32, device)], layout, direction)
        assert out.is_contiguous()
        assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)


@BOTH
@pytest.mark.parametrize("window", [None, 3])
def test_nothing_is_copied(direction: str, window: int | None) -> None:
    layout, (q, k, v, grad) = rows_of_documents(), [heads_outside(x) for x in make(direction, torch.float32)]
    encode = direction == "encode"
    offsets, ids = (layout.patch_offsets, layout.patch_ids) if encode else (layout.decode_offsets, layout.decode_ids)
    rest = (offsets, layout.cu_patches, ids, direction, K, window, None)
    out, lse = RAW.patch_cross_attention_fwd(q, k, v, *rest)
    packed = [x.flatten(0, 1) for x in (q, k, v, grad, out, lse)]
    assert bytes_without_copies(lambda: RAW.patch_cross_attention_fwd(q, k, v, *rest)) == bytes_without_copies(
        lambda: RAW.patch_cross_attention_fwd(*packed[:3], *rest)
    )
    assert bytes_without_copies(lambda: RAW.patch_cross_attention_bwd(grad, q, k, v, out, lse, *rest)) == (
        bytes_without_copies(lambda: RAW.patch_cross_attention_bwd(packed[3], *packed[:3], *packed[4:], *rest))
    )


@BOTH
@EVERY_PLACE
def test_opcheck_and_derivatives(direction: str, place: Callable[[Tensor], Tensor]) -> None:
    layout = rows_of_documents()
    q, k, v, _ = (place(x).requires_grad_() for x in make(direction, torch.float64))
    encode = direction == "encode"
    offsets, ids = (layout.patch_offsets, layout.patch_ids) if encode else (layout.decode_offsets, layout.decode_ids)
    torch.library.opcheck(
        RAW.patch_cross_attention_fwd, (q, k, v, offsets, layout.cu_patches, ids, direction, K, 2, None)
    )

    def attend(*tensors: Tensor) -> Tensor:
        return patch_cross_attention(*tensors, layout, direction=direction, queries_per_patch=K, window=2)

    assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)
