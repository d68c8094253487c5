"""Every op, listed once: what `test_ops.py` needs to run all shared checks on it.

To add an op, append an `OpCase`. `make` returns keyword arguments that the public function and the reference both take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import blt_kernels as bk
from blt_kernels.reference import block_causal_attention as block_causal_attention_reference
from blt_kernels.reference import entropy_patch as entropy_patch_reference
from blt_kernels.reference import ngram_hash_embed as ngram_hash_embed_reference
from blt_kernels.reference import patch_cross_attention as patch_cross_attention_reference
from blt_kernels.reference import patch_pool as patch_pool_reference
from blt_kernels.reference import patch_unpool as patch_unpool_reference
from blt_kernels.testing import document_lengths, offsets_of, ragged_layout, real_text, to_tokens

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = (torch.int64,)

Make = Callable[[torch.dtype, int, int], dict[str, Any]]


@dataclass(frozen=True)
class OpCase:
    """One op with one setting of its options.

    Attributes
    ----------
    name : the public function, and what is special about the case in brackets
    op : the file of the op, ``ops/<op>.py``
    function, reference : called with what `make` returns
    make : (dtype, num_bytes, seed) -> keyword arguments, on the CPU; any `num_bytes` from 0
    differentiable : names of the arguments with gradients
    dtypes : dtypes to test; of ids where there are no floating arguments
    autocast : does autocast cast the floating arguments?
    sparse : are gradients sparse? gradcheck and tracing take dense ones only
    trace : is the case put through opcheck and torch.compile? One of a function's cases is enough unless options differ
    inductor : is it compiled by inductor too? Takes many seconds
    """

    name: str
    op: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make: Make
    differentiable: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    autocast: bool = False
    sparse: bool = False
    trace: bool = True
    inductor: bool = False


def random_normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers that `dtype` holds exactly, the same for every seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(*shape).normal_(0, scale, generator=generator).to(dtype)


def documents(num_bytes: int, seed: int) -> Tensor:
    """int32 offsets of ragged documents."""
    return offsets_of(document_lengths(num_bytes, seed))


# --- entropy_patch ----------------------------------------------------------------------------------------------------

RULES: dict[str, dict[str, Any]] = {
    "": {},
    "monotonic": {"monotonic": True},
    "threshold_add": {"threshold_add": 0.25},
    "max_patch_length": {"max_patch_length": 5},
    "all": {"monotonic": True, "max_patch_length": 3},
}


def spread_logits(num_bytes: int, alphabet: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Logits with entropies from next to nothing to nearly log A."""
    spread = torch.logspace(-1, 1.3, 17, base=10.0)[torch.arange(num_bytes) * 7 % 17]
    return (random_normal(num_bytes, alphabet, dtype=torch.float32, seed=seed) * spread[:, None]).to(dtype)


