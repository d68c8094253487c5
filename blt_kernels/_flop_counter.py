"""FLOPs are counted while a model runs: importing this file registers the ops with torch's `FlopCounterMode`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from blt_kernels.reference.block_causal_attention import AttentionMask
from blt_kernels.reference.patch_cross_attention import PatchMask

# Each (query, key) pair takes two products for each element of a head, and five backward, which computes scores anew.
PAIR_FORWARD, PAIR_BACKWARD = 4, 10

# The part of a module is that of the longest of these names that its name begins with.
_PLACES = {
    "BLT.local_encoder": "encoder",
    "BLT.local_encoder.cross_attn_layers": "encoder cross",
    "BLT.local_encoder.patch_embedding_projection": "projections",
    "BLT.global_transformer": "global",
    "BLT.global_transformer.token_embedding_projection": "projections",
    "BLT.local_decoder": "decoder",
    "BLT.local_decoder.cross_attn_layers": "decoder cross",
    "BLT.local_decoder.patch_embedding_projection": "projections",
    "BLT.lm_head": "output",
    "BLT": "output",  # the loss, from the weights of the output head
    "BLT.patcher": "patcher",
    "ByteLM.layers": "decoder",
    "ByteLM.lm_head": "output",
    "ByteLM": "output",
    "MegaByte.patch_convolutions": "encoder",
    "MegaByte.global_layers": "global",
    "MegaByte.global_to_local": "projections",
    "MegaByte.local_layers": "decoder",
    "MegaByte.lm_head": "output",
    "MegaByte": "output",
}


def counted_parts(counts: dict[str, dict[Any, int]]) -> dict[str, int]:
    """Sum the counts of a forward pass by part.

    A backward pass cannot be divided like this: the counter ascribes some of it to other modules.

    Parameters
    ----------
    counts : dict
        Of `FlopCounterMode.get_flop_counts`.

    Returns
    -------
    dict of str to int
        FLOPs of `PARTS`, of "patcher", and of "unknown" modules.

    Examples
    --------
    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> with FlopCounterMode(display=False) as counter:
    ...     _ = ByteLM(ByteLMConfig.small())(torch.zeros(10, dtype=torch.int64))
    >>> counted_parts(counter.get_flop_counts())["output"] == 10 * 2 * 256 * 260
    True
    """
    total = {name: sum(ops.values()) for name, ops in counts.items() if name != "Global"}
    parts: Counter[str] = Counter()
    for name, flops in total.items():
        inside = sum(other for child, other in total.items() if _outer(child, total) == name)
        place = name if name in _PLACES else _outer(name, _PLACES)
        if flops > inside:
            parts["unknown" if place is None else _PLACES[place]] += flops - inside
    return parts


def _outer(name: str, names: Mapping[str, object]) -> str | None:
    """Return the innermost module of `names` that the module `name` is inside of."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return None


_OPS = torch.ops.blt_kernels


@register_flop_formula(_OPS.few_row_linear_fwd, get_raw=True)
def _(x: Tensor, weight: Tensor, *_rest: Any, **_out: Any) -> int:
    return 2 * x.shape[0] * weight.numel()


def _head_forward(hidden: Tensor, weight: Tensor, *_rest: Any, **_out: Any) -> int:
    return 2 * hidden.shape[0] * weight.numel()


def _head_backward(_grad: Tensor, hidden: Tensor, weight: Tensor, *_rest: Any, **_out: Any) -> int:
    return 6 * hidden.shape[0] * weight.numel()  # logits are computed anew


for _op in ("linear_entropy", "linear_cross_entropy"):
    register_flop_formula(getattr(_OPS, f"{_op}_fwd"), get_raw=True)(_head_forward)
    register_flop_formula(getattr(_OPS, f"{_op}_bwd"), get_raw=True)(_head_backward)


@register_flop_formula(_OPS.few_row_layer_step, get_raw=True)
def _(
    x: Tensor, weights: Sequence[Tensor], _scales: Any, _norms: Any, _eps: float, _table: Tensor,
    keys: Sequence[Tensor], _values: Any, _index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    window: int | None, patch_keys: Sequence[Tensor], _patch_values: Any, _patches: Any, _head_norm: Any,
    head: Tensor | None, **_out: Any,
) -> int:  # fmt: skip
    matrices = iter(weights)
    pairs = 0
    for layer, cache in enumerate(keys):
        if layer < len(patch_keys):  # W_q of the cross attention and W_o, then W_q of the layer and six others
            pairs += next(matrices).shape[0] * x.shape[0] * patch_keys[layer].shape[1]
            next(matrices)
        pairs += next(matrices).shape[0] * _visited(x, cache, cu_seqlens_q, cu_seqlens_k, window, True, None, None)
        for _ in range(6):
            next(matrices)
    used = (*weights, head) if head is not None else weights
    return 2 * x.shape[0] * sum(weight.numel() for weight in used) + PAIR_FORWARD * pairs


def _register_attention(operator: str, pairs: Callable[..., int]) -> None:
    """Register attention with as many pairs as a function of q, k and the arguments behind the tensors returns."""

    def forward(q: Tensor, k: Tensor, _v: Tensor, *arguments: Any, **_outs: Any) -> int:
        return PAIR_FORWARD * q.shape[-2] * q.shape[-1] * pairs(q, k, *arguments)

    def backward(
        _grad: Tensor, q: Tensor, k: Tensor, _v: Tensor, _out: Tensor, _lse: Tensor, *arguments: Any, **_outs: Any
    ) -> int:
        return PAIR_BACKWARD * q.shape[-2] * q.shape[-1] * pairs(q, k, *arguments)

    register_flop_formula(getattr(_OPS, f"{operator}_fwd"), get_raw=True)(forward)
    register_flop_formula(getattr(_OPS, f"{operator}_bwd"), get_raw=True)(backward)


def _visited(q: Tensor, k: Tensor, *arguments: Any) -> int:
    """Return the (query, key) pairs of block_causal_attention."""
    mask = AttentionMask(*arguments)
    q, k = (x.flatten(0, 1) if x.dim() == 4 else x for x in (q, k))
    first, last = mask.with_offsets(q, k).keys_of_queries(q.shape[0], k.shape[0])
    return int((last - first).sum())


def _crossed(_q: Tensor, _k: Tensor, *arguments: Any) -> int:
    """Return the (query, key) pairs of patch_cross_attention: a byte and K vectors of up to `window` patches."""
    mask = PatchMask(*arguments)
    patch, cu_patches = mask.ids[mask.ids >= 0].long(), mask.cu_patches
    row = torch.searchsorted(cu_patches[1:].long(), patch, right=True)
    # To encode, its own and later patches read a byte. To decode, a byte reads its own and earlier patches.
    there = cu_patches[row + 1] - patch if mask.direction == "encode" else patch - cu_patches[row] + 1
    return mask.queries_per_patch * int(there.clamp(max=mask.window or 1).sum())


_register_attention("block_causal_attention", _visited)
_register_attention("patch_cross_attention", _crossed)
