"""Times whole models: BLT with weights of transformers, forward and training, beside transformers' own."""

from __future__ import annotations

import inspect
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
from common import name_of_pass, normal
from peers import models as peers
from timing import OURS, Comparison, Make
from torch import Tensor

from blt_kernels.flops import Rows, count_flops
from blt_kernels.ids import to_ids

PATCH_SIZE = 4.5


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield forward, and forward with backward, on rows of real text."""
    for rows, length in ((2, 64),) if small else ((2, 1024), (1, 8192)):
        for backward in (False, True):
            yield partial(comparison, rows, length, device, backward, small)


def comparison(rows: int, length: int, device: str, backward: bool, small: bool) -> Comparison:
    tokens = text(rows, length).to(device)
    theirs = peers.transformers_blt(tokens, PATCH_SIZE, peers.SMALLEST if small else peers.SMALL)
    if theirs is None:
        raise ImportError("the benches of models compare with transformers: pip install transformers")
    ours = peers.with_weights_of(theirs, device)
    parameters = sum(x.numel() for x in ours.parameters())
    trained = {name: x for name, x in ours.named_parameters() if not name.startswith("patcher.")}
    named = {name.removeprefix("model."): x for name, x in theirs.named_parameters()}
    pairs = [(x, named[name]) for name, x in trained.items()]

    def run_ours() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [ours(tokens)]
        loss = ours.loss(tokens) * math.log(2)  # transformers has the loss in nats
        return [loss.detach(), *torch.autograd.grad(loss, [x for x, _ in pairs])]

    def run_theirs() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [theirs(tokens, use_cache=False).logits]
        loss = theirs(tokens, labels=tokens, use_cache=False).loss
        return [loss.detach(), *torch.autograd.grad(loss, [x for _, x in pairs])]

    def agree(results: dict[str, Any]) -> None:
        mine, other = results.values()
        for number, (x, y) in enumerate(zip(mine, other, strict=True)):
            error = float((x - y).norm() / y.norm())
            assert error < 1e-3, f"result {number}: relative error {error:.2e}"

    square = normal(2048, 2048, device=device)
    flops = count_flops(ours.config, Rows.of(ours.patch(tokens)))
    return Comparison(
        f"BLT {name_of_pass(backward)}",
        f"{parameters / 1e6:.1f}M parameters, [{rows}, {length}] in patches of {PATCH_SIZE}",
        "float32",
        {OURS: run_ours, "transformers": run_theirs},
        round(flops.total.forward * (3 if backward else 1) + flops.patcher),
        {"matmul": lambda: square @ square},
        2 * 2048**3,
        agree,
        unit="flop",
        device=device,
    )


def text(rows: int, length: int) -> Tensor:
    """Return ids ``[rows, length]``: every row is the beginning of another module of the standard library."""
    modules = (statistics, tempfile)
    return torch.stack([to_ids(inspect.getsource(module).encode()[:length]) for module in modules[:rows]])


def remarks(rows: list[timing.Row]) -> list[str]:
    """Say how much less memory ours holds than transformers' model."""
    held = {(row.op, row.shape, row.implementation): row.extra_mb for row in rows if row.extra_mb is not None}
    return [
        f"{op}, {shape}: {mb:.0f} MB beyond the weights, {mb / held[op, shape, 'transformers']:.0%} of transformers'"
        for (op, shape, name), mb in held.items()
        if name == OURS
    ]


def test_models(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
