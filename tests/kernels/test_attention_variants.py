"""The variants that tests/attention_variants.py compiles compute what the kernels do, in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so the variants run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
CASES = [  # (lengths of documents, rows behind them, window, heads, tiles)
    ([1, 33, 0, 17, 2], 0, None, 2, (32, 16)),
    ([1, 33, 0, 17, 2, 70], 9, 7, 2, (32, 16)),
    ([40, 33, 0, 17], 5, 20, 1, (64, 32)),
]


def compare(lengths: list[int], behind: int, window: int | None, heads: int, tiles: tuple[int, int]) -> None:
    """Compare all variants but that with host descriptors, which the interpreter does not take, with fp64."""
    from attention_variants import bwd_dkdv_variant, fwd_variant

    from blt_kernels import block_causal_attention
    from blt_kernels.testing import offsets_of

    generator = torch.Generator().manual_seed(0)
    cu, width = offsets_of(lengths), 32
    documents = slice(0, sum(lengths))
    rows = documents.stop + behind
    q, k, v, grad = torch.randn(4, rows, heads, width, generator=generator)
    for x in (q, k, v, grad):
        x[documents.stop :] = math.nan
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected_out, expected_lse = block_causal_attention(*exact, cu, window=window, return_lse=True)
    _, expected_dk, expected_dv = torch.autograd.grad(expected_out, exact, grad.double())
    scale, log2_e = width**-0.5, math.log2(math.e)
    sums = torch.stack([expected_lse.T * log2_e, (grad * expected_out).sum(-1).T]).detach().float().contiguous()

    row, reach = torch.arange(rows), window or rows
    begin, end = (torch.repeat_interleave(x, torch.tensor(lengths)) for x in (cu[:-1], cu[1:]))
    nothing = torch.full((2, behind), rows)
    own = row[documents]
    of_queries = torch.cat([torch.stack([torch.maximum(begin, own + 1 - reach), own + 1]), nothing], 1).int()
    of_keys = torch.cat([torch.stack([own, torch.minimum(end, own + reach)]), nothing], 1).int()
    strides = q.stride()[:2]
    for load, specialize in ((0, False), (1, False), (1, True)):
        options = {"HEAD_DIM": width, "LOAD": load, "SPECIALIZE": specialize}
        tiles_of_queries = {"BLOCK_M": tiles[0], "BLOCK_N": tiles[1]}
        tiles_of_keys = {"BLOCK_N": tiles[0], "BLOCK_M": tiles[1]}
        out, dk, dv = (torch.full_like(q, math.nan) for _ in range(3))
        lse = torch.full((rows, heads), math.nan)
        grid = (-(-rows // tiles[0]), heads)
        fwd_variant[grid](
            q, k, v, out, lse, *of_queries, cu[-1:], *strides * 3, scale * log2_e, scale, rows, heads, 1,
            **tiles_of_queries, **options,
        )  # fmt: skip
        bwd_dkdv_variant[grid](
            q, k, v, grad, sums, *of_keys, cu[-1:], dk, dv, *strides * 4, scale, scale * log2_e, rows, rows, heads, 1,
            **tiles_of_keys, **options,
        )  # fmt: skip
        for actual, expected in ((out, expected_out), (lse, expected_lse), (dk, expected_dk), (dv, expected_dv)):
            torch.testing.assert_close(actual[documents], expected[documents].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_variants_compute_what_the_kernels_do() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    for case in CASES:
        compare(*case)
