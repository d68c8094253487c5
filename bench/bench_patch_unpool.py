"""Benches of patch_unpool: patches of 4.5 bytes on average back to rows of 8192 bytes, against torch's indexing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
import torch.nn.functional as F
from common import assert_agree, layout_of, local_ids, name_of, name_of_pass, nbytes, normal, pad_patches, steps
from peers import patch_pool as peers
from timing import OURS, Comparison, Make
from torch import Tensor

import blt_kernels as bk


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield forward and backward of both kinds of ids."""
    shape = (2, 256, 32) if small else (8, 8192, 512 if device == "cpu" else 1024)
    for kind, dtype in (("patch", torch.float32), ("decode", torch.float32), ("patch", torch.bfloat16)):
        for backward in (False, True):
            yield partial(comparison, shape, kind, dtype, device, backward)


def comparison(shape: tuple[int, int, int], kind: str, dtype: torch.dtype, device: str, backward: bool) -> Comparison:
    rows, length, width = shape
    layout = layout_of([length] * rows, device=device)
    chosen = layout.patch_ids if kind == "patch" else layout.decode_ids
    ids, rows_ids = chosen.long(), local_ids(chosen, layout)
    y = normal(layout.capacity, width, dtype=dtype, device=device).requires_grad_(backward)
    padded = pad_patches(y, layout)
    grad = normal(rows * length, width, seed=1, dtype=dtype, device=device)

    def run(function: Callable[[], Tensor], y: Tensor = y) -> Callable[[], Any]:
        return steps(function, (y,), grad if backward else None)

    def agree(results: dict[str, Any]) -> None:
        count = int(layout.cu_patches[1])  # one row is enough
        first = y[:count].detach().double().requires_grad_(backward)
        truth = first[ids[:length]]
        if backward:
            truth = torch.autograd.grad(truth, first, grad[:length].double())[0]
            sampled = {name: [r[0][0, :count] if r[0].dim() == 3 else r[0][:count]] for name, r in results.items()}
        else:
            sampled = {name: [r[:length]] for name, r in results.items()}
        assert_agree(sampled, [truth], "index_select")

    return Comparison(
        f"patch_unpool {kind} {name_of_pass(backward)}",
        f"[{layout.capacity}, {width}] to {list(shape)}",
        name_of(dtype),
        {
            OURS: run(lambda: bk.patch_unpool(y, layout, kind)),
            "index_select": run(lambda: y.index_select(0, ids)),
            "embedding": run(lambda: F.embedding(ids, y)),
            "gather (BLT)": run(lambda: peers.gather(padded, rows_ids).flatten(0, 1), padded),
        },
        nbytes(y, grad) * (2 if backward else 1),
        timing.copies(grad),
        2 * nbytes(grad),
        agree,
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_patch_unpool(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
