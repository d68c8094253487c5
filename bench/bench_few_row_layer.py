"""Bench of few_row_layer: a stack of transformer layers over a few cached rows, beside the parts one by one.

It is for the CPU only. ``bench_generate.py`` measures whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
from common import nbytes, normal
from timing import OURS, Comparison, Make
from torch import Tensor

from blt_kernels.models.quantized import STORED
from blt_kernels.nn import QuantizedLinear, TransformerConfig, TransformerLayer, load_ops, rotary_table, run_layers
from blt_kernels.nn.cache import KeyCache

# These are layers of a local and of a global model. Together their weights exceed a core's cache.
CONFIGS = (TransformerConfig(256, 12, 4, ffn_dim=682), TransformerConfig(512, 8, 8, ffn_dim=1408))
ROWS = (1, 4, 8, 16)
CACHED = 128  # each row has so many keys
PARTS = "part by part"


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield stacks of two widths with weights of each dtype, for several numbers of rows."""
    if device != "cpu":
        return
    for config in (TransformerConfig(16, 2, 2, ffn_dim=24),) if small else CONFIGS:
        for weights in (None, *STORED):
            for rows in (2,) if small else ROWS:
                yield partial(stack, config, rows, weights)


def stack(config: TransformerConfig, rows: int, weights: str | None) -> Comparison:
    """Compare layers that run in one call with the same layers, whose parts run one by one."""
    ops = load_ops("fused")
    torch.manual_seed(0)
    ours, parts = (
        [TransformerLayer(config, ops).requires_grad_(False) for _ in range(config.num_layers)] for _ in "ab"
    )
    for own, other in zip(ours, parts, strict=True):
        other.load_state_dict(own.state_dict())
    if weights is not None:
        for layer in (*ours, *parts):
            for module in (layer.self_attn, layer.mlp):
                for name, matrix in list(module.named_children()):
                    setattr(module, name, QuantizedLinear(matrix, STORED[weights]))
    for layer in parts:
        layer.mlp.register_forward_hook(lambda *_: None)  # a layer with a hook runs its modules
    cache = KeyCache(rows, config, 64, dtype=torch.float32, device=torch.device("cpu"))
    cache.extend(ops, [CACHED] * rows, [[0]] * rows)
    keys = cache.extend(ops, [1] * rows, [[0]] * rows)
    table = rotary_table(torch.full((rows,), CACHED), config, torch.float32)
    x = normal(rows, config.dim)

    def run(layers: list[Any]) -> Tensor:
        return run_layers(layers, x, table, keys)

    def agree(results: dict[str, Any]) -> None:
        torch.testing.assert_close(results[OURS], results[PARTS], rtol=1e-4, atol=1e-4)

    matrices = [x for layer in ours for x in (*layer.parameters(), *layer.buffers())]
    work = nbytes(*matrices) + nbytes(*cache.flat) * (CACHED + 1) // cache.capacity
    implementations = {OURS: partial(run, ours), PARTS: partial(run, parts)}
    floats = [x for x in matrices if x.is_floating_point()]
    limits = {"read the weights": lambda: [x.sum() for x in floats]}
    shape = f"{rows} rows behind {CACHED}, {config.num_layers} layers of {config.dim}"
    dtype = f"{weights or 'fp32'} weights"
    return Comparison("few_row_layer", shape, dtype, implementations, work, limits, nbytes(*floats), agree)


def remarks(rows: list[timing.Row]) -> list[str]:
    """Say how many times as fast as its parts each stack is."""
    return [
        f"{row.op}, {row.shape}, {row.dtype}, {row.threads} threads: {row.ratio_to_best_peer:.2f} times as fast"
        for row in rows
        if row.implementation == OURS and row.ratio_to_best_peer
    ]


def test_few_row_layer(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
