"""Times block_causal_attention on the documents of BASELINES, beside what torch itself has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timing
import torch
from common import assert_agree, name_of, name_of_pass, normal, steps
from peers import block_causal_attention as peers
from timing import OURS, Comparison, Make
from torch import Tensor

import blt_kernels as bk
from blt_kernels.testing import offsets_of

DOCUMENTS = [1098, 315, 5504, 375, 118, 782]
SMALL = [40, 1, 0, 75]
HEADS, KV_HEADS, WIDTH, WINDOW = 16, 4, 64, 512


@dataclass(frozen=True)
class Case:
    """Documents have these `lengths`. Queries attend to all keys before them or to the last `window`."""

    lengths: list[int]
    window: int | None = None
    key_heads: int = HEADS
    dtype: torch.dtype = torch.float32
    heads: int = HEADS
    width: int = WIDTH


CASES = {  # each has the passes that are measured: backward or not
    "cpu": (
        (Case(DOCUMENTS), (False, True)),
        (Case(DOCUMENTS, dtype=torch.bfloat16), (False, True)),
        (Case(DOCUMENTS, window=WINDOW), (False, True)),
        (Case(DOCUMENTS, key_heads=KV_HEADS), (False,)),
    ),
    "cuda": (
        (Case([8192] * 2, dtype=torch.bfloat16, width=128), (False, True)),
        (Case([32768], dtype=torch.bfloat16, width=128, key_heads=KV_HEADS), (False, True)),
        (Case(DOCUMENTS * 4, dtype=torch.bfloat16, width=128), (False, True)),
        (Case([16384] * 2, window=WINDOW, dtype=torch.bfloat16), (False, True)),
        (Case(DOCUMENTS), (False,)),
        (Case([1] * 100_000, dtype=torch.bfloat16), (False,)),
        (Case([1, 2] * 50_000, dtype=torch.bfloat16), (False, True)),
    ),
}
# Local layers of MegaByte have a document for each patch: MEGABYTE-pytorch's have one byte more than the patch.
PADDED = [(512, 5), (64, 9)]  # documents, and bytes of each
PADDED_HEADS = 8
ROOM = 8192  # a cache has room for so many keys
USED = [ROOM * (n % 8 + 1) // 8 - n for n in range(64)]
BLOCK = 512  # fp64 takes so many queries at a time
MAX_BYTES_OF_A_MASK = 10_000
MAX_DOCUMENTS_OF_A_LOOP = 1000


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield forward and backward, whole and windowed, and a step of decoding."""
    for case, passes in CASES[device]:
        if small:
            case = replace(case, lengths=SMALL, window=case.window and 16)
        for backward in passes:
            yield partial(comparison, case, device, backward, compile_peers)
    if device == "cpu":
        for documents, length in [(3, 4)] if small else PADDED:
            for dtype in (torch.float32, torch.bfloat16):
                for heads_outside in (False, True):
                    for backward in (False, True):
                        yield partial(padded, documents, length, dtype, heads_outside, backward)
    if device == "cuda":
        yield partial(decoding, [60, 1, 33] if small else USED, 64 if small else ROOM, device)


def exact(
    inputs: Sequence[Tensor], lengths: Sequence[int], window: int | None, grad: Tensor | None = None
) -> list[Tensor]:
    """Return the output in fp64, or the gradients of q, k and v; `BLOCK` queries at a time take memory O(BLOCK * T)."""
    q, k, v = (x.detach().double() for x in inputs)
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    results = [torch.zeros_like(x) for x in ((q,) if grad is None else (q, k, v))]
    counts = torch.tensor(lengths)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts).to(q.device)
    position = torch.arange(q.shape[0], device=q.device)
    first = torch.maximum(starts, position + 1 - (window or q.shape[0]))
    for begin in range(0, q.shape[0], BLOCK):
        end = min(begin + BLOCK, q.shape[0])
        rows, keys = slice(begin, end), slice(int(first[begin]), end)  # the first key never falls from row to row
        own, values = (x[keys].repeat_interleave(group, 1) for x in (k, v))
        masked = (position[keys] > position[rows, None]) | (position[keys] < first[rows, None])
        p = (torch.einsum("qhe,khe->hqk", q[rows], own) * scale).masked_fill_(masked, -math.inf).softmax(-1)
        if grad is None:
            results[0][rows] = torch.einsum("hqk,khe->qhe", p, values)
            continue
        grad_out = grad[rows].double()
        grad_p = torch.einsum("qhe,khe->hqk", grad_out, values)
        grad_s = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * scale
        results[0][rows] = torch.einsum("hqk,khe->qhe", grad_s, own)
        for result, weights, other in ((results[1], grad_s, q[rows]), (results[2], p, grad_out)):
            result[keys] += torch.einsum("hqk,qhe->khe", weights, other).unflatten(1, (-1, group)).sum(2)
    return results


