"""Benches of patch_cross_attention: two vectors a patch, 16 heads, against masks and plain PyTorch.

The limit moves as many bytes as q, k and v have, into fresh memory or into what is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timing
import torch
from common import (
    assert_agree,
    layout_of,
    local_ids,
    name_of,
    name_of_pass,
    nbytes,
    normal,
    pack_patches,
    pad_patches,
    steps,
)
from peers import patch_cross_attention as peers
from timing import OURS, Comparison, Make
from torch import Tensor

import blt_kernels as bk

VECTORS, HEADS, WIDTH = 2, 16, 64
CASES = {  # (rows, direction, dtype)
    "cpu": (
        (1, "encode", torch.float32),
        (1, "decode", torch.float32),
        (4, "encode", torch.float32),
        (1, "encode", torch.bfloat16),
    ),
    "cuda": ((8, "encode", torch.bfloat16), (8, "decode", torch.bfloat16), (1, "encode", torch.float32)),
}


@dataclass(frozen=True)
class Case:
    """Rows have `length` bytes, which are read by patches (encode) or read them (decode)."""

    rows: int
    direction: str
    dtype: torch.dtype = torch.float32
    length: int = 8192


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield forward and backward of every case."""
    length = 96 if small else 8192
    for rows, direction, dtype in CASES[device]:
        for backward in (False, True):
            yield partial(comparison, Case(rows, direction, dtype, length), device, backward, compile_peers)


def comparison(case: Case, device: str, backward: bool, compile_peers: bool) -> Comparison:
    layout = layout_of([case.length] * case.rows, device=device)
    encode = case.direction == "encode"
    on_bytes, on_patches = case.rows * case.length, layout.capacity * VECTORS
    queries, keys = (on_patches, on_bytes) if encode else (on_bytes, on_patches)
    q, k, v, grad = (
        normal(size, HEADS, WIDTH, seed=seed, dtype=case.dtype, device=device)
        for seed, size in enumerate((queries, keys, keys, queries))
    )
    q, k, v = (x.requires_grad_(backward) for x in (q, k, v))

    def to_rows(x: Tensor, of_patches: bool) -> Tensor:
        if of_patches:
            return pad_patches(x, layout)
        return x.detach().unflatten(0, (case.rows, case.length)).requires_grad_(x.requires_grad)

    def from_rows(x: Tensor, of_patches: bool) -> Tensor:
        return pack_patches(x, layout) if of_patches else x.flatten(0, 1)

    in_rows = tuple(to_rows(x, of_patches) for x, of_patches in ((q, encode), (k, not encode), (v, not encode)))
    grad_in_rows = to_rows(grad, encode)
    chosen = layout.patch_ids if encode else layout.decode_ids
    ids = chosen.long()
    byte_patch = local_ids(chosen, layout)
    patches = torch.arange(int(layout.cu_patches.diff().max()), device=device)
    vector_patch = patches.repeat_interleave(VECTORS).expand(case.rows, -1)
    query_patch, key_patch = (vector_patch, byte_patch) if encode else (byte_patch, vector_patch)

    def packed(attention: peers.Attention) -> Callable[[], Any]:
        return steps(lambda: attention(q, k, v), (q, k, v), grad if backward else None)

    def rows(attention: peers.Attention) -> Callable[[], Any]:
        return steps(lambda: attention(*in_rows), in_rows, grad_in_rows if backward else None)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bk.patch_cross_attention(q, k, v, layout, direction=case.direction, queries_per_patch=VECTORS)

    gather = peers.gather_encode if encode else peers.gather_decode
    implementations = {
        OURS: packed(ours),
        "gather": packed(gather(ids, VECTORS)),
    }
    if case.rows == 1 or not backward:  # a call takes a minute otherwise
        implementations["SDPA, transformers' mask"] = rows(peers.masked_attention(query_patch, key_patch, case.dtype))
    if compile_peers and not (backward and device == "cpu"):  # flex_attention has no backward on the CPU
        implementations["flex_attention, BLT's mask"] = rows(peers.flex_attention(query_patch, key_patch))

    def agree(results: dict[str, Any]) -> None:
        exact_inputs = tuple(x[:, :1].detach().double().requires_grad_(backward) for x in (q, k, v))
        truth = gather(ids, VECTORS)(*exact_inputs)
        truths = torch.autograd.grad(truth, exact_inputs, grad[:, :1].double()) if backward else (truth,)
        sampled = {}
        for name, result in results.items():
            parts = zip(result, (encode, not encode, not encode), strict=True) if backward else [(result, encode)]
            sampled[name] = [(x if x.dim() == 3 else from_rows(x, of_patches))[:, :1] for x, of_patches in parts]
        assert_agree(sampled, truths, "gather")

    moved = nbytes(q, k, v)
    qkv = torch.empty(moved // 2, dtype=torch.bfloat16, device=device)
    return Comparison(
        f"patch_cross_attention {case.direction} {name_of_pass(backward)}",
        f"{case.rows} x {case.length} bytes, {layout.capacity} patches x {VECTORS}, {HEADS} x {WIDTH}",
        name_of(case.dtype),
        implementations,
        # Forward reads q, k, v and writes out; backward reads these four and grad_out, and writes three gradients.
        moved + nbytes(q) + (2 * moved + 2 * nbytes(q) if backward else 0),
        {"clone of q, k, v": qkv.clone, **timing.copies(qkv)},
        2 * moved,
        agree,
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_patch_cross_attention(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
