"""The Triton kernels of block_causal_attention in Triton's interpreter, against the reference.

The interpreter must be chosen before Triton is imported, so the kernels run in a process of their own. There each
access is checked to be within the tensors that the kernel was given, and products and bytes are counted.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from inputs import LARGE_SCORES, eager_attention, large_scores, sizes_of_scores
from torch import Tensor

from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import assert_close, assert_equal, document_lengths, offsets_of
from blt_kernels.triton.attention_launch import (
    KERNELS,
    MAX_SPLITS,
    Launch,
    configurations,
    decode_few,
    decode_splits,
    decode_tiles,
    launch_options,
    tiles_visited,
)

# Not imported here: the other process imports this file first.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

NAN = float("nan")
SMALL = (32, 16)  # rows and step of the tiles, so that short documents meet many of them
RAGGED = [1, 33, 0, 17, 2]


# --- in the other process ---------------------------------------------------------------------------------------------


class Watch:
    """Checks the accesses of interpreted kernels, and counts their products and the bytes of the tiles they load."""

    def __init__(self) -> None:
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter

        self.allowed = np.empty((0, 2), dtype=np.uint64)
        self.products: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.kernel = ""
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor

        def wrap(owner: type, name: str, before: Callable[..., tuple]) -> None:
            original = getattr(owner, name)
            setattr(owner, name, lambda this, *args, **kwargs: original(this, *before(this, *args), **kwargs))

        def launched(this: Any, *args: Any) -> tuple:
            self.kernel = this.fn.__name__
            storages = [x.untyped_storage() for x in args if isinstance(x, Tensor)]
            self.allowed = np.array([(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages], dtype=np.uint64)
            return args

        def access(pointers: Any, mask: Any, loads: bool) -> None:
            at = pointers.data[mask.data].astype(np.uint64).reshape(-1)
            inside = (at[:, None] >= self.allowed[:, 0]) & (at[:, None] < self.allowed[:, 1])
            assert inside.any(1).all(), f"{self.kernel} reads or writes outside of its tensors"
            if loads and pointers.data.ndim == 2:
                size = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
                self.bytes[self.kernel] = self.bytes.get(self.kernel, 0) + np.unique(at).size * size

        def loaded(_: Any, pointers: Any, mask: Any, *rest: Any) -> tuple:
            access(pointers, mask, loads=True)
            return (pointers, mask, *rest)

        def stored(_: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> tuple:
            access(pointers, mask, loads=False)
            return (pointers, value, mask, *rest)

        def as_float(x: Any) -> Any:
            if x.dtype.scalar != tl.bfloat16:  # which the interpreter keeps as integers, and multiplies as such
                return x
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        def multiplied(_: Any, a: Any, b: Any, *rest: Any) -> tuple:
            self.products[self.kernel] = self.products.get(self.kernel, 0) + 1
            return (as_float(a), as_float(b), *rest)

        wrap(executor, "__call__", launched)
        wrap(builder, "create_dot", multiplied)
        wrap(builder, "create_masked_load", loaded)  # which loads without a mask call too
        wrap(builder, "create_masked_store", stored)


_watch: list[Watch] = []


def start() -> None:
    assert "triton" not in sys.modules, "Triton was imported before the interpreter was chosen"
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore", RuntimeWarning)  # infinities and NaN in the tests' data, from numpy
    torch.set_num_threads(1)
    _watch.append(Watch())


def call(message: bytes) -> bytes:
    """Run forward, and backward if there is a gradient; decoding splits keys in `splits` parts if that is not 0."""
    from blt_kernels.triton import attention_backward, block_causal_attention

    arguments, grad, tiles, splits, repeats, count = pickle.loads(message)
    launch = tiles and Launch(*tiles, 4, 1)
    if splits:
        launch = None
    _watch[0].products.clear()
    _watch[0].bytes.clear()
    parts = mock.patch.object(block_causal_attention, "decode_splits", return_value=splits)
    results = []
    for _ in range(repeats):
        with parts if splits else nullcontext():
            out = block_causal_attention.block_causal_attention_fwd_cuda(*arguments, launch=launch)
        grads: tuple[Tensor, ...] = ()
        if grad is not None:
            grads = attention_backward.block_causal_attention_bwd_cuda(
                grad, *arguments[:3], *out, *arguments[3:], launch=launch
            )
        results.append((*out, *grads))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    return pickle.dumps((results[0], getattr(_watch[0], count)))


def call_with_ranges(message: bytes) -> bytes:
    """Run forward and backward with ranges that are given, or made before if None.

    Return these, all results, and how often ranges were written.
    """
    from blt_kernels.triton import attention_backward, attention_ranges, block_causal_attention

    (q, k, v, cu_q, cu_k, window, causal, scale, used), grad, splits, made = pickle.loads(message)
    rest, launch = (cu_q, cu_k, window, causal, scale, used), None if splits else Launch(*SMALL, 4, 1)
    if made is None:
        made = attention_ranges.block_causal_attention_ranges_fwd_cuda(
            cu_q, cu_k, q.shape[0], k.shape[0], window, causal, used
        )
    few = mock.patch.object(block_causal_attention, "decode_splits", return_value=splits)
    writes = mock.patch.object(attention_ranges, "_write", wraps=attention_ranges._write)
    with few if splits else nullcontext(), writes as write:
        out = block_causal_attention.block_causal_attention_fwd_cuda(q, k, v, *rest, made, launch=launch)
        grads = attention_backward.block_causal_attention_bwd_cuda(
            grad, q, k, v, *out, *rest, made, launch=Launch(*SMALL, 4, 1)
        )
    return pickle.dumps((made, (*out, *grads), write.call_count))


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=start) as pool:
        yield pool


@pytest.fixture
def run(interpreter: ProcessPoolExecutor) -> Callable[..., tuple[tuple[Tensor, ...], dict[str, int]]]:
    """Results of `call`, and the products that each kernel made, or the bytes of tiles that it loaded."""

    def submit(arguments, grad=None, *, tiles=SMALL, splits=0, repeats=1, count="products"):
        message = pickle.dumps((arguments, grad, tiles, splits, repeats, count))  # which copies tensors
        return pickle.loads(interpreter.submit(call, message).result())

    return submit


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(queries: int, keys: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k, v and gradient."""
    sizes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    return [randn(*size, width, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]


def flash_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Gradients with weights exp(s - lse) and with sum(g * out), from rounded `lse` and `out`, as in the kernels.

    The reference makes both anew from the scores, so its errors are smaller where gradients cancel.
    """
    accumulator, factor = lse.dtype, q.shape[-1] ** -0.5 if rest[4] is None else rest[4]
    first, last, live = reference.visible(q, k, *rest[:4], rest[5])
    rows = (first < last)[:, None, None]
    grad, q, out = (torch.where(rows, x, 0).to(accumulator) for x in (grad, q, out))
    keys, values = (torch.where(live[:, None, None], x, 0).to(accumulator) for x in (k, v))
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
    key = torch.arange(k.shape[0])
    seen = (first[:, None] <= key) & (key < last[:, None])
    p = (torch.einsum("qhe,khe->hqk", q * factor, keys) - lse.T[..., None]).exp().where(seen, 0)
    ds = p * (torch.einsum("qhe,khe->hqk", grad, values) - (grad * out).sum(-1).T[..., None])
    grads = (torch.einsum("hqk,khe->qhe", ds, keys) * factor,)
    grads += tuple(torch.einsum("hqk,qhe->khe", w, x) for w, x in ((ds, q * factor), (p, grad)))
    return tuple(x.unflatten(1, (y.shape[1], -1)).sum(2).to(v.dtype) for x, y in zip(grads, (q, k, v), strict=True))


def check(run: Callable, tensors: list[Tensor], cu_q: Tensor, cu_k: Tensor | None = None, **changed: Any) -> Any:
    """Compare all results with the reference in fp64: errors at most twice those of the reference in the same dtype."""
    options = {"window": None, "causal": True, "scale": None, "seqused_k": None} | changed
    splits, tiles = options.pop("splits", 0), options.pop("tiles", SMALL)
    q, k, v, grad = tensors
    rest = (cu_q, cu_k, *options.values())
    results, products = run((q, k, v, *rest), None if splits else grad, tiles=tiles, splits=splits)

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        own = [x.to(dtype) for x in tensors]
        out = reference.block_causal_attention_fwd_reference(*own[:3], *rest)
        return *out, *flash_gradients(own[3], *own[:3], *out, *rest)

    names = ("out", "lse", "dq", "dk", "dv")
    for name, *triple in zip(names, results, expected(q.dtype), expected(torch.float64), strict=False):
        assert_close(*triple, name=name)
    return results, products


# Lengths of queries and keys (those of the queries if None), and how many of the keys are used.
DOCUMENTS: dict[str, tuple[list[int], list[int] | None, list[int] | None]] = {
    "empty, one byte, a tile plus one": (RAGGED, None, None),
    "one byte each": ([1] * 40, None, None),
    "more keys than queries, and fewer": ([20, 3, 40, 0, 9], [64, 5, 9, 2, 50], None),
    "caches with room": ([20, 3, 40, 0, 9], [64, 5, 9, 2, 50], [40, 0, 9, 1, 30]),
    "nothing is used of one between others": ([3, 2, 3, 5], [16, 16, 20, 2], [16, 0, 16, 2]),
}
FACTORS: dict[str, tuple] = {
    "width": (20, 32, 64, 96, 128, 192, 256),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "window": (None, 1, 16, 25),
    "causal": (True, False),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "documents": tuple(DOCUMENTS),
}


def pairwise(factors: dict[str, tuple]) -> list[tuple]:
    """Few combinations that hold every pair of values of two factors, found greedily and always the same."""
    values = list(factors.values())
    columns = range(len(values))
    pairs = [((i, a), (j, b)) for i, j in itertools.combinations(columns, 2) for a in values[i] for b in values[j]]
    missing, rows = dict.fromkeys(pairs), []
    while missing:
        row: dict[int, Any] = dict(next(iter(missing)))
        for column in columns:
            if column not in row:
                row[column] = max(
                    values[column],
                    key=lambda x: sum(  # what it would cover
                        tuple(sorted(((column, x), item), key=lambda pair: pair[0])) in missing for item in row.items()
                    ),
                )
        for pair in itertools.combinations(sorted(row.items(), key=lambda pair: pair[0]), 2):
            missing.pop(pair, None)
        rows.append(tuple(row[column] for column in columns))
    return rows


@pytest.mark.parametrize(tuple(FACTORS), pairwise(FACTORS))
def test_every_pair_of_what_there_is(
    run: Callable,
    width: int,
    heads: tuple[int, int],
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
    documents: str,
) -> None:
    """Every head width with every group count, window, alignment, dtype and ragged shape, and so on for each pair.

    There are five rows beyond the last document. What nobody may see holds NaN.
    """
    queries, keys, used = DOCUMENTS[documents]
    cu_q, cu_k = offsets_of(queries), None if keys is None else offsets_of(keys)
    seqused_k = None if used is None else torch.tensor(used, dtype=torch.int32)
    tensors = inputs(sum(queries) + 5, sum(keys or queries) + 5, heads, width, dtype)
    first, last, live = reference.visible(*tensors[:2], cu_q, cu_k, window, causal, seqused_k)
    for x in (tensors[0], tensors[3]):
        x[first >= last] = NAN
    for x in tensors[1:3]:
        x[~live] = NAN
    (out, lse, *_), _ = check(run, tensors, cu_q, cu_k, window=window, causal=causal, seqused_k=seqused_k)
    assert not out[first >= last].any()
    assert (lse[first >= last] == -torch.inf).all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_long_window_is_none(run: Callable, causal: bool) -> None:
    """Of more queries than keys, whose positions are negative, and with a cache."""
    for queries, keys, options in (([5, 40], [30, 3], {}), ([2], [40], {"splits": 2})):
        q, k, v, grad = inputs(sum(queries), sum(keys), (2, 1), 16, torch.float32)
        cu = offsets_of(queries), offsets_of(keys)
        expected, _ = run((q, k, v, *cu, None, causal, None, None), grad, **options)
        for window in (2**31 - 1, 2**31, 2**63 - 1):
            actual, _ = run((q, k, v, *cu, window, causal, None, None), grad, **options)
            assert_equal(actual, expected, name=f"window = {window}")


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales(run: Callable, scale: float) -> None:
    check(run, inputs(70, 70, (1, 1), 32, torch.bfloat16), offsets_of([50, 20]), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_that_overflow_before_they_are_scaled(run: Callable, dtype: torch.dtype) -> None:
    """Powers of two move from the scale to q and k: results stay as precise, in fp32 the same bit for bit.

    In 16 bits forward starts anew, in smaller steps.
    """
    q, k, v, grad = inputs(70, 70, (2, 1), 32, dtype)
    cu = offsets_of([50, 20])
    q *= 16
    (out, _, *grads), _ = run((q, k, v, cu, None, 25, True, 0.5, None), grad)
    large = (q * 2.0**62, k * 2.0**59, v, cu, None, 25, True, 2.0**-122, None)
    assert not torch.einsum("qhe,khe->hqk", large[0].float(), large[1].float().expand(-1, 2, -1)).isfinite().all()
    (large_out, _, dq, dk, dv), _ = run(large, grad)
    actual = large_out, dq * 2.0**62, dk * 2.0**59, dv
    if dtype == torch.float32:
        torch.testing.assert_close(actual, (out, *grads), rtol=0, atol=2.0**-64)  # without subnormal numbers
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth = eager_attention(*leaves, cu.tolist(), 25, 0.5)
    truths = truth, *torch.autograd.grad(truth, leaves, grad.double())
    for result, plain, exact in zip(actual, (out, *grads), truths, strict=True):
        assert_close(result, plain, exact.detach())


@pytest.mark.parametrize(
    ("case", "dtype", "size"),
    [
        (0, torch.float32, 1e6),
        (1, torch.bfloat16, 3e38),
        (2, torch.bfloat16, 1e6),
        (3, torch.float16, 3e9),
        (4, torch.bfloat16, 3e9),
        (4, torch.float32, 3e38),
    ],
)
def test_scores_of_any_size(run: Callable, case: int, dtype: torch.dtype, size: float) -> None:
    """Up to near the largest of fp32, of both signs: outputs are as precise as for ordinary ones, in each document."""
    width, scale, window = LARGE_SCORES[case]
    (q, k, v, _), offsets = large_scores(size, (2, 1), width, scale, dtype)
    cu = torch.tensor(offsets, dtype=torch.int32)
    (out, _), _ = run((q, k, v, cu, None, window, True, scale, None))
    eager, truth = (
        eager_attention(*(x.to(cast) for x in (q, k, v)), offsets, window, scale) for cast in (dtype, torch.float64)
    )
    for begin, end in itertools.pairwise(offsets):
        assert_close(out[begin:end], eager[begin:end], truth[begin:end])


@pytest.mark.parametrize(("dtype", "number"), [(torch.bfloat16, 133120.0), (torch.float16, 65504.0)])
def test_alike_keys_of_huge_scores_weigh_the_same(run: Callable, dtype: torch.dtype, number: float) -> None:
    """The average of values of 1 is exactly 1, whatever 1 / sqrt(128) and its rounding make of the scores."""
    q, k, v = torch.full((70, 2, 128), number, dtype=dtype), *(torch.ones(70, 1, 128, dtype=dtype) for _ in "kv")
    k *= number
    cu = offsets_of([40, 30])
    results, _ = run((q, k, v, cu, None, None, True, None, None), randn(70, 2, 128, dtype=dtype))
    assert_equal(results[0], v.expand_as(q))
    assert all(x.isfinite().all() for x in results)
    last = offsets_of([1, 1])
    for splits in (1, 3):
        (out, lse), _ = run((q[:2], k, v, last, cu, None, True, None, None), splits=splits)
        assert_equal(out, torch.ones_like(out))
        assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_with_scores_of_any_size(run: Callable, dtype: torch.dtype) -> None:
    """Keys of the same score lie in several parts, whose logarithms would have lost their weights."""
    for size in sizes_of_scores(dtype)[1:]:
        for width, scale, window in LARGE_SCORES[1:3]:
            (q, k, v, _), offsets = large_scores(size, (2, 1), width, scale, dtype)
            last = torch.tensor(offsets[1:]) - 1
            cu_q, cu_k = offsets_of([1] * len(last)), torch.tensor(offsets, dtype=torch.int32)
            (out, _), _ = run((q[last], k, v, cu_q, cu_k, window, True, scale, None), splits=3)
            eager, truth = (
                eager_attention(*(x.to(cast) for x in (q, k, v)), offsets, window, scale)[last]
                for cast in (dtype, torch.float64)
            )
            assert_close(out, eager, truth)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e3), (torch.bfloat16, 1e4), (torch.float32, 3e9), (torch.bfloat16, 3e38), (torch.float16, 3e9)],
)
def test_gradients_of_large_scores(run: Callable, dtype: torch.dtype, size: float) -> None:
    """Weights are off by 2^-22 times the size of scores at most, and finite and at most 1 whatever that is."""
    width, scale, _ = LARGE_SCORES[2]
    (q, k, v, grad), offsets = large_scores(size, (2, 1), width, scale, dtype)
    cu = torch.tensor(offsets, dtype=torch.int32)
    (_, _, *grads), _ = run((q, k, v, cu, None, None, True, scale, None), grad)
    assert all(x.isfinite().all() for x in grads)
    eps = torch.finfo(dtype).eps
    for begin, end in itertools.pairwise(offsets):
        most = grad[begin:end].abs().double().sum((0, 1))
        assert (grads[2][begin:end].abs() <= (1 + 2 * eps) * most).all()
    if size <= 1e4:
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        out = eager_attention(*leaves, offsets, None, scale)
        exact, terms = (
            torch.autograd.grad(out, leaves[2], x, retain_graph=True)[0] for x in (grad.double(), grad.double().abs())
        )
        tiny = 1e-30  # weights below the smallest of fp32 are 0
        assert ((grads[2] - exact).abs() <= (2**-22 * size + 2 * eps) * terms + tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_of_a_query_reaches_the_gradients_of_its_keys(run: Callable, dtype: torch.dtype) -> None:
    """Weights are at most 1, and NaN all the same where scores are."""
    q, k, v, grad = inputs(120, 120, (2, 1), 32, dtype)
    q[70, 1] = NAN
    (_, _, dq, dk, dv), _ = run((q, k, v, offsets_of([60, 60]), None, None, True, None, None), grad)
    assert dq[70, 1].isnan().all()
    assert not dq[:70].isnan().any()
    for x in (dk, dv):
        assert x[60:71].isnan().all()
        assert not x[:32].isnan().any()  # tiles of keys that the query has no part in


@pytest.mark.parametrize("window", [None, 1, 31, 64, 100])
def test_documents_of_all_lengths_at_edges_of_tiles(run: Callable, window: int | None) -> None:
    """Tiles that are whole for some rows, for all that have keys, and for none; rows without any at the end."""
    lengths = [1, 300, 2, 64, 63, 0, 128, 65, 17]
    tensors = inputs(sum(lengths) + 40, sum(lengths) + 40, (2, 1), 32, torch.float32)
    for x in tensors:
        x[sum(lengths) :] = NAN
    check(run, tensors, offsets_of(lengths), window=window, tiles=(64, 32))


def test_launches_as_on_hopper(run: Callable) -> None:
    """With the tiles that `launch_options` says."""
    check(run, inputs(300, 300, (1, 1), 64, torch.bfloat16), offsets_of([170, 1, 129]), window=100, tiles=None)


def test_many_tiny_documents(run: Callable) -> None:
    lengths = [1] * 100 + [n % 4 for n in range(60)]
    total = sum(lengths)
    _, products = check(run, inputs(total, total, (1, 1), 16, torch.float32), offsets_of(lengths))
    assert products["block_causal_attention_fwd_kernel"] <= 2 * -(-total // SMALL[0]) * (SMALL[0] // SMALL[1] + 1)


def test_strides(run: Callable) -> None:
    """Slices of one projection, heads before bytes, and a width that is not the last dimension: no copy is seen."""
    fused = randn(60, 4, 3, 32, seed=1)
    q, v = fused[:, :, 0], fused[:, 2:, 2]
    k = randn(2, 60, 32, seed=2).transpose(0, 1)
    grad = randn(60, 32, 4, seed=3).transpose(1, 2)
    check(run, [q, k, v, grad], offsets_of([40, 20]))
    check(run, [q[:6], k, v, grad[:6]], offsets_of([2, 4]), offsets_of([40, 20]), splits=2)


def test_repeats_are_the_same_bit_for_bit(run: Callable) -> None:
    q, k, v, grad = inputs(53, 53, (2, 1), 32, torch.bfloat16)
    run((q, k, v, offsets_of(RAGGED), None, 20, True, None, None), grad, repeats=2)


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 5), (5, 0)])
def test_nothing(run: Callable, queries: int, keys: int) -> None:
    q, k, v, grad = inputs(queries, keys, (2, 1), 32, torch.float32)
    for documents in (0, 2):
        cu = torch.zeros(documents + 1, dtype=torch.int32)
        (out, lse, *grads), _ = run((q, k, v, cu, cu, None, True, None, None), grad)
        assert not any(x.any() for x in (out, *grads))
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize("offsets", [[5, 900, -7, 3], [-(2**31), 2**31 - 1, 0, 40], [0, 60, 20, 40], [0, 0, 0, 0]])
def test_wrong_offsets_reach_nothing_outside(run: Callable, offsets: list[int], splits: int) -> None:
    """The worker checks every access."""
    cu = torch.tensor(offsets, dtype=torch.int32)
    queries = 6 if splits else 40  # decoding takes a program for each, and a part of its keys
    q, k, v, grad = inputs(queries, 50, (1, 1), 16, torch.float32)
    used = torch.tensor([2**31 - 1, -5, 100], dtype=torch.int32)
    for pair in ((cu, offsets_of([10, 10, 20])), (offsets_of([2, 0, queries - 2]), cu)):
        arguments = (q, k, v, *pair, 7, True, None, used)
        results, _ = run(arguments, None if splits else grad, splits=splits)
        assert results[0].shape == q.shape


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "splits"), [((8, 2), 1), ((8, 2), 7), ((20, 1), 3), ((1, 1), 40)])
def test_decoding(run: Callable, heads: tuple[int, int], splits: int) -> None:
    """One to a few queries of documents with caches that are full, nearly empty, empty, and of odd lengths."""
    queries, room, used = [1, 2, 1, 0, 4], 300, [300, 3, 0, 7, 131]
    cu_q, cu_k = offsets_of(queries), offsets_of([room] * 5)
    tensors = inputs(8, 5 * room, heads, 16, torch.float32)
    for document, n in enumerate(used):
        for x in tensors[1:3]:
            x[document * room + n : (document + 1) * room] = NAN
    seqused_k = torch.tensor(used, dtype=torch.int32)
    for options in ({"window": 60}, {"scale": -0.5, "causal": False}) if splits == 7 else ({},):
        check(run, tensors, cu_q, cu_k, seqused_k=seqused_k, splits=splits, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [48, 256])
def test_decoding_in_half_precision(run: Callable, width: int, dtype: torch.dtype) -> None:
    tensors = inputs(2, 260, (4, 1), width, dtype)
    check(run, tensors, offsets_of([1, 1]), offsets_of([200, 60]), splits=3)


def test_few_queries_are_decoded(run: Callable) -> None:
    tensors = inputs(3, 90, (1, 1), 16, torch.float32)
    arguments = (*tensors[:3], offsets_of([1, 2]), offsets_of([30, 60]), None, True, None, None)
    _, products = run(arguments, tiles=None)
    assert set(products) == {"block_causal_attention_decode_kernel"}


def filled(queries: list[int], used: list[int], heads: tuple[int, int]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Random tensors for caches of 5 more rows than are used, which hold NaN, and their offsets."""
    rooms = [n + 5 for n in used]
    tensors = inputs(sum(queries), sum(rooms), heads, 16, torch.float32)
    cu_k = offsets_of(rooms)
    for begin, n, end in zip(cu_k.tolist(), used, cu_k.tolist()[1:], strict=False):
        for x in tensors[1:3]:
            x[begin + n : end] = NAN
    return tensors, (offsets_of(queries), cu_k, torch.tensor(used, dtype=torch.int32))


@pytest.mark.parametrize(("heads", "window", "splits"), [((8, 1), None, 3), ((16, 4), 9, 2), ((2, 2), None, 1)])
def test_each_document_of_a_mixed_batch_takes_its_kernel(
    run: Callable, heads: tuple[int, int], window: int | None, splits: int
) -> None:
    """Prefill beside decoding: documents of 1 to 20 queries, empty ones and empty caches, and rows behind the last."""
    queries, used = [1, 20, 0, 3, 17, 16, 1, 70, 2, 4], [40, 90, 30, 0, 11, 16, 1, 70, 100, 9]
    tensors, (cu_q, cu_k, seqused_k) = filled([*queries, 3], [*used, 0], heads)
    offsets = cu_q[:-1], cu_k[:-1]
    first, last, _ = reference.visible(*tensors[:2], *offsets, window, True, seqused_k[:-1])
    tensors[0][first >= last] = NAN
    (out, lse, *_), products = check(run, tensors, *offsets, window=window, seqused_k=seqused_k[:-1], splits=splits)
    assert {f"block_causal_attention_{name}_kernel" for name in ("fwd", "decode")} <= set(products)
    assert not out[-3:].any()
    assert (lse[-3:] == -torch.inf).all()


def test_decoding_rows_are_nothing_to_forward(run: Callable) -> None:
    """63 documents of one query and a prefill of 400: forward makes no product for the 63 and their long caches."""
    tensors = inputs(463, 63 * 40 + 400, (1, 1), 16, torch.float32)
    cu_q, cu_k = offsets_of([1] * 63 + [400]), offsets_of([40] * 63 + [400])
    _, products = run((*tensors[:3], cu_q, cu_k, None, True, None, None), tiles=None)
    first, last = ranges_of([1] * 63 + [400], None, [40] * 63 + [400])
    last[:63] = first[:63]
    launch = launch_options("fwd", 16, torch.float32, (9, 0))
    visited, _ = tiles_visited(first, last, launch.rows, launch.step)
    assert products == {
        "block_causal_attention_fwd_kernel": 2 * visited,
        "block_causal_attention_decode_kernel": 2 * 63,
    }


@pytest.mark.parametrize(("heads", "count"), [((8, 1), 4), ((16, 4), 8), ((2, 2), 16)])
@pytest.mark.parametrize("window", [None, 100])
def test_decoding_loads_every_key_once(run: Callable, heads: tuple[int, int], count: int, window: int | None) -> None:
    """Up to `count` queries of a document share them with each other and with the heads of a group, in any batch."""
    queries, used = [1, count, 2, 0, count], [300, 200, 64, 90, 131]
    tensors, (cu_q, cu_k, seqused_k) = filled(queries, used, heads)
    tensors = [x.bfloat16() for x in tensors]
    for splits in (1, 3):
        arguments = (*tensors[:3], cu_q, cu_k, window, True, None, seqused_k)
        _, loaded = run(arguments, splits=splits, count="bytes")
        keys = sum(min(m, window + n - 1 if window else m) for n, m in zip(queries, used, strict=True) if n)
        minimum = 2 * keys * heads[1] * 16 * 2 + splits * tensors[0].nbytes
        assert loaded["block_causal_attention_decode_kernel"] <= 1.10 * minimum


# --- tiles ------------------------------------------------------------------------------------------------------------


def ranges_of(lengths: list[int], window: int | None, keys: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """The keys `[first, last)` of every query, from the reference."""
    cu_q = offsets_of(lengths)
    cu_k = None if keys is None else offsets_of(keys)
    x, y = torch.empty(sum(lengths), 1, 1), torch.empty(sum(keys or lengths), 1, 1)
    first, last, _ = reference.visible(x, y, cu_q, cu_k, window, True, None)
    return first, torch.maximum(first, last)


@pytest.mark.parametrize(("window", "keys"), [(None, None), (9, None), (9, [50, 60, 3, 40])])
def test_tiles_are_counted_as_they_are_visited(run: Callable, window: int | None, keys: list[int] | None) -> None:
    lengths = [40, 1, 3, 50]
    tensors = inputs(94, sum(keys or lengths), (1, 1), 16, torch.float32)
    cu_k = None if keys is None else offsets_of(keys)
    _, products = run((*tensors[:3], offsets_of(lengths), cu_k, window, True, None, None))
    visited, fewest = tiles_visited(*ranges_of(lengths, window, keys), *SMALL)
    assert products["block_causal_attention_fwd_kernel"] == 2 * visited
    assert fewest <= visited


@pytest.mark.parametrize("tiles", [(128, 128), (128, 64), (64, 32)])
def test_few_more_tiles_than_necessary_are_visited(tiles: tuple[int, int]) -> None:
    ragged = document_lengths(20000, seed=3)
    keys = [n + 3 for n in ragged]
    for window in (None, 512):
        for others in (None, keys):
            visited, fewest = tiles_visited(*ranges_of(ragged, window, others), *tiles)
            assert visited <= 1.15 * fewest
    visited, fewest = tiles_visited(*ranges_of([1] * 100_000, None), *tiles)
    assert visited <= 2 * fewest


# --- launches and registration ----------------------------------------------------------------------------------------


def test_launch_options() -> None:
    for arch in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (99, 0)):
        listed = {(kernel, width, dtype, launch) for kernel, width, dtype, launch in configurations(arch)}
        for kernel in KERNELS:
            for width, padded in ((1, 32), (32, 32), (33, 64), (96, 128), (192, 256), (256, 256)):
                for dtype in (torch.bfloat16, torch.float32):
                    launch = launch_options(kernel, width, dtype, arch)
                    assert isinstance(launch, Launch)
                    assert (kernel, padded, dtype, launch) in listed
                assert launch_options(kernel, width, torch.float16, arch) == launch_options(
                    kernel, width, torch.bfloat16, arch
                )
    with pytest.raises(ValueError, match="head_width: expected at most 256, got 257"):
        launch_options("fwd", 257, torch.bfloat16, (9, 0))


def test_splits_fill_the_gpu_and_no_more() -> None:
    assert decode_splits(1, 1 << 20, 1, 132) == MAX_SPLITS
    assert decode_splits(8, 8192, 1, 132) == 32  # of 256 keys
    assert decode_splits(8, 64 * 8192, 64, 132) == 1  # as many programs as fit
    assert decode_splits(8, 4 * 8192, 4, 132) == 8
    assert decode_splits(8, 0, 0, 132) == decode_splits(1, 100, 1, 132) == 1


def test_which_documents_are_decoded() -> None:
    assert decode_few(16, 1, 64) == 16  # all: forward does not run
    assert decode_few(128, 64, 1) == 128
    assert decode_few(128, 64, 2) == 16
    assert decode_few(463, 64, 1) == 16
    assert decode_few(0, 0, 1) == 0


def test_programs_of_a_decoded_document() -> None:
    assert decode_tiles(64, 64, 64, 8, 32) == 1
    assert decode_tiles(16, 1, 16, 8, 32) == 4
    assert decode_tiles(463, 64, 16, 1, 32) == 1
    assert decode_tiles(5000, 2, 16, 128, 32) == 4  # which take several tiles each
    assert decode_tiles(0, 0, 0, 1, 32) == 1


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("window", "causal"), [(None, True), (7, True), (7, False)])
def test_ranges_made_before(
    interpreter: ProcessPoolExecutor, run: Callable, documents: str, window: int | None, causal: bool
) -> None:
    lengths, keys, used = DOCUMENTS[documents]
    cu_q, cu_k = offsets_of(lengths), None if keys is None else offsets_of(keys)
    used_k = None if used is None else torch.tensor(used, dtype=torch.int32)
    totals = [sum(n) + 3 for n in (lengths, keys or lengths)]  # rows beyond the documents
    q, k, v, grad = inputs(*totals, (2, 1), 16, torch.float32)
    arguments = (q, k, v, cu_q, cu_k, window, causal, None, used_k)
    expected, _ = run(arguments, grad)
    made, results, writes = pickle.loads(
        interpreter.submit(call_with_ranges, pickle.dumps((arguments, grad, 0, None))).result()
    )
    assert torch.equal(
        made, reference.block_causal_attention_ranges_fwd_reference(cu_q, cu_k, *totals, window, causal, used_k)
    )
    assert_equal(results, expected)
    assert writes == 0


