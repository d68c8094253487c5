"""Test an op of your own with `blt_kernels.testing`.

Run it by ``pytest examples/test_patch_softmax.py``. The op is a softmax of scores over
the bytes of each patch, composed of two ops of the package.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import (
    assert_close,
    document_lengths,
    offsets_of,
    poisoned_empty,
    ragged_layout,
)


# %% The op. Subtracting the maximum of a patch keeps the exponentials from
# overflowing. bf16 is computed in fp32: without that, the test of accuracy below
# fails.
def patch_softmax(scores: Tensor, layout: bk.PatchLayout) -> Tensor:
    """Return ``exp(s_t) / (sum of exp(s_u) over the patch of byte t)``, ``[T, H]``."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    maximum = bk.patch_pool(wide.detach(), layout, "max")
    weights = (wide - bk.patch_unpool(maximum, layout, ids="patch")).exp()
    total = bk.patch_pool(weights, layout, "sum")
    return (weights / bk.patch_unpool(total, layout, ids="patch")).to(scores.dtype)


# %% The reference: a loop over patches in plain PyTorch, for any dtype. It is what
# the op means.
def patch_softmax_reference(scores: Tensor, layout: bk.PatchLayout) -> Tensor:
    """Return the same, patch by patch."""
    offsets = layout.patch_offsets.tolist()
    return torch.cat([scores[a:b].softmax(0) for a, b in pairwise(offsets)])


# %% Patches of 500 bytes in several documents, some of them empty, and scores that
# would overflow without the shift.
LAYOUT = ragged_layout(500, seed=1)
SCORES = 100 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))


# %% No tolerance is chosen: errors against fp64 may be twice those of plain PyTorch
# in the same dtype.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_accurate_as_plain_pytorch(dtype: torch.dtype) -> None:
    """Values and gradients. Memory that nobody writes holds NaN."""
    scores, results = SCORES.to(dtype), []
    grad_out = torch.linspace(-1, 1, scores.numel()).to(dtype).view_as(scores)
    cases = (
        (patch_softmax, scores),
        (patch_softmax_reference, scores),
        (patch_softmax_reference, scores.double()),
    )
    with poisoned_empty():
        for function, inputs in cases:
            leaf = inputs.detach().clone().requires_grad_()
            out = function(leaf, LAYOUT)
            out.backward(grad_out.to(out.dtype))
            results.append((out, leaf.grad))
    for name, *values in zip(("output", "gradient"), *results, strict=True):
        assert_close(*values, name=name)


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Fp64, by torch's own check."""
    small = ragged_layout(12, seed=2)
    scores = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: patch_softmax(x, small), scores)


# %% Properties say more than examples.
def test_weights_of_a_patch_add_up_to_one() -> None:
    """For every patch that has a byte."""
    sums = bk.patch_pool(patch_softmax(SCORES.double(), LAYOUT), LAYOUT, "sum")
    filled = LAYOUT.patch_lengths > 0
    torch.testing.assert_close(sums[filled], torch.ones_like(sums[filled]))
    assert not sums[~filled].any()


def test_documents_do_not_mix() -> None:
    """Each document by itself has the weights that it has among others."""
    lengths = document_lengths(300, seed=3)
    ids = torch.randint(4, 260, (300,), generator=torch.Generator().manual_seed(1))
    scores = torch.randn(300, 2, generator=torch.Generator().manual_seed(2))
    whole = patch_softmax(scores, bk.space_patch(ids, offsets_of(lengths)))
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        layout = bk.space_patch(ids[part], offsets_of([length]))
        assert torch.equal(whole[part], patch_softmax(scores[part], layout))
        begin += length


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
