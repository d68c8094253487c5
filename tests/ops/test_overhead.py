"""Counts of the operators that a call runs besides its kernel: they are the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import blt_kernels as bk
from blt_kernels.models import BLT, BLTConfig, ByteLM

VIEWS = {
    "aten::view", "aten::_unsafe_view", "aten::detach", "aten::alias", "aten::t", "aten::select", "aten::unsqueeze",
    "aten::view_as_complex", "aten::view_as_real",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that run, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] not in VIEWS:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def operators(function: Callable[[], Any]) -> Counter[str]:
    with Operators() as mode:
        function()
    return mode.counts


def padded_calls(device: str) -> dict[str, Callable[[], Any]]:
    tokens = torch.full((2, 5), 70, device=device)
    logits, entropy = (torch.zeros(shape, device=device) for shape in ((2, 5, 7), (2, 5)))
    q, k = (torch.zeros(2, 5, heads, 8, device=device) for heads in (4, 2))
    keys = torch.zeros(2, 9, 2, 8, device=device)
    table, byte_table = torch.zeros(6 * 11, 4, device=device), torch.zeros(260, 4, device=device)
    return {
        "entropy_patch": lambda: bk.entropy_patch(logits, threshold=1.0),
        "patch_starts": lambda: bk.patch_starts(entropy, threshold=1.0),
        "boundary_patch": lambda: bk.boundary_patch(entropy, threshold=1.0, at="start", first=1),
        "boundary_patch, thresholds": lambda: bk.boundary_patch(entropy, threshold=entropy[:, 0]),
        "space_patch": lambda: bk.space_patch(tokens),
        "delimiter_patch": lambda: bk.delimiter_patch(tokens, 7),
        "topk_patch": lambda: bk.topk_patch(entropy, 2),
        "ema_scan": lambda: bk.ema_scan(logits, entropy),
        "ngram_hash": lambda: bk.ngram_hash(tokens, vocab=11),
        "ngram_hash_embed": lambda: bk.ngram_hash_embed(tokens, table, byte_table),
        "block_causal_attention": lambda: bk.block_causal_attention(q, k, k),
        "block_causal_attention, other keys": lambda: bk.block_causal_attention(q, keys, keys, window=3),
    }


@pytest.mark.parametrize("name", padded_calls("cpu"))
def test_padded_input_takes_no_other_operator(name: str) -> None:
    """No launch makes offsets on "meta", as on a GPU."""
    ran = operators(padded_calls("meta")[name])
    assert sum(ran.values()) == 1, ran
    assert next(iter(ran)).startswith("blt_kernels::")


PADDED_GRADIENTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any]]] = {
    "ngram_hash_embed": ((66, 8), lambda x: bk.ngram_hash_embed(x.new_zeros(2, 5, dtype=torch.int64), x)),
    "block_causal_attention": ((2, 5, 2, 8), lambda x: bk.block_causal_attention(x, x, x)),
}


@pytest.mark.parametrize("name", PADDED_GRADIENTS)
def test_the_gradient_of_padded_input_makes_no_offsets(name: str) -> None:
    shape, function = PADDED_GRADIENTS[name]
    out = function(torch.zeros(shape, device="meta", requires_grad=True))
    grad = torch.empty_like(out)
    ran = operators(lambda: out.backward(grad))
    assert ran.pop(f"blt_kernels::{name}_bwd") == 1
    assert set(ran) <= {"aten::add.Tensor"}, ran  # q, k and v are one tensor, whose gradients are added


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_byte_takes_few_operators() -> None:
    """15 products, 5 norms of 7, then per layer an attention, 2 rotations, 2 sums and SwiGLU; positions and the id."""
    model, tokens = ByteLM.bundled(), torch.tensor([70])
    with torch.no_grad():
        model(tokens)  # the first call makes the periods of the positions
        ran = operators(lambda: model(tokens))
    assert ran["aten::mm"] == 15
    assert ran["blt_kernels::block_causal_attention_fwd"] == 2
    assert sum(ran.values()) <= 15 + 5 * 7 + 2 * (1 + 2 + 2 + 2) + 7, ran


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("patching", ["entropy", "space"])
def test_a_forward_reads_offsets_once(patching: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the rows where they are given, and those of the patches."""
    config = replace(BLTConfig.small(), patching=patching)
    model, tokens = BLT(config), torch.randint(4, 260, (200,), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 30, 200]) if packed else None
    read: list[list[int]] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: read.append(tolist(x)) or read[-1])  # type: ignore[func-returns-value]
    with torch.inference_mode():
        model(tokens if packed else tokens.view(2, 100), rows)
        ran = operators(lambda: model(tokens if packed else tokens.view(2, 100), rows))
    assert len(read) == 2 * (2 if packed else 1), read
    assert ran["aten::aminmax"] == 1, "ids are checked once too"


def test_nothing_but_the_operator_runs_for_one_row() -> None:
    """No copy, no cast and no Autograd kernel: a call on packed CPU tensors is its operator."""
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    layout, x, q = bk.static_patch(offsets, 4), torch.zeros(1, 8), torch.zeros(1, 2, 8)
    calls: dict[str, Callable[[], Any]] = {
        "token_entropy": lambda: bk.token_entropy(x),
        "entropy_patch": lambda: bk.entropy_patch(x, offsets, threshold=1.0),
        "patch_pool": lambda: bk.patch_pool(x, layout),
        "patch_unpool": lambda: bk.patch_unpool(x, layout),
        "ngram_hash_embed": lambda: bk.ngram_hash_embed(torch.tensor([5]), torch.zeros(66, 8), None, offsets),
        "block_causal_attention": lambda: bk.block_causal_attention(q, q, q, offsets),
        "patch_cross_attention": lambda: bk.patch_cross_attention(
            q, q, q, layout, direction="encode", queries_per_patch=1
        ),
    }
    for name, call in calls.items():
        ran = operators(call)
        ran.pop("aten::lift_fresh", None)
        ran.pop("aten::zeros", None)
        assert ran == {f"blt_kernels::{name}_fwd": 1}, name
