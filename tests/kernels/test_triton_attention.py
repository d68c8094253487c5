"""The Triton kernels of block_causal_attention in the interpreter against the reference: shapes, masks, strides."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_interpreter import DOCUMENTS, NAN, RAGGED, SMALL, check, inputs, intervals, randn

from blt_kernels.testing import assert_equal, offsets_of

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"), pytest.mark.slow]


FACTORS: dict[str, tuple] = {
    "width": (20, 32, 64, 96, 128, 192, 256),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "window": (None, 1, 16, 25),
    "causal": (True, False),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "documents": tuple(DOCUMENTS),
}


def pairwise(factors: dict[str, tuple]) -> list[tuple]:
    """Return few combinations with every pair of values of two factors, found greedily and always the same."""
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
                    key=lambda x: sum(  # counts the missing pairs that x would cover
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
    """Every head width meets every group count, window, alignment, dtype and ragged shape, and so on for each pair.

    There are five rows beyond the last document. What no query attends to holds NaN.
    """
    queries, keys, used = DOCUMENTS[documents]
    cu_q, cu_k = offsets_of(queries), None if keys is None else offsets_of(keys)
    seqused_k = None if used is None else torch.tensor(used, dtype=torch.int32)
    tensors = inputs(sum(queries) + 5, sum(keys or queries) + 5, heads, width, dtype)
    first, last, attended = intervals(*tensors[:2], cu_q, cu_k, window, causal, seqused_k)
    for x in (tensors[0], tensors[3]):
        x[first >= last] = NAN
    for x in tensors[1:3]:
        x[~attended] = NAN
    (out, lse, *_), _ = check(run, tensors, cu_q, cu_k, window=window, causal=causal, seqused_k=seqused_k)
    assert not out[first >= last].any()
    assert (lse[first >= last] == -torch.inf).all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_long_window_is_none(run: Callable, causal: bool) -> None:
    """Documents may have more queries than keys, whose positions are then negative, or a cache."""
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


@pytest.mark.parametrize("window", [None, 1, 31, 64, 100])
def test_documents_of_all_lengths_at_edges_of_tiles(run: Callable, window: int | None) -> None:
    """Tiles that are whole for some rows, for all that have keys, and for none; rows without any at the end."""
    lengths = [1, 300, 2, 64, 63, 0, 128, 65, 17]
    tensors = inputs(sum(lengths) + 40, sum(lengths) + 40, (2, 1), 32, torch.float32)
    for x in tensors:
        x[sum(lengths) :] = NAN
    check(run, tensors, offsets_of(lengths), window=window, tiles=(64, 32))


def test_launches_as_on_hopper(run: Callable) -> None:
    """The tiles are those of `launch_options`."""
    check(run, inputs(300, 300, (1, 1), 64, torch.bfloat16), offsets_of([170, 1, 129]), window=100, tiles=None)


def test_many_tiny_documents(run: Callable) -> None:
    lengths = [1] * 100 + [n % 4 for n in range(60)]
    total = sum(lengths)
    _, products = check(run, inputs(total, total, (1, 1), 16, torch.float32), offsets_of(lengths))
    assert products["block_causal_attention_fwd_kernel"] <= 2 * -(-total // SMALL[0]) * (SMALL[0] // SMALL[1] + 1)


def test_strides(run: Callable) -> None:
    """Slices of one projection, heads before bytes, and a width that is not the last dimension."""
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