def made(
    factories: dict[str, Callable[[], Callable[[], Any]]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Return the implementations, and why a peer cannot be made here."""
    failures: dict[str, str] = {}
    implementations = timing.run_each(factories, failures)
    return implementations, failures


def comparison(case: Case, device: str, backward: bool, compile_peers: bool) -> Comparison:
    lengths, window, size = case.lengths, case.window, sum(case.lengths)
    q, k, v, grad = (
        normal(size, heads, case.width, seed=seed, dtype=case.dtype, device=device)
        for seed, heads in enumerate((case.heads, case.key_heads, case.key_heads, case.heads))
    )
    inputs = tuple(x.requires_grad_(backward) for x in (q, k, v))
    cu_seqlens = offsets_of(lengths, device=device)

    def run(attention: Callable[..., Tensor]) -> Callable[[], Any]:
        return steps(lambda: attention(*inputs), inputs, grad if backward else None)

    loops = len(lengths) <= MAX_DOCUMENTS_OF_A_LOOP
    eager = "SDPA by document" if loops else "plain PyTorch"
    one_by_one = peers.attention_by_document(lengths, window) if loops else peers.plain_attention(cu_seqlens, window)
    factories = {
        OURS: lambda: run(lambda q, k, v: bk.block_causal_attention(q, k, v, cu_seqlens, window=window)),
        eager: lambda: run(one_by_one),
    }
    if size <= MAX_BYTES_OF_A_MASK:
        factories["SDPA, dense mask"] = lambda: run(peers.masked_attention(cu_seqlens, window))
    if device == "cuda" and case.dtype != torch.float32:
        factories["varlen_attn"] = lambda: run(peers.varlen_attention(cu_seqlens, window))
        factories["set_attention_backend('flash')"] = lambda: run(peers.delegated_attention(cu_seqlens, window=window))
        if len(set(lengths)) == 1 and window is None and loops:
            factories["SDPA, cuDNN"] = lambda: run(peers.cudnn_attention(lengths))
    if compile_peers and not (backward and device == "cpu"):  # flex_attention has no backward on the CPU
        factories["flex_attention"] = lambda: run(peers.flex_attention(cu_seqlens, window))
    grouping = f"{case.heads}/{case.key_heads} heads, " if case.key_heads != case.heads else ""
    shape = f"{f'window {window}, ' if window else ''}{grouping}{list(q.shape)} in {len(lengths)} documents"
    implementations, failures = made(factories)
    pairs = sum(min(i + 1, window or n) for n in lengths for i in range(n))
    # Forward has 2 products, backward 5 more, one of which makes the scores anew.
    flops = (14 if backward else 4) * pairs * case.heads * case.width
    side = 128 if lengths == SMALL else 8192 if device == "cuda" else 2048
    square = normal(side, side, dtype=case.dtype, device=device)

    def agree(results: dict[str, Any]) -> None:
        # Only the first key head and its query heads are compared: fp64 takes longer for all than the measurement.
        heads = (case.heads // case.key_heads, 1, 1)
        sampled = [x[:, :n] for x, n in zip(inputs, heads, strict=True)]
        truth = exact(sampled, lengths, window, grad[:, : heads[0]] if backward else None)
        if backward:
            shown = {name: [x[:, :n] for x, n in zip(r, heads, strict=True)] for name, r in results.items()}
        else:
            shown = {name: [r[:, : heads[0]]] for name, r in results.items()}
        assert_agree(shown, truth, eager)

    return Comparison(
        f"block_causal_attention {name_of_pass(backward)}",
        shape,
        name_of(case.dtype),
        implementations,
        flops,
        {"torch.mm": lambda: square @ square},
        2 * side**3,
        agree,
        unit="flop",
        device=device,
        failures=failures,
    )


def padded(documents: int, length: int, dtype: torch.dtype, heads_outside: bool, backward: bool) -> Comparison:
    """Compare many documents of one length; with `heads_outside` they are ``[B, H, S, E]`` in memory."""
    sizes = (documents, length, PADDED_HEADS, WIDTH)
    q, k, v, grad = (normal(*sizes, seed=seed, dtype=dtype) for seed in range(4))
    if heads_outside:
        q, k, v, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad))
    inputs = tuple(x.requires_grad_(backward) for x in (q, k, v))

    def run(attention: Callable[..., Tensor]) -> Callable[[], Any]:
        return steps(lambda: attention(*inputs), inputs, grad if backward else None)

    def agree(results: dict[str, Any]) -> None:
        packed = [x.detach().flatten(0, 1) for x in inputs]
        truth = exact(packed, [length] * documents, None, grad.flatten(0, 1) if backward else None)
        shown = {
            name: [x.flatten(0, 1) for x in (result if backward else [result])] for name, result in results.items()
        }
        assert_agree(shown, truth, "SDPA")

    side = 128 if documents < 64 else 1024
    square = normal(side, side, dtype=dtype)
    pairs = documents * length * (length + 1) // 2
    return Comparison(
        f"block_causal_attention {name_of_pass(backward)}",
        f"{list(sizes)}{', heads outside' if heads_outside else ''} in {documents} documents",
        name_of(dtype),
        {OURS: run(bk.block_causal_attention), "SDPA": run(peers.causal_attention)},
        (14 if backward else 4) * pairs * PADDED_HEADS * WIDTH,
        {"torch.mm": lambda: square @ square},
        2 * side**3,
        agree,
        unit="flop",
    )


def decoding(used: list[int], room: int, device: str) -> Comparison:
    """Compare a step of decoding: one new query a sequence reads the `used` keys of a cache of `room`."""
    heads, kv_heads, width, count = 32, 8, 128, len(used)
    q = normal(count, heads, width, dtype=torch.bfloat16, device=device)
    k, v = (normal(count * room, kv_heads, width, seed=n, dtype=torch.bfloat16, device=device) for n in (1, 2))
    queries, keys = (offsets_of([n] * count, device=device) for n in (1, room))
    seqused_k = torch.tensor(used, dtype=torch.int32, device=device)
    with_cache = peers.attention_with_cache(used, room)

    def agree(results: dict[str, Any]) -> None:
        truth = with_cache(q.double(), k.double(), v.double())
        assert_agree({name: [result] for name, result in results.items()}, [truth], "SDPA by document")

    shape = f"{count} queries, {heads}/{kv_heads} heads x {width}, caches of {sum(used)} keys in {count} x {room}"

    def run(attention: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: attention(q, k, v)

    delegated = peers.delegated_attention(queries, cu_seqlens_k=keys, seqused_k=seqused_k)
    factories = {
        OURS: lambda: lambda: bk.block_causal_attention(q, k, v, queries, keys, seqused_k=seqused_k),
        "SDPA by document": lambda: run(with_cache),
        "varlen_attn": lambda: run(peers.varlen_attention(queries, None, keys, seqused_k)),
        "set_attention_backend('flash')": lambda: run(delegated),
    }
    implementations, failures = made(factories)
    moved = 2 * sum(used) * kv_heads * width * q.element_size()
    copied = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    return Comparison(
        "block_causal_attention decode",
        shape,
        name_of(q.dtype),
        implementations,
        moved,
        timing.copies(copied),
        moved,
        agree,
        device=device,
        failures=failures,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_block_causal_attention(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
