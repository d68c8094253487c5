"""Triton's interpreter in a process of its own, which checks the accesses of kernels and counts what they do.

The interpreter must be chosen before Triton is imported. So kernels run in another process, which imports this module
first. There each access is checked to be within the tensors that the kernel was given, and products and bytes are
counted. The fixtures `interpreter` and `run` of tests/kernels submit `call`.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import assert_close, offsets_of
from blt_kernels.triton.block_causal_attention.launch import Launch

NAN = float("nan")
SMALL = (32, 16)  # block_m and block_n are small, so that short documents span several tiles
RAGGED = [1, 33, 0, 17, 2]
# Each has the lengths of queries and keys (those of the queries if None), and how many of the keys are used.
DOCUMENTS: dict[str, tuple[list[int], list[int] | None, list[int] | None]] = {
    "empty, one byte, a tile plus one": (RAGGED, None, None),
    "one byte each": ([1] * 40, None, None),
    "more keys than queries, and fewer": ([20, 3, 40, 0, 9], [64, 5, 9, 2, 50], None),
    "caches with room": ([20, 3, 40, 0, 9], [64, 5, 9, 2, 50], [40, 0, 9, 1, 30]),
    "nothing is used of one between others": ([3, 2, 3, 5], [16, 16, 20, 2], [16, 0, 16, 2]),
}


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
            if x.dtype.scalar != tl.bfloat16:  # the interpreter keeps bfloat16 as integers, and multiplies those
                return x
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        def multiplied(_: Any, a: Any, b: Any, *rest: Any) -> tuple:
            self.products[self.kernel] = self.products.get(self.kernel, 0) + 1
            return (as_float(a), as_float(b), *rest)

        wrap(executor, "__call__", launched)
        wrap(builder, "create_dot", multiplied)
        wrap(builder, "create_masked_load", loaded)  # loads without a mask call it too
        wrap(builder, "create_masked_store", stored)


_watch: list[Watch] = []


def start() -> None:
    assert "triton" not in sys.modules, "Triton was imported before the interpreter was chosen"
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of infinities and NaN in the tests' data
    torch.set_num_threads(1)
    _watch.append(Watch())


def call(message: bytes) -> bytes:
    """Run forward, and backward if there is a gradient; decoding splits keys in `splits` parts if that is not 0."""
    from blt_kernels.triton.block_causal_attention import backward, forward

    arguments, grad, tiles, splits, repeats, count = pickle.loads(message)
    launch = tiles and Launch(*tiles, 4, 1)
    if splits:
        launch = None
    _watch[0].products.clear()
    _watch[0].bytes.clear()
    parts = mock.patch.object(forward, "decode_splits", return_value=splits)
    results = []
    for _ in range(repeats):
        with parts if splits else nullcontext():
            out = forward.block_causal_attention_fwd_cuda(*arguments, launch=launch)
        grads: tuple[Tensor, ...] = ()
        if grad is not None:
            grads = backward.block_causal_attention_bwd_cuda(grad, *arguments[:3], *out, *arguments[3:], launch=launch)
        results.append((*out, *grads))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    return pickle.dumps((results[0], getattr(_watch[0], count)))


def call_with_ranges(message: bytes) -> bytes:
    """Run forward and backward with ranges that are given, or made before if None.

    Return these, all results, and how often ranges were written.
    """
    from blt_kernels.triton.block_causal_attention import backward, forward, ranges

    (q, k, v, cu_q, cu_k, window, causal, scale, used), grad, splits, made = pickle.loads(message)
    rest, launch = (cu_q, cu_k, window, causal, scale, used), None if splits else Launch(*SMALL, 4, 1)
    if made is None:
        made = ranges.block_causal_attention_ranges_fwd_cuda(cu_q, cu_k, q.shape[0], k.shape[0], window, causal, used)
    few = mock.patch.object(forward, "decode_splits", return_value=splits)
    writes = mock.patch.object(ranges, "_write", wraps=ranges._write)
    with few if splits else nullcontext(), writes as write:
        out = forward.block_causal_attention_fwd_cuda(q, k, v, *rest, made, launch=launch)
        grads = backward.block_causal_attention_bwd_cuda(grad, q, k, v, *out, *rest, made, launch=Launch(*SMALL, 4, 1))
    return pickle.dumps((made, (*out, *grads), write.call_count))


# --- in this process --------------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(queries: int, keys: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random q, k, v and gradient."""
    sizes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    return [randn(*size, width, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]


def intervals(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys `[first, last)` of every query, and which keys are attended to, from the reference."""
    mask = reference.AttentionMask(cu_q, cu_k, window, causal, None, seqused_k)
    first, last = mask.keys_of_queries(q.shape[0], k.shape[0])
    return first, last, reference.attended_keys(first, last, k.shape[0])


def key_intervals(lengths: list[int], window: int | None, keys: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Return the keys `[first, last)` of every query of documents of these lengths."""
    x, y = torch.empty(sum(lengths), 1, 1), torch.empty(sum(keys or lengths), 1, 1)
    return intervals(x, y, offsets_of(lengths), None if keys is None else offsets_of(keys), window)[:2]


def tiles_visited(first: Tensor, last: Tensor, block_m: int, block_n: int) -> tuple[int, int]:
    """Count the tiles of keys that a kernel takes for one head, and the fewest that could hold all unmasked pairs.

    Every query attends to the keys ``[first, last)``. The fewest are what the keys of `block_m` queries would fill
    if they lay side by side.
    """
    visited = fewest = 0
    for block in range(0, first.shape[0], block_m):
        runs: list[list[int]] = []
        ends = zip(first[block : block + block_m].tolist(), last[block : block + block_m].tolist(), strict=True)
        for begin, end in ends:
            if begin >= end:
                continue
            if runs and begin <= runs[-1][1]:
                runs[-1][1] = max(end, runs[-1][1])
            else:
                runs.append([begin, end])
        visited += sum(-(-(end - begin) // block_n) for begin, end in runs)
        fewest += -(-sum(end - begin for begin, end in runs) // block_n)
    return visited, fewest


def flash_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Return gradients with weights exp(s - lse) and sum(g * out), from rounded `lse` and `out`, as in the kernels.

    The reference makes both anew from the scores, so its errors are smaller where gradients cancel. The scores are
    summed in another order than those of `lse`, as the interpreter's products may be: that depends on the machine.
    """
    accumulator, factor = lse.dtype, q.shape[-1] ** -0.5 if rest[4] is None else rest[4]
    first, last, attended = intervals(q, k, *rest[:4], rest[5])
    rows = (first < last)[:, None, None]
    grad, q, out = (torch.where(rows, x, 0).to(accumulator) for x in (grad, q, out))
    keys, values = (torch.where(attended[:, None, None], x, 0).to(accumulator) for x in (k, v))
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
    key = torch.arange(k.shape[0])
    unmasked = (first[:, None] <= key) & (key < last[:, None])
    scores = torch.einsum("qhe,khe->hqk", (q * factor).flip(-1), keys.flip(-1))
    p = (scores - lse.T[..., None]).exp().where(unmasked, 0)
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
