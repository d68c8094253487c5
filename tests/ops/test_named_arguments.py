"""Errors that fuzzing has found to name no argument, or that came from inside of torch: each names its argument now."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import build

import blt_kernels as bk
from blt_kernels import PatchLayout

WORDS = np.array(["max", "sum"])  # comparing it with a str gives an array
CUTS, OFFSETS = torch.tensor([True, False, False, True]), torch.tensor([0, 4])


@cache
def layout() -> PatchLayout:
    return PatchLayout.from_cuts(CUTS, OFFSETS)


def changed(**fields: Any) -> PatchLayout:
    return PatchLayout(**{**vars(layout()), **fields})


def few_row_layer(**changes: Any) -> torch.Tensor:
    ends, cache = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(8, 1, 4)
    arguments = {
        "x": torch.ones(1, 4),
        "weights": [torch.zeros(4, 4)] * 7,
        "scales": (),
        "input_norm": torch.ones(4),
        "post_norm": torch.ones(4),
        "eps": 1e-5,
        "table": torch.ones(1, 1, 2) + 0j,
        "keys": cache,
        "values": cache.clone(),
        "index": torch.tensor([0]),
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
    }
    return bk.few_row_layer(**{**arguments, **changes})


def autocast(call: Callable[[], Any]) -> Callable[[], Any]:
    def under_autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return under_autocast


INF = float("inf")
CACHE = torch.zeros(8, 1, 4)
X, Q, TOKENS = torch.ones(4, 3), torch.ones(4, 2, 8), torch.arange(4) + 4
CALLS: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    # layouts
    "cuts: expected a tensor, got list": (lambda: PatchLayout.from_cuts([True], OFFSETS), TypeError),
    "cuts: expected dtype in bool": (lambda: PatchLayout.from_cuts(CUTS.long(), OFFSETS), TypeError),
    "cu_seqlens: expected offsets that .*": (lambda: PatchLayout.from_cuts(CUTS, OFFSETS.flip(0)), ValueError),
    "max_patches: expected an int, got 'x'": (lambda: PatchLayout.from_cuts(CUTS, OFFSETS, "x"), TypeError),
    "max_patches: expected at least one .*": (lambda: PatchLayout.from_cuts(CUTS, OFFSETS, 0), ValueError),
    "max_patches: expected at most 2147483647, as int32 ids count, got 2147483648": (
        lambda: PatchLayout.from_lengths(torch.ones(1, 4, dtype=torch.int64), max_patches=2**31),
        ValueError,
    ),
    "padding: expected 0 or -1": (lambda: layout().to_lengths(padding=WORDS), ValueError),
    "width: expected an int, got True": (lambda: layout().to_lengths(width=True), TypeError),
    "include_next_byte: expected True or False": (lambda: layout().to_lengths(2), TypeError),
    "device: expected a torch.device or a str, got ''": (lambda: layout().to(""), ValueError),
    "device: expected a torch.device or a str, got torch.f.*": (lambda: layout().to(torch.float32), TypeError),
    "cu_patches: expected a tensor, got int": (lambda: changed(cu_patches=3).compact(), TypeError),
    "lengths: expected an integer tensor, got torch.uint64": (
        lambda: PatchLayout.from_lengths(torch.ones(1, 4, dtype=torch.uint64)),
        TypeError,
    ),
    "decode_ids: expected device cpu of patch_ids, got meta": (
        lambda: PatchLayout.from_ids(TOKENS[None], TOKENS[None].to("meta"), 9),
        ValueError,
    ),
    "layout.patch_ids: expected a tensor, got float": (lambda: bk.patch_pool(X, changed(patch_ids=1.5)), TypeError),
    "layout.patch_offsets: expected a tensor, got int": (
        lambda: bk.patch_pool(X, changed(patch_offsets=1)),
        TypeError,
    ),
    "layout: expected a PatchLayout, got int": (lambda: build("blt")(TOKENS, layout=3), TypeError),
    "patch_offsets: expected 1 dimensions": (lambda: changed(patch_offsets=OFFSETS.int()[0]).compact(), ValueError),
    "layout.decode_offsets: expected a tensor, got int": (
        lambda: bk.patch_unpool(X, changed(decode_offsets=1), "decode"),
        TypeError,
    ),
    # numbers
    "scale: expected a finite number, got inf": (lambda: bk.block_causal_attention(Q, Q, Q, scale=INF), ValueError),
    "scale: expected a finite number, got -inf": (
        lambda: bk.patch_cross_attention(Q, Q, Q, layout(), direction="decode", queries_per_patch=1, scale=-INF),
        ValueError,
    ),
    "logits: expected an alphabet of at most 1073741824, got 1099511627776": (
        lambda: bk.token_entropy(torch.ones(1, 1).expand(1, 2**40)),
        ValueError,
    ),
    "k: expected dtype torch.float32 of q, since autocast leaves fp64.*": (
        autocast(lambda: bk.block_causal_attention(Q, Q.double(), Q)),
        TypeError,
    ),
    "weight: expected dtype torch.float64 of x, since autocast leaves fp64.*": (
        autocast(lambda: bk.few_row_linear(X.double(), X)),
        TypeError,
    ),
    "bias: expected dtype torch.float32 of hidden, since autocast leaves fp64.*": (
        autocast(lambda: bk.linear_entropy(X, X, torch.ones(4).double())),
        TypeError,
    ),
    # choices and flags
    "reduce: expected one of .*": (lambda: bk.patch_pool(X, layout(), [WORDS]), ValueError),
    "backend: expected one of .*": (lambda: bk.set_attention_backend(WORDS), ValueError),
    "return_lse: expected a bool, got array": (
        lambda: bk.block_causal_attention(Q, Q, Q, return_lse=WORDS),
        TypeError,
    ),
    "strided: expected True or False": (lambda: build("megabyte")(TOKENS, strided=torch.ones(2)), TypeError),
    "reset_at_newlines: expected True or False": (lambda: build("byte_lm")(TOKENS, reset_at_newlines=2), TypeError),
    "whole_characters: expected True or False": (lambda: build("byte_lm").patch(TOKENS, whole_characters=2), TypeError),
    # text and ids
    "bos: expected True or False, got -1": (lambda: bk.to_ids("x", bos=-1), TypeError),
    "dtype: expected torch.int32 or torch.int64": (lambda: bk.to_ids("x", dtype=WORDS), TypeError),
    "device: expected a torch.device or a str, got 'CPU'": (lambda: bk.to_ids("x", device="CPU"), ValueError),
    "ids: expected a tensor or a list of integers, got int": (lambda: bk.to_bytes(3), TypeError),
    "prompts: expected an array of integers, got ndarray": (
        lambda: build("byte_lm").generate(WORDS, max_new_bytes=1),
        TypeError,
    ),
    "draft: expected None, one of .*": (
        lambda: build("byte_lm").generate("x", max_new_bytes=1, draft=WORDS),
        TypeError,
    ),
    "draft_bytes: expected at most .*": (
        lambda: build("byte_lm").generate("x", max_new_bytes=1, draft_bytes=2**63 - 1),
        ValueError,
    ),
    "ids: expected integers, got torch.qint8": (
        lambda: bk.to_bytes(torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)),
        TypeError,
    ),
    # layers of few rows, and tables
    "weights: expected a sequence of 7 tensors, got int": (lambda: few_row_layer(weights=7), TypeError),
    "scales: expected a sequence of 0 or 7 tensors, got bool": (lambda: few_row_layer(scales=False), TypeError),
    "index: expected values from 0 to 7, got -1": (lambda: few_row_layer(index=torch.tensor([-1])), ValueError),
    "keys: expected a cache without gradients.*": (
        lambda: few_row_layer(keys=torch.zeros(8, 1, 4, requires_grad=True)),
        ValueError,
    ),
    "keys: expected a cache without overlapping memory.*": (
        lambda: few_row_layer(keys=torch.zeros(40).as_strided((8, 1, 4), (2, 4, 1))),
        ValueError,
    ),
    "values: expected other memory than that of keys": (lambda: few_row_layer(values=CACHE, keys=CACHE), ValueError),
    "post_norm: expected a dense tensor.*": (lambda: few_row_layer(post_norm=torch.ones(4).to_sparse()), TypeError),
    "residual: expected a dense tensor.*": (
        lambda: bk.few_row_linear(X, torch.ones(3, 3), residual=X.to_sparse()),
        TypeError,
    ),
    "logits: expected a tensor, got None": (lambda: torch.ops.blt_kernels.token_entropy_fwd(None), TypeError),
    "values: expected a cache whose memory has its values.*": (
        lambda: few_row_layer(values=torch._neg_view(torch.zeros(8, 1, 4))),
        ValueError,
    ),
    "params: expected tables with unit stride.*": (
        lambda: bk.optim.SGD([torch.nn.Parameter(torch.ones(3, 4).T)]),
        ValueError,
    ),
    "params: expected tables whose memory has their values.*": (
        lambda: bk.optim.SGD([torch._neg_view(torch.ones(3, 4))]),
        ValueError,
    ),
}


@pytest.mark.parametrize("message", CALLS)
def test_an_error_names_its_argument(message: str) -> None:
    call, error = CALLS[message]
    with pytest.raises(error, match=rf"^{message}"):
        call()
