"""block_causal_attention: caches, edges of tiles, and what may hold anything."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_oracle import DTYPES, EVERY_DTYPE, NAN, check_attention, check_close, randn

from blt_kernels import block_causal_attention
from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import offsets_of

pytestmark = pytest.mark.triton


@EVERY_DTYPE
def test_decoding_with_a_cache(dtype: torch.dtype, device: str) -> None:
    """Byte by byte, with a cache full of NaN where nothing is written yet."""
    length, room = 9, 12
    q, k, v = (randn(2, length, 2, 4, seed=i, device=device, dtype=dtype) for i in range(3))
    keys, values = (torch.full((2, room, 2, 4), NAN, dtype=dtype, device=device) for _ in range(2))
    for window in (None, 4):
        whole = {
            cast: reference.block_causal_attention_reference(*(x.to(cast) for x in (q, k, v)), window=window)
            for cast in (dtype, torch.float64)
        }
        steps = []
        for i in range(length):
            keys[:, i], values[:, i] = k[:, i], v[:, i]
            used = torch.full((2,), i + 1, device=device)
            steps.append(block_causal_attention(q[:, i : i + 1], keys, values, window=window, seqused_k=used))
        check_close(torch.cat(steps, 1), whole.__getitem__)


@EVERY_DTYPE
def test_rows_beyond_the_documents_are_not_read(dtype: torch.dtype, device: str) -> None:
    *leaves, grad = (randn(8, 2, 4, seed=i, device=device, dtype=dtype) for i in range(4))
    cu_seqlens = torch.tensor([0, 2, 5], device=device)
    results = []
    for poison in (0.0, NAN):
        for x in (*leaves, grad):
            x[5:] = poison
        own = [x.clone().requires_grad_() for x in leaves]
        out = block_causal_attention(*own, cu_seqlens)
        results.append([out, *torch.autograd.grad(out, own, grad)])
        assert all(not x[5:].any() for x in results[-1])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("width", "dtype"), [(1, torch.float64), *itertools.product((20, 64, 130), DTYPES)])
@pytest.mark.parametrize("queries", [1, 3, 16, 17, 63, 65])
def test_few_queries_with_a_cache(queries: int, width: int, dtype: torch.dtype, device: str) -> None:
    """Few queries and many take different paths, which agree; unused rows of the cache hold NaN."""
    room, used = 180, [150, queries, 0]
    cu_q, cu_k = [0, queries, 2 * queries, 2 * queries + 1], [0, room, 2 * room, 3 * room]
    q = randn(cu_q[-1], 6, width, device=device)
    k, v = (randn(cu_k[-1], 2, width, seed=i, device=device) for i in (1, 2))
    for document, n in enumerate(used):
        for x in (k, v):
            x[cu_k[document] + n : cu_k[document + 1]] = NAN
    batch = [{}, {"window": 70}, {"causal": False}, {"scale": -0.3}, {"scale": 0.0}]
    check_attention(batch, (q, k, v), dtype, [cu_q, cu_k], used=used)


@pytest.mark.parametrize(("width", "dtype"), [*itertools.product((20, 64), DTYPES)])
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_few_queries_with_many_keys(queries: int, width: int, dtype: torch.dtype, device: str) -> None:
    """A cache in parts that are combined: a window leaves parts without a key, and the cache ends where a part does."""
    room, used = 800, [770, 257, 256, 0, 513]
    cu_q, cu_k = offsets_of([queries] * 5).tolist(), offsets_of([room] * 5).tolist()
    q = randn(cu_q[-1], 4, width, device=device)
    k, v = (randn(cu_k[-1], 2, width, seed=i, device=device) for i in (1, 2))
    for document, n in enumerate(used):
        for x in (k, v):
            x[cu_k[document] + n : cu_k[document + 1]] = NAN
    batch = [{}, {"window": 300}, {"causal": False}]
    check_attention(batch, (q, k, v), dtype, [cu_q, cu_k], used=used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5, 16])
def test_a_document_alone_gives_the_same_bits(queries: int, dtype: torch.dtype) -> None:
    """Neither the other documents of a batch nor their numbers of queries change a step of decoding."""
    counts, used, room = [queries, 0, 1, 40, queries], [700, 90, 3, 300, 129], 720
    offsets, keys = offsets_of(counts), offsets_of([room] * 5)
    q, k, v = (
        randn(n, heads, 64, seed=n, dtype=dtype) for n, heads in ((sum(counts), 8), (5 * room, 4), (5 * room, 4))
    )
    together = block_causal_attention(q, k, v, offsets, keys, seqused_k=torch.tensor(used), return_lse=True)
    for document in (0, 2, 4):
        own, cache = slice(*offsets[document : document + 2]), slice(*keys[document : document + 2])
        alone = block_causal_attention(
            q[own][None], k[cache][None], v[cache][None], seqused_k=torch.tensor([used[document]]), return_lse=True
        )
        for one, batch in zip(alone, together, strict=True):
            assert torch.equal(one[0], batch[own])


@EVERY_DTYPE
@pytest.mark.parametrize("lengths", [[64, 63, 65], [511, 1, 513], [129, 0, 700]])
@pytest.mark.parametrize("window", [None, 1, 64, 100])
def test_lengths_around_the_tiles(lengths: list[int], window: int | None, dtype: torch.dtype, device: str) -> None:
    offsets = offsets_of(lengths).tolist()
    *tensors, grad = (randn(offsets[-1], heads, 5, seed=i, device=device) for i, heads in enumerate((2, 1, 1, 2)))
    check_attention([{"window": window}], tensors, dtype, [offsets], grad=grad)


@EVERY_DTYPE
@pytest.mark.parametrize("width", [8, 48, 256])
def test_many_tiny_documents(width: int, dtype: torch.dtype, device: str) -> None:
    offsets = offsets_of([n % 7 for n in range(150)]).tolist()
    *tensors, grad = (randn(offsets[-1], heads, width, seed=i, device=device) for i, heads in enumerate((4, 2, 2, 4)))
    check_attention([{}], tensors, dtype, [offsets], grad=grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    """Shares of the work end at tiles, so every bit is the same: for long documents, and for a step of decoding."""
    lengths = [700, 1, 150, 0, 300]
    offsets = offsets_of(lengths)
    q, k, v, grad = (randn(1151, heads, 64, seed=i, dtype=dtype) for i, heads in enumerate((4, 2, 2, 4)))
    last = torch.tensor((2, 1, 1, 0, 3)).cumsum(0)
    few = torch.cat((torch.zeros(1, dtype=torch.int64), last))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = block_causal_attention(*leaves, offsets, window=400, return_lse=True)
        step = block_causal_attention(q[: few[-1]], k, v, few, offsets, seqused_k=torch.tensor(lengths))
        results.append([out, lse, step, *torch.autograd.grad(out, leaves, grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@EVERY_DTYPE
def test_queries_without_keys_are_not_read(dtype: torch.dtype, device: str) -> None:
    """The first two of four queries are aligned with keys before the first of two."""
    q, k, v, grad = (randn(n, 2, 4, seed=n, device=device, dtype=dtype) for n in (4, 2, 2, 4))
    cu_q, cu_k = torch.tensor([0, 4], device=device), torch.tensor([0, 2], device=device)
    results = []
    for poison in (0.0, NAN):
        q[:2], grad[:2] = poison, poison
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        out = block_causal_attention(*own, cu_q, cu_k)
        results.append([out, *torch.autograd.grad(out, own, grad)])
        assert not any(x[:2].any() for x in results[-1][:2])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@EVERY_DTYPE
def test_masked_keys_may_hold_anything(dtype: torch.dtype, device: str) -> None:
    """Keys before the windows of all queries, and those of a document without queries: in the same tiles as others."""
    queries, keys, window = [3, 0, 5, 2], [9, 4, 7, 30], 2
    cu_q, cu_k = (offsets_of(n).to(device) for n in (queries, keys))
    q, grad = (randn(10, 4, 32, seed=i, dtype=dtype, device=device) for i in (1, 2))
    k, v = (randn(50, 2, 32, seed=i, dtype=dtype, device=device) for i in (3, 4))
    begins = [m - n - window + 1 if n else m for n, m in zip(queries, keys, strict=True)]
    attended = torch.cat([torch.arange(m) >= begin for m, begin in zip(keys, begins, strict=True)])
    results = []
    for poison in (0.0, NAN):
        k[~attended], v[~attended] = poison, poison
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        out = block_causal_attention(*own, cu_q, cu_k, window=window)
        results.append([out, *torch.autograd.grad(out, own, grad)])
        assert not any(x[~attended].any() for x in results[-1][2:])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@EVERY_DTYPE
@pytest.mark.parametrize("keys", [3, 70])
def test_any_number_of_rows_of_a_key_head(keys: int, dtype: torch.dtype, device: str) -> None:
    """Tiles of rows have powers of two rows, the last one some that are none: 1 to 17 heads read one key head."""
    k, v = (randn(keys, 1, 64, seed=i, device=device) for i in (1, 2))
    for heads in range(1, 18):
        check_attention([{}], (randn(1, heads, 64, device=device), k, v), dtype, [[0, 1], [0, keys]])


@EVERY_DTYPE
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (1, 1)])
@pytest.mark.parametrize("width", [5, 64])
def test_short_documents_between_others(heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str) -> None:
    """Documents of up to 16 queries and keys, of several shapes, some keys unused, beside longer and empty ones."""
    queries, keys = [5, 16, 0, 40, 3, 17, 5, 16, 1, 4], [5, 16, 3, 40, 9, 17, 5, 20, 0, 2]
    cu_q, cu_k = offsets_of(queries).tolist(), offsets_of(keys).tolist()
    counts = ((cu_q[-1], heads), (cu_k[-1], kv_heads), (cu_k[-1], kv_heads), (cu_q[-1], heads))
    for used in (None, [5, 13, 0, 40, 2, 16, 5, 7, 0, 2]):
        *tensors, grad = (randn(n, h, width, seed=i, device=device) for i, (n, h) in enumerate(counts))
        for document, n in enumerate(used or keys):
            for x in tensors[1:]:
                x[cu_k[document] + n : cu_k[document + 1]] = NAN
        batch = [{}, {"window": 3}, {"causal": False}, {"scale": -0.3}]
        check_attention(batch, tensors, dtype, [cu_q, cu_k], used=used, grad=grad)


def test_a_short_document_alone_gives_the_same_bits() -> None:
    """Forward and backward: whatever lanes the documents beside it take."""
    lengths = [5, 9, 5, 2, 16, 5]
    offsets = offsets_of(lengths)
    q, k, v, grad = (randn(42, heads, 40, seed=i, dtype=torch.float32) for i, heads in enumerate((6, 2, 2, 6)))

    def run(rows: slice, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x[rows].clone().requires_grad_() for x in (q, k, v)]
        out = block_causal_attention(*leaves, cu_seqlens)
        return out, *torch.autograd.grad(out, leaves, grad[rows])

    together = run(slice(0, 42), offsets)
    for document, length in enumerate(lengths):
        own = slice(*offsets[document : document + 2])
        for one, batch in zip(run(own, offsets_of([length])), together, strict=True):
            assert torch.equal(one, batch[own])
