"""The Triton kernels of block_causal_attention in the interpreter: intervals, tiles, wrong offsets and ranges."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from triton_interpreter import DOCUMENTS, SMALL, call_with_ranges, inputs, key_intervals, tiles_visited

from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import assert_equal, document_lengths, offsets_of

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"), pytest.mark.slow]


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


@pytest.mark.parametrize(("window", "keys"), [(None, None), (9, None), (9, [50, 60, 3, 40])])
def test_tiles_are_counted_as_they_are_visited(run: Callable, window: int | None, keys: list[int] | None) -> None:
    lengths = [40, 1, 3, 50]
    tensors = inputs(94, sum(keys or lengths), (1, 1), 16, torch.float32)
    cu_k = None if keys is None else offsets_of(keys)
    _, products = run((*tensors[:3], offsets_of(lengths), cu_k, window, True, None, None))
    visited, fewest = tiles_visited(*key_intervals(lengths, window, keys), *SMALL)
    assert products["block_causal_attention_fwd_kernel"] == 2 * visited
    assert fewest <= visited


@pytest.mark.parametrize("tiles", [(128, 128), (128, 64), (64, 32)])
def test_few_more_tiles_than_necessary_are_visited(tiles: tuple[int, int]) -> None:
    ragged = document_lengths(20000, seed=3)
    keys = [n + 3 for n in ragged]
    for window in (None, 512):
        for others in (None, keys):
            visited, fewest = tiles_visited(*key_intervals(ragged, window, others), *tiles)
            assert visited <= 1.15 * fewest
    visited, fewest = tiles_visited(*key_intervals([1] * 100_000, None), *tiles)
    assert visited <= 2 * fewest


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("window", "causal"), [(None, True), (7, True), (7, False)])
def test_ranges_made_before(
    interpreter: ProcessPoolExecutor, run: Callable, documents: str, window: int | None, causal: bool
) -> None:
    lengths, keys, used = DOCUMENTS[documents]
    cu_q, cu_k = offsets_of(lengths), None if keys is None else offsets_of(keys)
    used_k = None if used is None else torch.tensor(used, dtype=torch.int32)
    totals = [sum(n) + 3 for n in (lengths, keys or lengths)]  # 3 rows lie beyond the documents
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
HOSTILE = {  # rows take these (first, last) in turn; there are 40 queries and 50 keys
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
    from blt_kernels.triton.block_causal_attention.ranges import ranges

    mask = reference.AttentionMask(offsets_of([6]), None, None, True, None, None, torch.zeros(24, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ranges: expected contiguous int32 \[32\], got torch.int32 \[24\]"):
        ranges(mask, torch.empty(6, 1, 32), torch.empty(6, 1, 32))
