"""A decoding step on the CPU: attention to caches, short documents, and products of few rows with weights.

The limit is reading keys and values, or the weights, once: in the cache that they are in. ``bench/notes/generation.md``
has results. Run as a script, it prints CPU times of one thread: the smallest of 25 rounds, in which the implementations
take turns. Other processes disturb them less than the time on the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bench_few_row_linear
import timing
import torch
import torch.nn.functional as F
from common import assert_agree, name_of, nbytes, normal
from timing import OURS, Comparison, Make

import blt_kernels as bk
from blt_kernels._checks import Documents
from blt_kernels.models import ByteLM
from blt_kernels.testing import offsets_of

CACHES = (  # (documents, queries of each, keys of each, heads, width)
    (1, 1, 128, 8, 64),
    (1, 1, 512, 8, 64),
    (1, 1, 4096, 8, 64),
    (1, 4, 512, 8, 64),
    (1, 8, 512, 8, 64),
    (1, 16, 512, 8, 64),
    (8, 1, 512, 8, 64),
    (64, 1, 512, 8, 64),
    (8, 8, 512, 8, 64),
    (1, 1, 512, 4, 64),
    (1, 1, 512, 16, 64),
    (1, 1, 512, 2, 128),
)
SHORT = ((512, 5), (64, 9))  # (documents, their length)
ROWS = (1, 2, 4, 8, 16)
NO_EAGER = ""  # torch's own products have no eager version to be judged by
ROOM = 64  # a cache has room for so many more keys


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield attention of few queries, products of few rows, and a forward of few bytes; on the CPU only."""
    if device != "cpu":
        return
    for dtype in (torch.float32, torch.bfloat16):
        for documents, queries, keys, heads, width in CACHES[:1] if small else CACHES:
            yield partial(cached, documents, queries, keys, heads, width, dtype)
        for documents, length in ((3, 5),) if small else SHORT:
            yield partial(cached, documents, length, length, 8, 64, dtype, room=0)
    yield from bench_few_row_linear.comparisons(small=small)
    for rows in ROWS[:1] if small else ROWS:
        yield partial(few_bytes, rows)


def cached(
    documents: int, queries: int, keys: int, heads: int, width: int, dtype: torch.dtype, room: int = ROOM
) -> Comparison:
    """Compare attention of the last `queries` of each document with one padded call of torch's."""
    q = normal(documents, queries, heads, width, dtype=dtype)
    k, v = (normal(documents, keys + room, heads, width, seed=i, dtype=dtype) for i in (1, 2))
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    ends = [Documents(offsets_of([n] * documents), documents * n, documents * n) for n in (queries, keys + room)]
    used = torch.full((documents,), keys, dtype=torch.int32)
    mask = None
    if queries > 1:
        mask = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries

    heads_first = [x.transpose(1, 2) for x in (q, k[:, :keys], v[:, :keys])]
    sdpa = partial(F.scaled_dot_product_attention, attn_mask=mask)

    def agree(results: dict[str, Any]) -> None:
        truth = sdpa(*(x.double() for x in heads_first)).transpose(1, 2).flatten(0, 1)
        theirs = results["SDPA"].transpose(1, 2).flatten(0, 1)
        assert_agree({OURS: [results[OURS]], "SDPA": [theirs]}, [truth], "SDPA")

    work = 2 * documents * keys * heads * width * q.element_size()
    read = torch.zeros(work // 4)
    shape = f"{documents} documents, {queries} queries, {keys} keys, {heads} x {width}"
    implementations = {
        OURS: lambda: bk.block_causal_attention(*packed, *ends, seqused_k=used),
        "SDPA": lambda: sdpa(*heads_first),
    }
    return Comparison("decode attention", shape, name_of(dtype), implementations, work, timing.reads(read), work, agree)


def few_bytes(rows: int) -> Comparison:
    """Compare a forward of the bundled `ByteLM` on rows of one byte with its matrix products alone."""
    model = ByteLM.bundled().requires_grad_(False)
    tokens = torch.arange(70, 70 + rows)[:, None]
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "embed_tokens.weight"]
    inputs = {width: normal(rows, width) for width in {w.shape[1] for w in matrices}}

    def agree(results: dict[str, Any]) -> None:
        truth = ByteLM.bundled().requires_grad_(False).double()(tokens)
        assert_agree({OURS: [results[OURS]]}, [truth], NO_EAGER)

    implementations = {
        OURS: lambda: model(tokens),
        "its products": lambda: [F.linear(inputs[w.shape[1]], w) for w in matrices],
    }
    limits, work = {"read the weights": lambda: [w.sum() for w in matrices]}, nbytes(*matrices)
    return Comparison(
        "decode ByteLM.bundled()", f"{rows} rows of a byte", "float32", implementations, work, limits, work, agree
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Say how many times as long the peer takes, for each shape."""
    return [
        f"{row.op}, {row.shape}, {row.dtype}, {row.threads} threads: {row.ratio_to_best_peer:.2f} times as fast, "
        f"{row.share_of_limit:.0%} of the limit"
        for row in rows
        if row.implementation == OURS and row.ratio_to_best_peer
    ]


def test_decode(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()


def print_cpu_times(rounds: int = 25, seconds: float = 4e-3) -> None:
    """Print the CPU time of a call in us for each comparison, and how many times as long the best peer takes."""
    torch.set_num_threads(1)
    for make in comparisons():
        comparison = make()
        comparison.agree({name: function() for name, function in comparison.implementations.items()})
        functions = comparison.implementations | comparison.limits
        repeats = {name: max(1, math.ceil(seconds / cpu_time(f, 1))) for name, f in functions.items()}
        times = dict.fromkeys(functions, math.inf)
        for _ in range(rounds):
            for name, function in functions.items():
                times[name] = min(times[name], cpu_time(function, repeats[name]))
        ours, theirs = times[OURS], min(times[name] for name in comparison.implementations if name != OURS)
        limit = min(times[name] for name in comparison.limits)
        print(
            f"{comparison.op}, {comparison.shape}, {comparison.dtype}: {ours * 1e6:.1f} us, peer {theirs * 1e6:.1f}, "
            f"ratio {theirs / ours:.2f}; limit {limit * 1e6:.1f}",
            flush=True,
        )


def cpu_time(function: Callable[[], Any], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - start) / repeats


if __name__ == "__main__":
    print_cpu_times()