def test_decoding_finds_its_own_ranges(interpreter: ProcessPoolExecutor, run: Callable) -> None:
    """Documents of few queries see no key in the forward kernel: what was made before says otherwise."""
    cu_q, cu_k = offsets_of([2, 40, 1]), offsets_of([50, 60, 20])
    q, k, v, grad = inputs(43, 130, (2, 1), 16, torch.float32)
    arguments = (q, k, v, cu_q, cu_k, None, True, None, None)
    expected, _ = run(arguments, splits=2)
    message = pickle.dumps((arguments, grad, 2, None))
    _, results, writes = pickle.loads(interpreter.submit(call_with_ranges, message).result())
    assert_equal(results[:2], expected)
    assert writes == 1


INT_MIN, INT_MAX = -(2**31), 2**31 - 1
HOSTILE = {  # first and last of every row, in turn; there are 40 queries and 50 keys
    "a little too far": ([0], [58]),
    "everything there is": ([0], [INT_MAX]),
    "in front of everything": ([-9], [3]),
    "the least there is": ([INT_MIN], [50]),
    "behind everything": ([1000], [2000]),
    "reversed": ([INT_MAX], [INT_MIN]),
    "in disorder": ([INT_MAX, 7, -5, 90, 0, INT_MIN], [INT_MAX, 1, 60, 2000, INT_MIN, 45]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_wrong_ranges_reach_nothing_outside(interpreter: ProcessPoolExecutor, name: str) -> None:
    """The worker checks every access of forward and backward."""
    q, k, v, grad = inputs(40, 50, (2, 1), 16, torch.float32)
    made = [torch.tensor(values).repeat(n)[:n] for n in (40, 52) for values in HOSTILE[name]]
    arguments = (q, k, v, offsets_of([40]), offsets_of([50]), None, True, None, None)
    message = pickle.dumps((arguments, grad, 0, torch.cat(made).int()))
    _, results, writes = pickle.loads(interpreter.submit(call_with_ranges, message).result())
    assert [x.shape for x in results] == [q.shape, q.shape[:2], q.shape, k.shape, v.shape]
    assert writes == 0


def test_ranges_of_other_sizes_are_refused() -> None:
    from blt_kernels.triton.attention_ranges import ranges

    made = torch.zeros(24, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"ranges: expected contiguous int32 \[32\], got torch.int32 \[24\]"):
        ranges(made, 6, 6, offsets_of([6]), None, 1, None, True, None, made=made)


@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (3, 50), (40, 0), (0, 7)])
def test_documents_of_one_length_need_no_offsets(run: Callable, queries: int, keys: int, splits: int) -> None:
    documents = 3
    *tensors, grad = inputs(documents * queries, documents * keys, (2, 1), 16, torch.float32)
    offsets = (offsets_of([queries] * documents), offsets_of([keys] * documents))
    options = (5, True, None, torch.tensor([0, keys, keys // 2], dtype=torch.int32))
    gradient = None if splits else grad
    expected, _ = run((*tensors, *offsets, *options), gradient, splits=splits)
    got, _ = run((*tensors, None, None, *options, None, documents), gradient, splits=splits)
    assert_equal(got, expected)


@pytest.mark.parametrize("name", ["fwd", "bwd", "ranges_fwd"])
def test_cuda_tensors_take_triton(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"blt_kernels::block_causal_attention_{name}", "CUDA")


def test_triton_is_not_imported_with_the_package() -> None:
    code = "import sys, blt_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 32), (torch.float32, 300)])
def test_the_reference_takes_the_rest(dtype: torch.dtype, width: int) -> None:
    from blt_kernels.triton.attention_backward import block_causal_attention_bwd_cuda
    from blt_kernels.triton.block_causal_attention import block_causal_attention_fwd_cuda

    q, k, v, grad = inputs(9, 9, (2, 1), width, dtype)
    rest = (offsets_of([4, 5]), None, 3, True, None, None)
    out = block_causal_attention_fwd_cuda(q, k, v, *rest)
    expected = reference.block_causal_attention_fwd_reference(q, k, v, *rest)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    grads = block_causal_attention_bwd_cuda(grad, q, k, v, *out, *rest)
    expected = reference.block_causal_attention_bwd_reference(grad, q, k, v, *out, *rest)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(9, 2, 16)}, "q, k, v: shapes"),
        ({"v": torch.zeros(9, 1, 32).half()}, "q, k, v: expected one dtype"),
        ({"cu_seqlens_q": torch.tensor([0, 9])}, r"cu_seqlens_q: expected contiguous int32 \[2\], got torch.int64"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, r"cu_seqlens_k: expected contiguous int32 \[2\]"),
        ({"seqused_k": torch.zeros(2, dtype=torch.int32)}, r"seqused_k: expected contiguous int32 \[1\]"),
        ({"window": 0}, "window: expected a value >= 1, got 0"),
        ({name: torch.empty(0, 1 << 16, 64) for name in "qkv"}, "q: expected rows of fewer than 4194304 numbers"),
        (
            {name: torch.empty(1 << 31, 1, 32, device="meta") for name in "qkv"},
            "q, k: expected at most 2147483392 rows",
        ),
        ({"k": torch.zeros(8, 1, 32), "v": torch.zeros(8, 1, 32)}, "k: expected the 9 rows of q, got 8"),
        ({"cu_seqlens_q": None, "num_documents": 2}, "num_documents: expected a divisor of the 9 rows of q, got 2"),
        ({"cu_seqlens_q": None, "num_documents": 0}, "num_documents: expected a divisor of the 9 rows of q, got 0"),
        (
            {"cu_seqlens_q": None, "cu_seqlens_k": offsets_of([9])},
            "cu_seqlens_k: expected None without cu_seqlens_q, got a tensor",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    from blt_kernels.triton.block_causal_attention import block_causal_attention_fwd_cuda

    arguments = {name: torch.zeros(9, 1, 32) for name in "qkv"} | {
        "cu_seqlens_q": offsets_of([9]),
        "cu_seqlens_k": None,
        "window": None,
        "causal": True,
        "scale": None,
        "seqused_k": None,
    }
    with pytest.raises(ValueError, match=message):
        block_causal_attention_fwd_cuda(**{**arguments, **change})
