"""Shared by the benches: inputs in rows of one length, as other code bases take them, and the comparison of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timing import OURS
from torch import Tensor

from blt_kernels import PatchLayout
from blt_kernels.testing import assert_close, offsets_of


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def name_of_pass(backward: bool) -> str:
    return "fwd+bwd" if backward else "fwd"


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Return normal numbers, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device).normal_(generator=generator).to(dtype)


def ragged_entropies(*shape: int, device: str = "cpu") -> Tensor:
    """Return entropies of which one in 4.5 is above BLT's threshold, without the logits."""
    generator = torch.Generator(device).manual_seed(0)
    high = torch.rand(shape, generator=generator, device=device) < 1 / 4.5
    return torch.rand(shape, generator=generator, device=device) + 2 * high


def steps(function: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor | None) -> Callable[[], Any]:
    """Return `function`, or the gradients of `inputs` if there is a gradient of what it returns."""
    if grad is None:
        return function
    return lambda: torch.autograd.grad(function(), inputs, grad)


def assert_agree(results: dict[str, Sequence[Tensor]], truth: Sequence[Tensor], eager: str) -> None:
    """Raise unless ours is as accurate as `eager`, and all compute the same thing: half of the digits agree.

    Where `eager` could not run, which is a row of its own, half of the digits of ours have to agree as well.
    """
    if eager in results:
        assert_close(results[OURS], results[eager], truth)
    for name, result in results.items():
        for number, (actual, exact) in enumerate(zip(result, truth, strict=True)):
            assert actual.shape == exact.shape, f"{name}, result {number}: {actual.shape}, expected {exact.shape}"
            error = float((actual.detach().double() - exact).norm() / exact.norm())
            allowed = torch.finfo(actual.dtype).eps ** 0.5
            assert error <= allowed, f"{name}, result {number}: relative error {error:.2e}, allowed {allowed:.2e}"


# --- rows of one length -----------------------------------------------------------------------------------------------


def layout_of(lengths: Sequence[int], *, mean: float = 4.5, device: str = "cpu", seed: int = 0) -> PatchLayout:
    """Return random patches of about `mean` bytes. As in BLT the first has one byte, so every byte can decode one."""
    cu_seqlens = offsets_of(lengths)
    size = int(cu_seqlens[-1])
    boundaries = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 1 / mean
    document_starts = cu_seqlens[:-1].long()
    boundaries[document_starts[document_starts < size]] = True
    return PatchLayout.from_cuts(boundaries.to(device), cu_seqlens.to(device)).compact()


def local_ids(ids: Tensor, layout: PatchLayout) -> Tensor:
    """Patch ids that count from 0 in every row: int64 ``[B, S]``."""
    return ids.long().view(layout.num_documents, -1) - layout.cu_patches[:-1, None].long()


def pad_patches(x: Tensor, layout: PatchLayout) -> Tensor:
    """Turn ``[C * K, ...]`` into ``[B, Pmax * K, ...]``, with zeros on the right of rows that have fewer patches."""
    used = _used(layout)
    vectors = x.shape[0] // layout.capacity
    padded = x.new_zeros(*used.shape, vectors, *x.shape[1:])
    padded[used] = x.detach().view(layout.capacity, vectors, *x.shape[1:])
    return padded.flatten(1, 2).requires_grad_(x.requires_grad)


def pack_patches(padded: Tensor, layout: PatchLayout) -> Tensor:
    """Undo `pad_patches`."""
    used = _used(layout)
    return padded.unflatten(1, (used.shape[1], -1))[used].flatten(0, 1)


def _used(layout: PatchLayout) -> Tensor:
    counts = layout.cu_patches.diff()
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
