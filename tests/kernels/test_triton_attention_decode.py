"""The Triton kernels of block_causal_attention in the interpreter: decoding with a cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_interpreter import NAN, check, inputs, intervals, key_intervals, tiles_visited

from blt_kernels.nn import TransformerConfig, load_ops
from blt_kernels.nn.cache import KeyCache
from blt_kernels.nn.fixed_cache import FixedKeys
from blt_kernels.testing import offsets_of
from blt_kernels.triton.block_causal_attention.launch import launch_options

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"), pytest.mark.slow]


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
    """Return random tensors for caches of 5 more rows than are used, which hold NaN, and their offsets."""
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
    first, last, _ = intervals(*tensors[:2], *offsets, window, True, seqused_k[:-1])
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
    first, last = key_intervals([1] * 63 + [400], None, [40] * 63 + [400])
    last[:63] = first[:63]
    launch = launch_options("fwd", 16, torch.float32, (9, 0))
    visited, _ = tiles_visited(first, last, launch.block_m, launch.block_n)
    assert products == {
        "block_causal_attention_fwd_kernel": 2 * visited,
        "block_causal_attention_decode_kernel": 2 * 63,
    }


@pytest.mark.parametrize("splits", [1, 3])
def test_keys_of_fixed_shapes(run: Callable, splits: int) -> None:
    """Between the documents of rows are others without queries, whose keys are NaN and are not loaded."""
    config = TransformerConfig(dim=64, num_layers=1, num_heads=4, num_kv_heads=2, window=30)
    fixed = FixedKeys(KeyCache(3, config, 0, dtype=torch.float32, device=torch.device("cpu")))
    position, start = torch.tensor([4, 47, 90]), torch.tensor([0, 40, 0])
    (layer,) = fixed.extend(load_ops("reference"), position, start)
    cu_q, cu_k = layer.documents["cu_seqlens_q"], layer.documents["cu_seqlens_k"]
    assert cu_k.diff()[1::2].tolist() == [5, 8, 30]
    tensors = inputs(3, fixed.flat[0].shape[0], (4, 2), 16, torch.float32)
    for begin, end in zip([0, *cu_k[2::2].tolist()], [*cu_k[1::2].tolist(), None], strict=True):
        for x in tensors[1:3]:
            x[begin:end] = NAN
    check(run, tensors, cu_q, cu_k, window=30, splits=splits)
    arguments = (*tensors[:3], cu_q, cu_k, 30, True, None, None)
    _, loaded = run(arguments, splits=splits, count="bytes")
    minimum = 2 * (5 + 8 + 30) * 2 * 16 * 4 + splits * tensors[0].nbytes
    assert loaded["block_causal_attention_decode_kernel"] <= 1.10 * minimum


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
