"""Counts the bytes that emulated CUDA kernels move beside the fewest that could do: ``python tests/traffic_table.py``.

It writes docs/contribute/traffic.csv, which a picture of the documentation shows.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from backends import emulator, traffic

import blt_kernels as bk
from blt_kernels.testing import offsets_of, ragged_layout, ragged_logits

TABLE = Path(__file__).resolve().parents[1] / "docs" / "contribute" / "traffic.csv"
COLUMNS = ("op", "minimum", "moved")


def calls() -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Yield names, calls and the bytes that each call has to read and write once."""
    rows, dtype = 512, torch.bfloat16
    layout = ragged_layout(rows).compact()
    x, y = torch.randn(rows, 512).to(dtype), torch.randn(layout.capacity, 512).to(dtype)
    logits, cu_seqlens = ragged_logits((rows, 260), dtype=dtype), offsets_of([200, 0, 300, 12])
    layout_bytes, ids = rows * (4 + 4 + 4 + 4), 8 * layout.capacity
    yield (
        "entropy_patch",
        lambda: bk.entropy_patch(logits, cu_seqlens, threshold=1.3),
        logits.nbytes + rows * 12 + layout_bytes,
    )
    for reduce in ("max", "mean"):
        yield f"patch_pool {reduce}", lambda r=reduce: bk.patch_pool(x, layout, r), x.nbytes + y.nbytes + ids
    yield "patch_unpool", lambda: bk.patch_unpool(y, layout), x.nbytes + y.nbytes + 4 * rows
    p = torch.rand(rows)
    yield "ema_scan", lambda: bk.ema_scan(x, p), 2 * x.nbytes + p.nbytes
    tokens, tables = torch.randint(4, 260, (rows,)), torch.ones(6 * 5000, 512, dtype=dtype)
    byte_table = torch.ones(260, 512, dtype=dtype)
    yield (
        "ngram_hash_embed",
        lambda: bk.ngram_hash_embed(tokens, tables, byte_table),
        tokens.nbytes + (6 + 1 + 1) * x.nbytes,
    )
    q, k = (torch.randn(n, 8, 64).to(dtype) for n in (2 * layout.capacity, rows))
    yield (
        "patch_cross_attention",
        lambda: bk.patch_cross_attention(q, k, k.clone(), layout, direction="encode", queries_per_patch=2),
        2 * q.nbytes + 2 * k.nbytes + 4 * q.shape[0] * q.shape[1],
    )


def measure() -> list[dict[str, str]]:
    """Return the rows of the table."""
    emulator()
    torch.manual_seed(0)
    with torch.no_grad():
        return [
            dict(zip(COLUMNS, (name, str(minimum), str(traffic(call))), strict=True)) for name, call, minimum in calls()
        ]


def read() -> list[dict[str, str]]:
    """Return the rows that are stored."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    with TABLE.open("w", newline="") as output:
        writer = csv.DictWriter(output, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(measure())
