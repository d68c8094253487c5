"""The latency of a call on one row, where only dispatch and checks count, beside a comparable function of torch.

The limit is the operator on no rows: torch dispatches it, converts its arguments to the stable ABI and back, and the
kernel checks them and allocates the outputs, but computes nothing. The limit of the model is reading its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
import torch.nn.functional as F
from common import normal
from timing import OURS, Comparison, Make
from torch import Tensor
from torch.utils._pytree import tree_leaves

import blt_kernels as bk
from blt_kernels._extension import OPERATORS
from blt_kernels.models import ByteLM
from blt_kernels.ops._autograd import caller
from blt_kernels.testing import assert_equal

PREFIX = "latency of "
NO_ROWS = "no rows"

# The public functions call the operators in this way.
CALL = {operator: caller(operator) for operator in OPERATORS if operator.endswith("_fwd")}


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield every op on one row, and the forward of one byte."""
    for op in calls("cpu"):
        yield partial(comparison, op, device)
    yield partial(one_byte, device)


def calls(
    device: str, num_rows: int = 1
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], str, Callable[[], Any]]]:
    """Return for each op the public call, its operator, the name of a comparable torch function, and that function."""
    logits, x = normal(num_rows, 260, device=device), normal(num_rows, 256, device=device)
    tokens = torch.full((num_rows,), 70, device=device)
    offsets, weights = (
        torch.tensor([0, num_rows], dtype=torch.int32, device=device),
        torch.ones(num_rows, device=device),
    )
    marks = weights > 0
    head = normal(260, 256, device=device)
    tables, byte_table = normal(6 * 1000, 256, device=device), normal(260, 256, device=device)
    rows = torch.zeros(num_rows, 7, dtype=torch.int64, device=device)
    hashing = [3, 4, 5, 6, 7, 8], None, "dense", None, None
    layout = bk.static_patch(offsets, 4, num_bytes=num_rows)
    patches = layout.patch_offsets, layout.patch_ids
    q, queries = normal(num_rows, 2, 128, device=device), normal(2 * num_rows, 2, 128, device=device)
    leaf, leaf_heads = q.clone().requires_grad_(), q.view(1, 2, num_rows, 128).clone().requires_grad_()
    heads, cross_heads = q.view(1, 2, num_rows, 128), queries.view(1, 2, 2 * num_rows, 128)
    rules = 1.3, None, False, None, "fp32", None
    ragged = offsets, None, None, True, None, None, None, 1
    encode = {"direction": "encode", "queries_per_patch": 2}
    index = layout.patch_ids.long()
    entropy = ("log_softmax", lambda: torch.log_softmax(logits, -1))
    attention = ("scaled_dot_product_attention", lambda: F.scaled_dot_product_attention(heads, heads, heads))
    cross = ("scaled_dot_product_attention", lambda: F.scaled_dot_product_attention(cross_heads, heads, heads))
    consecutive = ("unique_consecutive", lambda: torch.unique_consecutive(tokens, return_counts=True))
    return {
        "token_entropy": (lambda: bk.token_entropy(logits), lambda: CALL["token_entropy_fwd"](logits), *entropy),
        "linear_entropy": (
            lambda: bk.linear_entropy(x, head),
            lambda: CALL["linear_entropy_fwd"](x, head, None),
            "linear and log_softmax",
            lambda: torch.log_softmax(F.linear(x, head), -1),
        ),
        "linear_cross_entropy": (
            lambda: bk.linear_cross_entropy(x, head, tokens),
            lambda: CALL["linear_cross_entropy_fwd"](x, head, tokens, None, -100),
            "linear and cross_entropy",
            lambda: F.cross_entropy(F.linear(x, head), tokens, reduction="none"),
        ),
        "patch_starts": (
            lambda: bk.patch_starts(logits[:, 0], threshold=1.3),
            lambda: CALL["patch_starts_fwd"](logits[:, 0], None, 1, *rules),
            *consecutive,
        ),
        "space_patch": (
            lambda: bk.space_patch(tokens),
            lambda: CALL["space_patch_fwd"](tokens, None, 1, None),
            *consecutive,
        ),
        "boundary_patch": (
            lambda: bk.boundary_patch(marks),
            lambda: CALL["boundary_patch_fwd"](marks, None, 1, None, None, "end", None, None),
            *consecutive,
        ),
        "patch_pool": (
            lambda: bk.patch_pool(x, layout),
            lambda: CALL["patch_pool_fwd"](x, *patches, ["max"]),
            "amax",
            lambda: x.amax(0),
        ),
        "patch_unpool": (
            lambda: bk.patch_unpool(x, layout),
            lambda: CALL["patch_unpool_fwd"](x, *patches),
            "index_select",
            lambda: x.index_select(0, index),
        ),
        "ema_scan": (
            lambda: bk.ema_scan(x, weights),
            lambda: CALL["ema_scan_fwd"](x, weights, None, 1),
            "cumsum",
            lambda: x.cumsum(0),
        ),
        "ngram_hash_embed": (
            lambda: bk.ngram_hash_embed(tokens, tables, byte_table),
            lambda: CALL["ngram_hash_embed_fwd"](tokens, [tables], byte_table, None, 1, *hashing),
            "embedding_bag",
            lambda: F.embedding_bag(rows, tables, mode="sum"),
        ),
        "block_causal_attention": (
            lambda: bk.block_causal_attention(q, q, q, offsets),
            lambda: CALL["block_causal_attention_fwd"](q, q, q, *ragged),
            *attention,
        ),
        "block_causal_attention with a gradient": (
            lambda: bk.block_causal_attention(leaf, leaf, leaf, offsets),
            lambda: CALL["block_causal_attention_fwd"](q, q, q, *ragged),
            "scaled_dot_product_attention",
            lambda: F.scaled_dot_product_attention(leaf_heads, leaf_heads, leaf_heads),
        ),
        "patch_cross_attention": (
            lambda: bk.patch_cross_attention(queries, q, q, layout, **encode),
            lambda: CALL["patch_cross_attention_fwd"](
                queries, q, q, layout.patch_offsets, layout.cu_patches, layout.patch_ids, "encode", 2, None, None
            ),
            *cross,
        ),
    }


