"""The parts of layers that have derivatives of their own: against torch's, in fp64 and as training runs them."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blt_kernels.nn import FeedForward, RMSNorm, TransformerConfig, load_ops
from blt_kernels.nn.functional import RMSNormFunction, SwiGLUFunction
from blt_kernels.testing import assert_close

EPS = 1e-5
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...]]] = {
    "rms_norm": (lambda x, w: RMSNormFunction.apply(x, w, EPS), lambda x, w: F.rms_norm(x, (24,), w, EPS), (24,)),
    "swiglu": (SwiGLUFunction.apply, lambda gate, up: F.silu(gate) * up, (5, 24)),
}


def inputs(case: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 24), CASES[case][2])
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("case", CASES)
def test_derivatives(case: str) -> None:
    ours, _, _ = CASES[case]
    x, y = inputs(case, torch.float64)
    assert torch.autograd.gradcheck(ours, (x, y))
    with torch.no_grad():
        x[0] = 0
    assert torch.autograd.gradcheck(ours, (x, y))
    wide = x.detach().repeat(3, 1, 1).requires_grad_()  # it takes any number of dimensions
    assert torch.autograd.gradcheck(ours, (wide, y.detach() if case == "rms_norm" else wide))


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives(case: str) -> None:
    ours, _, _ = CASES[case]
    x, y = inputs(case, torch.float64)
    assert torch.autograd.gradgradcheck(ours, (x, y))
    # Where the gradient that comes in is a constant, the one that goes out still depends on x.
    grad = torch.autograd.grad(ours(x, y).sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(grad.square().sum(), x)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_torch(case: str, dtype: torch.dtype) -> None:
    ours, torchs, _ = CASES[case]
    results = []
    for function, cast in ((ours, dtype), (torchs, dtype), (torchs, torch.float64)):
        arguments = [x.detach().to(cast).requires_grad_() for x in inputs(case, dtype)]
        out = function(*arguments)
        grads = torch.autograd.grad(out, arguments, torch.ones_like(out))
        assert {x.dtype for x in (out, *grads)} == {cast}
        results.append([out, *grads])
    assert_close(*results)


def test_backward_under_autocast_is_not_rounded() -> None:
    norm = RMSNorm(24)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = inputs("rms_norm", torch.float32)[0]
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(norm(x).square().sum(), (x, norm.weight)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_feed_forward_keeps_little_for_backward() -> None:
    """It keeps gate, up and their product, of width F, but not ``silu(gate)``."""
    layer, x = FeedForward(TransformerConfig(16, 1, 2, ffn_dim=40)), torch.randn(7, 16)
    kept: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(shape == (7, 40) for shape in kept.values()) == 3


@pytest.mark.parametrize("kind", ["fused", "reference"])
def test_functions_of_models_are_pickled(kind: str) -> None:
    """Processes that share work are given models."""
    functions = vars(load_ops(kind))
    assert vars(pickle.loads(pickle.dumps(load_ops(kind)))) == functions
    assert "patch_pool" in functions
