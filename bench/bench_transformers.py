"""Times transformers' BLT with our ops under it beside the same model without, and what is replaced alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import timing
import torch
from bench_models import PATCH_SIZE, text
from common import layout_of, local_ids, name_of_pass, nbytes, normal, ragged_entropies, steps
from peers import models as peers
from timing import OURS, Comparison, Make
from torch import Tensor, nn

from blt_kernels.flops import Rows, count_flops
from blt_kernels.integrations import transformers as integration

STOCK, NORMS = "transformers", "blt_kernels, norms"
HASH_SIZES = [3, 4, 5, 6, 7, 8]


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield whole models, then patch lengths, pooling and the hash embedding by themselves."""
    for rows, length in ((1, 64),) if small else ((1, 4096), (2, 1024)):
        for backward in (False, True):
            yield partial(model, rows, length, backward, small, device)
    yield partial(patch_lengths, 2 if small else 8, 64 if small else 8192, device)
    for backward in (False, True):
        shape = (2, 64, 16) if small else (4, 4096, 1024)
        yield partial(pooling, shape, backward, device)
    for backward in (False, True):
        yield partial(
            hash_embedding, (2, 64, 16) if small else (4, 4096, 512), 53 if small else 100002, backward, device
        )


def model(rows: int, length: int, backward: bool, small: bool, device: str) -> Comparison:
    tokens = text(rows, length).to(device)
    stock = peers.transformers_blt(tokens, PATCH_SIZE, peers.SMALLEST if small else peers.MEDIUM)
    if stock is None:
        raise ImportError("the benches of integrations compare with transformers: pip install transformers")
    own = peers.with_weights_of(stock, device)
    flops = count_flops(own.config, Rows.of(own.patch(tokens)))
    parameters = sum(x.numel() for x in stock.parameters())
    models = {OURS: deepcopy(stock), NORMS: deepcopy(stock), STOCK: stock}
    for name, options in ((OURS, {}), (NORMS, {"norms": True})):
        integration.apply(models[name], **options)

    def run(blt: Any) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [blt(tokens, use_cache=False).logits]
        loss = blt(tokens, labels=tokens, use_cache=False).loss
        return [loss.detach(), *torch.autograd.grad(loss, [x for x in blt.parameters() if x.requires_grad])]

    square = normal(64 if small else 2048, 64 if small else 2048, device=device)
    return Comparison(
        f"transformers' BLT {name_of_pass(backward)}",
        f"{parameters / 1e6:.1f}M parameters, [{rows}, {length}] in patches of {PATCH_SIZE}",
        "float32",
        {name: partial(run, blt) for name, blt in models.items()},
        round(flops.total.forward * (3 if backward else 1) + flops.patcher),
        {"matmul": lambda: square @ square},
        2 * square.shape[0] ** 3,
        partial(agree, 1e-3),
        unit="flop",
        device=device,
    )


def agree(allowed: float, results: dict[str, Any]) -> None:
    """Raise unless every result is within a relative error of transformers' own."""
    theirs = results[STOCK]
    for name, result in results.items():
        for number, (x, y) in enumerate(zip(result, theirs, strict=True)):
            error = float((x - y).norm() / y.norm())
            assert error <= allowed, f"{name}, result {number}: relative error {error:.2e}"


def functions() -> tuple[SimpleNamespace, SimpleNamespace]:
    """Return the replaced functions, ours and transformers'."""
    from transformers.models.blt import modeling_blt as modeling  # an optional package

    def found() -> SimpleNamespace:
        return SimpleNamespace(
            lengths=modeling.BltPatcher.patch_lengths_from_entropies,
            reduce=modeling.BltLocalEncoder.patch_reduce,
            embed=modeling.compute_hash_embeddings,
        )

    with integration.apply():
        ours = found()
    return ours, found()


def patch_lengths(rows: int, length: int, device: str) -> Comparison:
    ours, theirs = functions()
    entropies = ragged_entropies(rows, length, device=device)

    def run(namespace: SimpleNamespace) -> list[Tensor]:
        return [namespace.lengths(entropies, length, 4, 1.335442066192627).double()]

    return Comparison(
        "transformers' patch lengths",
        f"[{rows}, {length}]",
        "float32",
        {OURS: partial(run, ours), STOCK: partial(run, theirs)},
        nbytes(entropies) + round(8 * rows * length / PATCH_SIZE),
        timing.reads(entropies),
        nbytes(entropies),
        partial(agree, 0.0),
        device=device,
    )


def pooling(shape: tuple[int, int, int], backward: bool, device: str) -> Comparison:
    ours, theirs = functions()
    layout = layout_of([shape[1]] * shape[0], device=device)
    ids, slots = local_ids(layout.patch_ids, layout), int(layout.cu_patches.diff().max())
    padded = type(layout).from_ids(ids, ids, slots)
    x = normal(*shape, device=device).requires_grad_(backward)
    grad = normal(shape[0], slots, shape[2], seed=1, device=device)

    def run(namespace: SimpleNamespace, patches: Any) -> Callable[[], list[Tensor]]:
        call = steps(lambda: namespace.reduce(None, x, slots, patches), (x,), grad if backward else None)
        return lambda: list(call()) if backward else [call()]

    return Comparison(
        f"transformers' patch pooling {name_of_pass(backward)}",
        str(list(shape)),
        "float32",
        {OURS: run(ours, padded), STOCK: run(theirs, ids)},
        (3 if backward else 1) * nbytes(x) + nbytes(grad),
        timing.copies(x.detach()) if backward else timing.reads(x),
        nbytes(x) * (2 if backward else 1),
        partial(agree, 1e-5),
        device=device,
    )


def hash_embedding(shape: tuple[int, int, int], vocab: int, backward: bool, device: str) -> Comparison:
    ours, theirs = functions()
    rows, length, width = shape
    tokens = torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    byte_table, tables = nn.Embedding(260, width, device=device), nn.Embedding(6 * vocab, width, device=device)
    encoder, weights = SimpleNamespace(embed_tokens=byte_table), [byte_table.weight, tables.weight]
    for weight in weights:
        weight.requires_grad_(backward)
    grad = normal(rows, length, width, seed=1, device=device)

    def run(namespace: SimpleNamespace) -> Callable[[], list[Tensor]]:
        def embed() -> Tensor:
            return namespace.embed(tokens, encoder, tables, 1, HASH_SIZES, vocab)

        call = steps(embed, weights, grad if backward else None)
        return lambda: list(call()) if backward else [call()]

    return Comparison(
        f"transformers' hash embedding {name_of_pass(backward)}",
        f"{rows} x {length} bytes, 6 tables [{vocab}, {width}]",
        "float32",
        {OURS: run(ours), STOCK: run(theirs)},
        8 * nbytes(grad) + (nbytes(*weights) + 8 * nbytes(grad) if backward else 0),
        timing.copies(grad),
        2 * nbytes(grad),
        partial(agree, 1e-5),
        device=device,
    )


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_transformers(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
