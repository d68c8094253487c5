"""block_causal_attention: which keys a query attends to by hand, and against plain attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import EVERY_DTYPE, check_attention, check_close, oracle, randn
from hypothesis import given
from hypothesis import strategies as st
from op_calls import LargestTensor
from torch import Tensor

from blt_kernels import block_causal_attention
from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import assert_close, document_lengths, offsets_of

pytestmark = pytest.mark.triton


def attended_by(device: str, queries: int, keys: int, cu_seqlens_q: Tensor, **options: Any) -> list[list[int]]:
    """Return the keys that each query attends to, which its output shows: scores are equal and values one-hot."""
    q, k = torch.zeros(queries, 1, keys, device=device), torch.zeros(keys, 1, keys, device=device)
    v = torch.eye(keys, device=device)[:, None]
    out, lse = block_causal_attention(q, k, v, cu_seqlens_q, return_lse=True, **options)
    attended = [row.nonzero().flatten().tolist() for row in out[:, 0]]
    for row, total, found in zip(out[:, 0], lse[:, 0], attended, strict=True):
        assert row[found].tolist() == pytest.approx([1 / len(found)] * len(found) if found else [])
        assert total.item() == pytest.approx(math.log(len(found)) if found else -math.inf)
    return attended


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], []]),
        ({"window": 1}, [[0], [1], [2], [3], [4], []]),
        ({"window": 2}, [[0], [0, 1], [1, 2], [2, 3], [4], []]),
        ({"window": 9}, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], []]),
        ({"causal": False}, [[0, 1, 2, 3]] * 4 + [[4], []]),
        ({"causal": False, "window": 1}, [[0], [1], [2], [3], [4], []]),
        ({"causal": False, "window": 2}, [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3], [4], []]),
    ],
)
def test_documents_and_windows(options: dict, expected: list[list[int]], device: str) -> None:
    """Documents of 4, 0 and 1 bytes and one byte beyond them. A window counts the query itself."""
    assert attended_by(device, 6, 6, torch.tensor([0, 4, 4, 5], device=device), **options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Documents have 2, 3 and 1 queries and 4, 2 and 0 keys. The last query is aligned with the last key.
        ({}, [[0, 1, 2], [0, 1, 2, 3], [], [4], [4, 5], []]),
        ({"window": 2}, [[1, 2], [2, 3], [], [4], [4, 5], []]),
        ({"causal": False}, [[0, 1, 2, 3]] * 2 + [[4, 5]] * 3 + [[]]),
        ({"causal": False, "window": 2}, [[1, 2, 3], [2, 3], [4], [4, 5], [4, 5], []]),
        ({"used": [3, 1, 0]}, [[0, 1], [0, 1, 2], [], [], [4], []]),
        ({"used": [3, 1, 0], "window": 1}, [[1], [2], [], [], [4], []]),
        ({"used": [0, 2, 0]}, [[], [], [], [4], [4, 5], []]),
    ],
)
def test_alignment_and_used_keys(options: dict, expected: list[list[int]], device: str) -> None:
    used = options.pop("used", None) if "used" in (options := dict(options)) else None
    if used is not None:
        options["seqused_k"] = torch.tensor(used, device=device)
    cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 2, 5, 6], device=device), torch.tensor([0, 4, 6, 6], device=device)
    assert attended_by(device, 6, 7, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options) == expected


def test_values_by_hand(device: str) -> None:
    """Weights 1/4 and 3/4 from scores 0 and log 3; two query heads share a key head."""
    q = torch.tensor([[[0.0], [5.0]], [[1.0], [2.0]]], device=device)  # [2, 2, 1]
    k = torch.tensor([[[0.0]], [[math.log(3)]]], device=device)
    v = torch.tensor([[[8.0]], [[16.0]]], device=device)
    out, lse = block_causal_attention(q, k, v, scale=1.0, return_lse=True)
    torch.testing.assert_close(out[..., 0].cpu(), torch.tensor([[8.0, 8.0], [14.0, 15.2]]))
    torch.testing.assert_close(lse.cpu(), torch.tensor([[0.0, 0.0], [math.log(4), math.log(10)]]))
    half, _ = block_causal_attention(q * 2, k, v, scale=0.5, return_lse=True)
    torch.testing.assert_close(half, out)


@EVERY_DTYPE
@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_short_documents(length: int, dtype: torch.dtype, device: str) -> None:
    *tensors, grad = (randn(length, 8, 40, seed=i, device=device) for i in range(4))
    # One key has a weight of 1, whatever q and k are: their gradients are 0 but for rounding.
    exact = dtype == torch.float64 or length > 1
    for offsets in ([0, length], [0, 0, length, length], [0]):
        if length and len(offsets) > 1:
            check_attention([{}], tensors, dtype, [offsets], grad=grad if exact else None)
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = block_causal_attention(*leaves, torch.tensor(offsets, device=device))
        assert len(offsets) > 1 or not out.any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_no_keys_at_all(device: str) -> None:
    q, k = torch.ones(3, 2, 4, device=device), torch.ones(0, 2, 4, device=device)
    q.requires_grad_()
    cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 3], device=device), torch.tensor([0, 0], device=device)
    out, lse = block_causal_attention(q, k, k, cu_seqlens_q, cu_seqlens_k, return_lse=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


@given(st.data())
def test_any_documents_against_one_at_a_time(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=5))
    tail = data.draw(st.integers(0, 3))
    options = {
        "window": data.draw(st.none() | st.integers(1, 50)),
        "causal": data.draw(st.booleans()),
        "scale": data.draw(st.none() | st.floats(0.1, 2)),
    }
    kv_heads, repeat = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    key_lengths, used = lengths, None
    if data.draw(st.booleans()):
        key_lengths = [data.draw(st.integers(0, 40)) for _ in lengths]
        used = [data.draw(st.integers(0, n)) for n in key_lengths] if data.draw(st.booleans()) else None
    cu_q, cu_k = offsets_of(lengths), offsets_of(key_lengths)
    rows, keys = int(cu_q[-1]) + tail, int(cu_k[-1]) + tail
    q = randn(rows, kv_heads * repeat, 3, seed=1).requires_grad_()
    k, v = (randn(keys, kv_heads, 3, seed=i).requires_grad_() for i in (2, 3))
    out, lse = block_causal_attention(
        q,
        k,
        v,
        cu_q,
        None if key_lengths is lengths else cu_k,
        **options,
        seqused_k=None if used is None else torch.tensor(used, dtype=torch.int32),
        return_lse=True,
    )
    expected, expected_lse = oracle(q, k, v, cu_q.tolist(), cu_k.tolist(), **options, used=used)
    torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=1e-10, atol=1e-10)
    grad = randn(*q.shape, seed=4)
    if expected.requires_grad:
        ours = torch.autograd.grad(out, (q, k, v), grad)
        theirs = torch.autograd.grad(expected, (q, k, v), grad, materialize_grads=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("window", "causal"), [(None, True), (200, True), (None, False), (90, False)])
def test_blocks_of_the_reference(window: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block boundaries are not document boundaries, and change nothing but rounding."""
    lengths = document_lengths(500, 3)
    offsets = offsets_of(lengths).tolist()
    leaves = [randn(500, heads, 6, seed=i).requires_grad_() for i, heads in enumerate((4, 2, 2))]
    expected, expected_lse = oracle(*leaves, offsets, offsets, window, causal)
    grad = randn(500, 4, 6, seed=5)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    for block in (reference._QUERY_BLOCK, 7, 500, 5000):
        monkeypatch.setattr(reference, "_QUERY_BLOCK", block)
        arguments = (offsets_of(lengths), None, window, causal, None, None)
        out, lse = reference.block_causal_attention_fwd_reference(*leaves, *arguments)
        torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=1e-10, atol=1e-10)
        by_autograd = torch.autograd.grad(out, leaves, grad)
        plain = [x.detach() for x in (grad, *leaves, out, lse)]
        explicit = reference.block_causal_attention_bwd_reference(*plain, *arguments)
        torch.testing.assert_close(by_autograd, expected_grads, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(explicit, expected_grads, rtol=1e-9, atol=1e-9)


def test_reference_makes_no_square_matrix() -> None:
    length, heads, window = 4096, 2, 64
    q = torch.zeros(length, heads, 8)
    with torch.no_grad(), LargestTensor() as largest:
        out, lse = reference.block_causal_attention_reference(q, q, q, window=window, return_lse=True)
        reference.block_causal_attention_bwd_reference(
            q, q, q, q, out, lse, torch.tensor([0, length]), None, window, True, None, None
        )
    assert largest.numel <= max(length * heads * 8, heads * reference._QUERY_BLOCK * (reference._QUERY_BLOCK + window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_error_against_eager_attention(dtype: torch.dtype, window: int | None, device: str) -> None:
    """Outputs and gradients are as close to fp64 as those of matmul, softmax and matmul in the same dtype."""
    offsets = [0, 150, 150, 151, 300]
    q, k, v, grad = (randn(300, heads, 16, seed=i, device=device, dtype=dtype) for i, heads in enumerate((4, 2, 2, 4)))

    def ours(*x: Tensor) -> Tensor:
        return block_causal_attention(*x, torch.tensor(offsets, device=device), window=window)

    def plain(*x: Tensor) -> Tensor:
        return oracle(*x, offsets, offsets, window)[0]

    results = []
    for function, cast in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
        leaves = [x.to(cast).requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(cast))])
    for name, *values in zip(("out", "grad_q", "grad_k", "grad_v"), *results, strict=True):
        assert_close(*values, name=name)


@EVERY_DTYPE
@pytest.mark.parametrize("window", [None, 20])
def test_agrees_with_torch_attention(window: int | None, dtype: torch.dtype, device: str) -> None:
    ahead = torch.arange(50, device=device) - torch.arange(50, device=device)[:, None]
    options = {"attn_mask": (ahead <= 0) & (ahead > -(window or 50)), "enable_gqa": True}
    tensors = [randn(2, 50, heads, 8, seed=i, device=device, dtype=dtype) for i, heads in enumerate((4, 2, 2))]

    def expected(cast: torch.dtype) -> Tensor:
        return F.scaled_dot_product_attention(*(x.to(cast).transpose(1, 2) for x in tensors), **options).transpose(1, 2)

    check_close(block_causal_attention(*tensors, window=window), expected)


@EVERY_DTYPE
def test_padded_is_packed(dtype: torch.dtype, device: str) -> None:
    q, k = (randn(3, 5, heads, 4, seed=i, device=device, dtype=dtype) for i, heads in enumerate((2, 1)))
    cu_seqlens = torch.arange(4, device=device) * 5
    packed = [x.flatten(0, 1) for x in (q, k, k)]

    def expected(cast: torch.dtype) -> Tensor:
        return reference.block_causal_attention_reference(*(x.to(cast) for x in (q, k, k)))

    for function in (block_causal_attention, reference.block_causal_attention_reference):
        out, lse = function(q, k, k, window=3, return_lse=True)
        flat, flat_lse = function(*packed, cu_seqlens, window=3, return_lse=True)
        assert torch.equal(out, flat.view_as(q))
        assert torch.equal(lse, flat_lse.view(3, 5, 2))
        check_close(function(q[:, 3:], k, k), lambda cast: expected(cast)[:, 3:])
        one = function(*packed)
        check_close(one[:5], lambda cast: expected(cast)[0])
        assert not torch.allclose(one[5:10], function(q, k, k)[1])
