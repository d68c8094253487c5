"""What a call costs besides its kernel: counts of operators, which are the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import blt_kernels as bk

VIEWS = {
    "aten::view",
    "aten::_unsafe_view",
    "aten::detach",
    "aten::alias",
    "aten::t",
    "aten::select",
    "aten::unsqueeze",
}


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
        "space_patch": lambda: bk.space_patch(tokens),
        "delimiter_patch": lambda: bk.delimiter_patch(tokens, 7),
        "topk_patch": lambda: bk.topk_patch(entropy, 2),
        "ngram_hash": lambda: bk.ngram_hash(tokens, vocab=11),
        "ngram_hash_embed": lambda: bk.ngram_hash_embed(tokens, table, byte_table),
        "block_causal_attention": lambda: bk.block_causal_attention(q, k, k),
        "block_causal_attention, other keys": lambda: bk.block_causal_attention(q, keys, keys, window=3),
    }


@pytest.mark.parametrize("name", padded_calls("cpu"))
def test_padded_input_takes_no_other_operator(name: str) -> None:
    """On "meta", as on a GPU: no launch makes offsets."""
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
    assert set(ran) <= {"aten::add.Tensor"}, ran  # the gradients of q, k and v, which are one tensor