def comparison(op: str, device: str) -> Comparison:
    ours, operator, name, theirs = calls(device)[op]
    on_no_rows = calls(device, 0)[op][1]

    def agree(results: dict[str, Any]) -> None:
        assert_equal(tree_leaves(results[OURS])[0], tree_leaves(operator())[0])

    return Comparison(
        f"{PREFIX}{op}", "one row", "float32", {OURS: ours, name: theirs}, 1, {NO_ROWS: on_no_rows}, 1, agree,
        device=device,
    )  # fmt: skip


def one_byte(device: str) -> Comparison:
    model = ByteLM.bundled(device=device)
    weights = [p.detach() for p in model.parameters()]
    tokens = torch.tensor([70], device=device)
    matrices = [w for w in weights if w.dim() == 2 and w is not model.embed_tokens.weight]
    vectors = {width: normal(1, width, device=device) for width in {w.shape[1] for w in matrices}}

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(tokens)

    def products() -> list[Tensor]:
        with torch.inference_mode():
            return [F.linear(vectors[w.shape[1]], w) for w in matrices]

    def agree(results: dict[str, Any]) -> None:
        assert_equal(results[OURS], model(tokens).detach())

    size = sum(w.numel() * w.element_size() for w in weights)
    return Comparison(
        f"{PREFIX}ByteLM.bundled()", "one byte", "float32", {OURS: forward, "its products": products}, size,
        {"read the weights": lambda: [w.sum() for w in weights]}, size, agree, device=device,
    )  # fmt: skip


def remarks(rows: list[timing.Row]) -> list[str]:
    """Say what each call takes, how many times as long as the function of torch, and its limit."""
    peers = {(row.op, row.threads): row for row in rows if row.implementation != OURS and row.ratio_to_best_peer}
    lines = []
    for row in rows:
        if row.op.startswith(PREFIX) and row.implementation == OURS and row.ratio_to_best_peer:
            peer = peers[row.op, row.threads]
            ours, theirs = f"{row.median_ms * 1e3:.3g} us", f"{peer.implementation} {peer.median_ms * 1e3:.3g} us"
            times = f"{1 / row.ratio_to_best_peer:.2g} times"
            limit = f"the limit is {row.median_ms * 1e3 * row.share_of_limit:.3g} us"
            lines.append(f"{row.op}, {row.threads} threads: {ours}, {theirs}, {times}; {limit}")
    return lines


def test_latency(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