def between(values: Tensor) -> float:
    """The middle of the widest gap in the upper half of `values`: a threshold that rounding does not cross."""
    upper = values.double().sort().values[values.numel() // 2 :]
    if upper.numel() < 2:
        return 1.0
    gap = int(upper.diff()[: max(1, upper.numel() // 2)].argmax())
    return float((upper[gap] + upper[gap + 1]) / 2)


def robust_rule(entropy: Tensor, rule: dict[str, Any]) -> dict[str, Any]:
    """`rule` with thresholds that no entropy of fp32 accuracy is on the wrong side of."""
    rise = entropy.diff()
    rule = {"threshold": between(rise if rule.get("monotonic") else entropy), **rule}
    if "threshold_add" in rule:
        rule["threshold_add"] = between(rise)
    return rule


def make_entropy_patch(rule: dict[str, Any], share: float | None = None) -> Make:
    """`share`: capacity as a part of the bytes, small enough to overflow."""

    def make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
        logits, cu_seqlens = spread_logits(num_bytes, 67, dtype, seed), documents(num_bytes, seed)
        capacity = {} if share is None else {"max_patches": int(num_bytes * share) + cu_seqlens.numel() - 1}
        entropy = entropy_patch_reference.token_entropy_reference(logits.double())
        return {"logits": logits, "cu_seqlens": cu_seqlens, **robust_rule(entropy, rule), **capacity}

    return make


def make_patch_starts(rule: dict[str, Any], share: float | None = None) -> Make:
    with_logits = make_entropy_patch(rule, share)

    def make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
        arguments = with_logits(torch.float32, num_bytes, seed)
        logits = arguments.pop("logits")
        return {"entropy": entropy_patch_reference.token_entropy_reference(logits).to(dtype), **arguments}

    return make


def make_token_entropy(alphabet: int) -> Make:
    return lambda dtype, num_bytes, seed: {"logits": spread_logits(num_bytes, alphabet, dtype, seed)}


def make_linear_entropy(bias: bool) -> Make:
    def make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
        arguments = {
            "hidden": random_normal(num_bytes, 24, dtype=dtype, seed=seed),
            "weight": random_normal(37, 24, dtype=dtype, seed=seed + 1, scale=0.4),
        }
        return {**arguments, "bias": random_normal(37, dtype=dtype, seed=seed + 2)} if bias else arguments

    return make


def make_tokens(**options: Any) -> Make:
    def make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
        tokens = to_tokens(real_text(num_bytes, seed), dtype=dtype)
        tokens[::29] = torch.arange(tokens[::29].numel()) % 4  # special ids
        return {"tokens": tokens, "cu_seqlens": documents(num_bytes, seed), **options}

    return make


def make_offsets(**options: Any) -> Make:
    return lambda dtype, num_bytes, seed: {
        "cu_seqlens": documents(num_bytes, seed),
        "num_bytes": num_bytes,
        **options,
    }


def byte_patch_reference(cu_seqlens: Tensor, num_bytes: int) -> bk.PatchLayout:
    return entropy_patch_reference.static_patch_reference(cu_seqlens, num_bytes, 1)


def topk_make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
    arguments = make_patch_starts({})(dtype, num_bytes, seed)
    return {"entropy": arguments["entropy"], "cu_seqlens": arguments["cu_seqlens"], "patch_size": 4}


def _entropy_patch_cases() -> list[OpCase]:
    reference = entropy_patch_reference
    cases = []
    for label, rule in RULES.items():
        suffix = f"[{label}]" if label else ""
        patch = make_entropy_patch(rule)
        cases += [
            OpCase(
                f"entropy_patch{suffix}",
                "entropy_patch",
                bk.entropy_patch,
                reference.entropy_patch_reference,
                patch,
                ("logits",),
                trace=label in ("", "all"),
                inductor=not label,
            ),
            OpCase(
                f"patch_starts{suffix}",
                "entropy_patch",
                bk.patch_starts,
                reference.patch_starts_reference,
                make_patch_starts(rule),
                trace=not label,
            ),
        ]
    cases += [
        OpCase(
            "patch_starts[overflow]",
            "entropy_patch",
            bk.patch_starts,
            reference.patch_starts_reference,
            make_patch_starts({}, share=0.1),
        ),
        OpCase(
            "entropy_patch[overflow]",
            "entropy_patch",
            bk.entropy_patch,
            reference.entropy_patch_reference,
            make_entropy_patch({}, share=0.1),
            ("logits",),
            trace=False,
        ),
        OpCase("topk_patch", "entropy_patch", bk.topk_patch, reference.topk_patch_reference, topk_make),
    ]
    for alphabet in (1, 5, 64, 260, 1031):
        cases.append(
            OpCase(
                f"token_entropy[A={alphabet}]",
                "entropy_patch",
                bk.token_entropy,
                reference.token_entropy_reference,
                make_token_entropy(alphabet),
                ("logits",),
                trace=alphabet == 260,
            )
        )
    for bias in (True, False):
        cases.append(
            OpCase(
                f"linear_entropy[{'bias' if bias else 'no bias'}]",
                "entropy_patch",
                bk.linear_entropy,
                reference.linear_entropy_reference,
                make_linear_entropy(bias),
                ("hidden", "weight", "bias") if bias else ("hidden", "weight"),
                autocast=True,
            )
        )
    schemes: list[tuple[str, Callable[..., Any], Callable[..., Any], Make]] = [
        ("space_patch", bk.space_patch, reference.space_patch_reference, make_tokens()),
        ("delimiter_patch", bk.delimiter_patch, reference.delimiter_patch_reference, make_tokens(id=ord("\n") + 4)),
        ("static_patch[first=1]", bk.static_patch, reference.static_patch_reference, make_offsets(size=4)),
        ("static_patch[first=size]", bk.static_patch, reference.static_patch_reference, make_offsets(size=4, first=4)),
        ("byte_patch", bk.byte_patch, byte_patch_reference, make_offsets()),
    ]
    cases += [OpCase(name, "entropy_patch", fn, ref, make, dtypes=IDS) for name, fn, ref, make in schemes]
    return cases


# --- patch_pool, patch_unpool -----------------------------------------------------------------------------------------


def make_layout(num_bytes: int, seed: int, kind: str = "") -> bk.PatchLayout:
    """Ragged patches; "overflow": with too little room; "tail": with bytes beyond the last document."""
    if kind == "tail":
        covered = documents(num_bytes * 2 // 3, seed)
        return bk.PatchLayout.from_cuts(torch.arange(num_bytes) % 4 == seed % 4, covered)
    room = num_bytes // 12 + 7 if kind == "overflow" else None  # 7: one for each document
    return ragged_layout(num_bytes, seed, max_patches=room)


def make_patch_pool(reduce: str | tuple[str, ...], kind: str = "") -> Make:
    def make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
        x = random_normal(num_bytes, 21, dtype=dtype, seed=seed)
        if dtype != torch.float64:  # many ties, which gradcheck cannot differentiate
            x = (x * 2).round() / 2
        return {"x": x, "layout": make_layout(num_bytes, seed, kind), "reduce": reduce}

    return make


def make_patch_unpool(ids: str, kind: str = "") -> Make:
    def make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
        layout = make_layout(num_bytes, seed, kind)
        return {"y": random_normal(layout.capacity, 21, dtype=dtype, seed=seed), "layout": layout, "ids": ids}

    return make


def _pooling_cases() -> list[OpCase]:
    pool, unpool = patch_pool_reference.patch_pool_reference, patch_unpool_reference.patch_unpool_reference
    everything = ("max", "min", "mean", "sum", "first", "last")
    pools: list[tuple[str, str | tuple[str, ...], str]] = [
        ("max", "max", ""),
        ("all", everything, ""),
        ("tail", everything, "tail"),
        ("overflow", ("mean", "max"), "overflow"),
    ]
    return [
        *(
            OpCase(
                f"patch_pool[{label}]",
                "patch_pool",
                bk.patch_pool,
                pool,
                make_patch_pool(reduce, kind),
                ("x",),
                trace=not kind,
            )
            for label, reduce, kind in pools
        ),
        *(
            OpCase(
                f"patch_unpool[{ids}{' ' if kind else ''}{kind}]",
                "patch_unpool",
                bk.patch_unpool,
                unpool,
                make_patch_unpool(ids, kind),
                ("y",),
                trace=not kind,
            )
            for ids, kind in (("patch", ""), ("decode", ""), ("patch", "tail"), ("decode", "overflow"))
        ),
    ]


# --- ngram_hash_embed -------------------------------------------------------------------------------------------------


def make_ngram_hash_embed(*, fused: bool, byte_table: bool, **options: Any) -> Make:
    sizes, functions = options.get("ngram_sizes", (3, 4, 5, 6, 7, 8)), options.get("num_functions", 1)
    low, high = options.get("row_range", (0, 53))
    count, rows = functions * len(sizes), high - low

    def make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
        tables = random_normal(count * rows, 9, dtype=dtype, seed=seed)
        return {
            **make_tokens()(torch.int64, num_bytes, seed),
            "tables": tables if fused else list(tables.chunk(count)),
            **({"byte_table": random_normal(260, 9, dtype=dtype, seed=seed + 1)} if byte_table else {}),
            **options,
        }

    return make


def _ngram_hash_embed_cases() -> list[OpCase]:
    reference = ngram_hash_embed_reference
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("fused", {"fused": True, "byte_table": True}),
        ("list", {"fused": False, "byte_table": False, "ngram_sizes": (2, 4), "num_functions": 2}),
        ("sparse", {"fused": False, "byte_table": True, "grad": "sparse"}),
        ("shard", {"fused": True, "byte_table": True, "row_range": (10, 40), "vocab": 53, "ngram_sizes": (1, 3)}),
    ]
    embeds = [
        OpCase(
            f"ngram_hash_embed[{label}]",
            "ngram_hash_embed",
            bk.ngram_hash_embed,
            reference.ngram_hash_embed_reference,
            make_ngram_hash_embed(**options),
            ("tables", "byte_table") if options["byte_table"] else ("tables",),
            sparse=label == "sparse",
            trace=label != "sparse",
        )
        for label, options in kinds
    ]
    make = make_tokens(ngram_sizes=(1, 3, 8), num_functions=2, vocab=1009)
    hashes = OpCase("ngram_hash", "ngram_hash_embed", bk.ngram_hash, reference.ngram_hash_reference, make, dtypes=IDS)
    return [*embeds, hashes]


# --- attention --------------------------------------------------------------------------------------------------------


def make_attention(*, keys: bool = False, groups: int = 4, **options: Any) -> Make:
    """`keys`: documents have other numbers of keys than of queries, and not all of them are used."""

    def make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
        lengths = document_lengths(num_bytes, seed)
        more = [n + (5 * b + seed) % 7 - (n > 3) for b, n in enumerate(lengths)]
        rows = sum(more) if keys else num_bytes
        used = torch.tensor([n - (b + seed) % 3 if n > 3 else n for b, n in enumerate(more)], dtype=torch.int32)
        return {
            "q": random_normal(num_bytes, 4, 10, dtype=dtype, seed=seed),
            "k": random_normal(rows, groups, 10, dtype=dtype, seed=seed + 1),
            "v": random_normal(rows, groups, 10, dtype=dtype, seed=seed + 2),
            "cu_seqlens_q": offsets_of(lengths),
            **({"cu_seqlens_k": offsets_of(more), "seqused_k": used} if keys else {}),
            **options,
        }

    return make


def make_cross_attention(direction: str, kind: str = "", **options: Any) -> Make:
    def make(dtype: torch.dtype, num_bytes: int, seed: int) -> dict[str, Any]:
        layout = make_layout(num_bytes, seed, kind)
        on_patches, on_bytes = layout.capacity * 2, num_bytes
        queries, keys = (on_patches, on_bytes) if direction == "encode" else (on_bytes, on_patches)
        return {
            "q": random_normal(queries, 3, 10, dtype=dtype, seed=seed),
            "k": random_normal(keys, 3, 10, dtype=dtype, seed=seed + 1),
            "v": random_normal(keys, 3, 10, dtype=dtype, seed=seed + 2),
            "layout": layout,
            "direction": direction,
            "queries_per_patch": 2,
            **options,
        }

    return make


def _attention_cases() -> list[OpCase]:
    causal, cross = block_causal_attention_reference, patch_cross_attention_reference
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("causal", {"return_lse": True}),
        ("window", {"window": 5, "groups": 2}),
        ("both sides", {"window": 4, "causal": False, "scale": 0.5, "groups": 1}),
        ("keys", {"keys": True, "groups": 2, "window": 9, "return_lse": True}),
    ]
    cross_kinds: list[tuple[str, str, str, dict[str, Any]]] = [
        ("encode", "encode", "", {}),
        ("decode", "decode", "", {}),
        ("encode window", "encode", "tail", {"window": 3}),
        ("decode window", "decode", "overflow", {"window": 3, "scale": 0.5}),
    ]
    return [
        *(
            OpCase(
                f"block_causal_attention[{label}]",
                "block_causal_attention",
                bk.block_causal_attention,
                causal.block_causal_attention_reference,
                make_attention(**options),
                ("q", "k", "v"),
                autocast=True,
            )
            for label, options in kinds
        ),
        *(
            OpCase(
                f"patch_cross_attention[{label}]",
                "patch_cross_attention",
                bk.patch_cross_attention,
                cross.patch_cross_attention_reference,
                make_cross_attention(direction, kind, **options),
                ("q", "k", "v"),
                autocast=True,
            )
            for label, direction, kind, options in cross_kinds
        ),
    ]


CASES = [*_entropy_patch_cases(), *_pooling_cases(), *_ngram_hash_embed_cases(), *_attention_cases()]
