"""block_causal_attention on tensors of any strides: the same bits as on contiguous ones, and no copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_oracle import DTYPES, randn
from op_calls import bytes_without_copies, first_of_a_cache, heads_outside
from torch import Tensor

from blt_kernels import block_causal_attention

RAW = torch.ops.blt_kernels


PLACES = [heads_outside, first_of_a_cache]
# Documents of one length with B, Sq, Sk, H, G, E: short ones, a window of one, few queries with a cache, and tiles.
SHAPES = {
    "short": (5, 5, 5, 8, 8, 64),
    "short, grouped": (3, 9, 9, 6, 2, 40),
    "a cache": (3, 2, 70, 4, 2, 64),
    "a long cache": (2, 1, 600, 4, 1, 32),
    "tiles": (3, 70, 70, 4, 2, 64),
    "long": (2, 150, 150, 2, 2, 20),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return q, k, v and a gradient, contiguous."""
    batch, queries, keys, heads, kv_heads, width = shape
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
    return [randn(batch, n, h, width, seed=i, dtype=dtype, device=device) for i, (n, h) in enumerate(sizes)]


def run(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Return out, lse and the gradients of q, k and v."""
    *leaves, grad = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse = block_causal_attention(*leaves, **options, return_lse=True)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.triton
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@EVERY_SHAPE
def test_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype, place: Callable[..., Tensor], device: str) -> None:
    tensors = make(shape, dtype, device)
    for options in ({}, {"window": 4}, {"causal": False}):
        expected = run(tensors, **options)
        for moved in ([place(x) for x in tensors], [*tensors[:1], *map(place, tensors[1:3]), *tensors[3:]]):
            for one, other in zip(run(moved, **options), expected, strict=True):
                assert torch.equal(one, other)


@pytest.mark.triton
def test_one_head_of_keys_for_all(device: str) -> None:
    """Keys may be expanded over heads and documents, with strides of 0."""
    q, _, _, grad = make((4, 5, 5, 6, 6, 16), torch.float32, device)
    k, v = (randn(5, 16, seed=i, device=device, dtype=torch.float32)[None, :, None].expand(4, 5, 6, 16) for i in (7, 8))
    for one, other in zip(
        run([heads_outside(q), k, v, grad]), run([q, k.contiguous(), v.contiguous(), grad]), strict=True
    ):
        assert torch.equal(one, other)


@EVERY_SHAPE
@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_in_the_order_of_the_inputs(shape: tuple[int, ...], place: Callable[..., Tensor]) -> None:
    """Transposed back, a gradient is contiguous as what was transposed, and `out` is as linear layers take it."""
    tensors = make(shape, torch.float32)
    out, lse, *grads = run([place(x) for x in tensors])
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)
    assert all(grad.is_contiguous() for grad in run(tensors)[2:])


@EVERY_SHAPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_copied(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The operators call no other, and a call allocates as much for any strides."""
    q, k, v, grad = (heads_outside(x) for x in make(shape, dtype))
    arguments = (None, None, None, True, None, None, None, shape[0])
    out, lse = RAW.block_causal_attention_fwd(q, k, v, *arguments)
    contiguous = [x.contiguous() for x in (q, k, v, grad)]

    def forward(q: Tensor, k: Tensor, v: Tensor, _grad: Tensor) -> Any:
        return RAW.block_causal_attention_fwd(q, k, v, *arguments)

    def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Any:
        return RAW.block_causal_attention_bwd(grad, q, k, v, out, lse, *arguments)

    for call in (forward, backward):
        assert len({bytes_without_copies(lambda: call(*x)) for x in ((q, k, v, grad), contiguous)}) == 1  # noqa: B023


@pytest.mark.parametrize("place", PLACES)
def test_opcheck_and_derivatives(place: Callable[..., Tensor]) -> None:
    q, k, v, _ = (place(x).requires_grad_() for x in make((2, 4, 4, 4, 2, 6), torch.float64))
    torch.library.opcheck(RAW.block_causal_attention_fwd, (q, k, v, None, None, 3, True, None, None, None, 2))
    assert torch.autograd.gradgradcheck(block_causal_attention, (q, k, v), fast_mode=True)


@pytest.mark.slow
def test_compiled() -> None:
    """One graph serves every length, forward and backward."""

    @torch.compile(fullgraph=True, dynamic=True)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return block_causal_attention(q, k, v, window=4).transpose(1, 2)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((3, 5), (4, 30)):
            tensors = make((batch, length, length, 4, 2, 16), torch.float32)
            *leaves, grad = (x.transpose(1, 2).contiguous() for x in tensors)
            leaves = [x.requires_grad_() for x in leaves]
            out = attend(*leaves)
            expected = run(tensors, window=4)
            grads = torch.autograd.grad(out, leaves, grad)
            for one, other in zip((out, *grads), (expected[0], *expected[2:]), strict=True):
                assert torch.equal(one, other.transpose(1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: call | {"k": call["k"][:1], "v": call["v"][:1]}, "k: expected size 2"),
        (lambda call: call | {"cu_seqlens_q": torch.tensor([0, 4, 8], dtype=torch.int32)}, "cu_seqlens_q"),
        (lambda call: call | {"num_documents": 4}, "num_documents"),
        (lambda call: call | {"k": call["k"].flatten(0, 1)}, "k: expected 4 dimensions"),
    ],
)
def test_errors_of_the_operator(change: Callable[..., dict[str, Any]], message: str) -> None:
    q, k, v, _ = (heads_outside(x) for x in make((2, 4, 4, 4, 2, 6), torch.float32))
    names = ("cu_seqlens_q", "cu_seqlens_k", "window", "causal", "scale", "seqused_k", "ranges", "num_documents")
    call = {"q": q, "k": k, "v": v, **dict(zip(names, (None, None, None, True, None, None, None, 2), strict=True))}
    with pytest.raises(RuntimeError, match=message):
        RAW.block_causal_attention_fwd(**change(call))
