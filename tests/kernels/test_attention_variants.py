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

TESTS = Path(__file__).parents[1]
CASES = [  # lengths of documents, rows behind them, window, heads, tiles
    ([1, 33, 0, 17, 2], 0, None, 2, (32, 16)),
    ([1, 33, 0, 17, 2, 70], 9, 7, 2, (32, 16)),
    ([40, 33, 0, 17], 5, 20, 1, (64, 32)),
]


def compare(lengths: list[int], behind: int, window: int | None, heads: int, tiles: tuple[int, int]) -> None:
    """Compare all variants but that with host descriptors, which the interpreter does not take, with the reference."""
    from attention_variants import bwd_dkdv_variant, fwd_variant

    from blt_kernels.reference import block_causal_attention as reference
    from blt_kernels.testing import offsets_of
    from blt_kernels.triton.attention_ranges import ranges

    generator = torch.Generator().manual_seed(0)
    cu, width = offsets_of(lengths), 32
    documents = slice(0, sum(lengths))
    rows = documents.stop + behind
    q, k, v, grad = torch.randn(4, rows, heads, width, generator=generator)
    for x in (q, k, v, grad):
        x[documents.stop :] = math.nan
    scale = width**-0.5
    arguments = (cu, None, window, True, scale, None)
    expected_out, expected_lse = reference.block_causal_attention_fwd_reference(q, k, v, *arguments)
    saved = grad, q, k, v, expected_out, expected_lse
    _, expected_dk, expected_dv = reference.block_causal_attention_bwd_reference(*saved, *arguments)
    factor = scale * math.log2(math.e)
    sums = torch.stack([expected_lse.T * math.log2(math.e), (grad * expected_out).sum(-1).T]).contiguous()
    of_queries, of_keys = ranges(q, rows, rows, cu, None, len(lengths), window, True, None, with_keys=True)
    strides = q.stride()[:2]
    for load, specialize in ((0, False), (1, False), (1, True)):
        options = {"ROWS": tiles[0], "STEP": tiles[1], "E": width, "LOAD": load, "SPECIALIZE": specialize}
        out, dk, dv = (torch.full_like(q, math.nan) for _ in range(3))
        lse = torch.full((rows, heads), math.nan)
        grid = (-(-rows // tiles[0]), heads)
        fwd_variant[grid](
            q, k, v, out, lse, *of_queries, cu[-1:], *strides * 3, factor, scale, rows, heads, 1, **options
        )
        bwd_dkdv_variant[grid](
            q, k, v, grad, sums, *of_keys, cu[-1:], dk, dv, *strides * 4, scale, factor, rows, rows, heads, 1, **options
        )
        for actual, expected in ((out, expected_out), (lse, expected_lse), (dk, expected_dk), (dv, expected_dv)):
            torch.testing.assert_close(actual[documents], expected[documents], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_variants_compute_what_the_kernels_do() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    for case in CASES:
        compare(*case)
