"""Times other code bases with our ops under them, beside the same code without.

Local layers are those of MEGABYTE-pytorch. H-Net is on no package index: `chunk` and `dechunk` are compared with its
steps in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import timing
import torch
from common import assert_agree, name_of_pass, nbytes, normal, steps
from peers import hnet as hnet_peers
from timing import OURS, Comparison, Make
from torch import Tensor, nn

from blt_kernels.integrations import hnet, megabyte

# Number of patches, and of the bytes in each with the start token before them: patches of 4 and of 8 bytes.
LOCAL = ((512, 5), (64, 9))
HEADS, WIDTH, LAYERS = 8, 64, 2
STOCK, FLASH = "MEGABYTE-pytorch", "MEGABYTE-pytorch, flash_attn"


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield the attention alone and two whole layers, each forward and with backward."""
    for patches, length in ((3, 5),) if small else LOCAL:
        for backward in (False, True):
            for make in (attention, layers):
                yield partial(make, patches, length, backward, device)
    for backward in (False, True):
        yield partial(chunks, (2, 64, 32) if small else (4, 2048, 512), backward, device)


def attention(patches: int, length: int, backward: bool, device: str) -> Comparison:
    """Compare ``Attend``, whose heads are ``[B, H, S, E]`` in the memory of ``[B, S, H * E]``."""
    from MEGABYTE_pytorch.attend import Attend  # an optional package

    q, k, v, grad = (normal(patches, length, HEADS, WIDTH, seed=seed, device=device) for seed in range(4))
    inputs = [x.transpose(1, 2) for x in (q, k, v)]
    modules = {name: Attend(causal=True, flash=name == FLASH) for name in (OURS, STOCK, FLASH)}
    calls, agree = compared(modules, inputs, grad.transpose(1, 2), backward, device)
    moved = (10 if backward else 4) * q.numel() * q.element_size()  # backward reads 4 tensors more and writes 3
    return Comparison(
        f"MEGABYTE-pytorch attention {name_of_pass(backward)}",
        f"[{patches}, {HEADS}, {length}, {WIDTH}]",
        "float32",
        calls,
        moved,
        timing.copies(torch.zeros(moved // 2, dtype=torch.uint8, device=device)),
        moved,
        agree,
        device=device,
    )


def layers(patches: int, length: int, backward: bool, device: str) -> Comparison:
    """Compare layers of the local model, most of whose time goes to matrix products."""
    from MEGABYTE_pytorch.megabyte import Transformer  # an optional package

    dim = HEADS * WIDTH
    x, grad = (normal(patches, length, dim, seed=seed, device=device) for seed in range(2))
    torch.manual_seed(0)
    model = Transformer(dim=dim, layers=LAYERS, heads=HEADS, dim_head=WIDTH)
    modules = {name: deepcopy(model) for name in (OURS, STOCK, FLASH)}
    for layer, _ in modules[FLASH].layers:
        layer.attend.flash = True
    calls, agree = compared(modules, [x], grad, backward, device)
    side = 64 if patches < 8 else 2048
    square = normal(side, side, device=device)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    return Comparison(
        f"MEGABYTE-pytorch local layers {name_of_pass(backward)}",
        f"{LAYERS} layers of {dim}, {patches} patches of {length}",
        "float32",
        calls,
        2 * matrices * patches * length * (3 if backward else 1),
        {"matmul": lambda: square @ square},
        2 * side**3,
        agree,
        unit="flop",
        device=device,
    )


def chunks(shape: tuple[int, int, int], backward: bool, device: str) -> Comparison:
    """Compare H-Net's chunking and dechunking of packed documents, with nothing between them."""
    rows, length, width = shape
    x, grad = (normal(rows * length, width, seed=seed, device=device) for seed in (0, 1))
    cu_seqlens = torch.arange(rows + 1, device=device) * length
    p = torch.rand(rows * length, generator=torch.Generator(device).manual_seed(2), device=device) ** 2
    p[cu_seqlens[:-1]] = 1
    marks = p > 0.5
    leaves = x.requires_grad_(backward), p.requires_grad_(backward)

    def ours(x: Tensor, p: Tensor) -> Tensor:
        kept, layout = hnet.chunk(x, marks, cu_seqlens)
        return hnet.dechunk(kept, p, layout)

    def plain(x: Tensor, p: Tensor) -> Tensor:
        return hnet_peers.dechunk(*hnet_peers.chunk(x, marks, cu_seqlens), marks, p)

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        return steps(lambda: function(*leaves), leaves, grad if backward else None)

    def agree(results: dict[str, Any]) -> None:
        wide = [v.detach().double().requires_grad_(backward) for v in leaves]
        out = plain(*wide)
        truth = list(torch.autograd.grad(out, wide, grad.double())) if backward else [out]
        assert_agree({name: list(r) if backward else [r] for name, r in results.items()}, truth, "plain PyTorch")

    return Comparison(
        f"H-Net chunk and dechunk {name_of_pass(backward)}",
        str(list(shape)),
        "float32",
        {OURS: run(ours), "plain PyTorch": run(plain)},
        nbytes(x) * (4 if backward else 2),  # the vectors of all bytes are read and written
        timing.copies(x.detach()),
        2 * nbytes(x),
        agree,
        device=device,
    )


def compared(
    modules: dict[str, nn.Module], inputs: list[Tensor], grad: Tensor, backward: bool, device: str
) -> tuple[dict[str, Callable[[], Any]], Callable[[dict[str, Any]], None]]:
    """Put our attention under one of the modules, and return what each is timed by and the check of their results."""

    def call(module: nn.Module, inputs: list[Tensor], grad: Tensor) -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_(backward) for x in inputs]
        wanted = [*leaves, *module.to(device).requires_grad_(backward).parameters()]
        return steps(partial(module, *leaves), wanted, grad if backward else None)

    exact = call(deepcopy(modules[STOCK]).double(), [x.double() for x in inputs], grad.double())
    calls = {name: call(module, inputs, grad) for name, module in modules.items()}
    megabyte.apply(modules[OURS])

    def agree(results: dict[str, Any]) -> None:
        shown = {name: [result] if isinstance(result, Tensor) else list(result) for name, result in results.items()}
        truth = exact()
        assert_agree(shown, [truth] if isinstance(truth, Tensor) else list(truth), STOCK)

    return calls, agree


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the tables show everything."""
    return []


def test_integrations(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
