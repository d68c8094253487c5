"""Layers over a few cached rows run in one call of the operator of `few_row_layer`, if it computes what they do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import attrgetter, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from blt_kernels.layout import AttentionRanges
from blt_kernels.nn.cache import CachedKeys, of_layers
from blt_kernels.nn.layers import CrossAttention, FeedForward, SelfAttention, TransformerLayer
from blt_kernels.nn.matrices import Linear, QuantizedLinear, RMSNorm, multiply_normed
from blt_kernels.ops.few_row_layer import few_row_layer_step
from blt_kernels.ops.few_row_linear import stores, takes

# Paths to the norms and matrices of each module, in the order of the operator.
_NORMS = {CrossAttention: ("q_norm",), TransformerLayer: ("input_layernorm", "post_attention_layernorm")}
_MATRICES = {
    CrossAttention: ("q_proj", "o_proj"),
    TransformerLayer: (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
}
_PLAIN = {*_MATRICES, SelfAttention, FeedForward, Linear, QuantizedLinear, RMSNorm}


def run_layers(
    layers: Iterable[Any], x: Tensor, table: Tensor, documents: Any, ranges: AttentionRanges | None = None,
    head: Sequence[Any] = (),
) -> Tensor:  # fmt: skip
    """Return `x` after all layers, or what a head makes of it.

    Parameters
    ----------
    layers : iterable of TransformerLayer
    x, table, ranges
        As in `TransformerLayer.forward`.
    documents
        As there, or a list with what each layer takes, such as its own `CachedKeys`.
    head : (RMSNorm, Linear), optional

    Returns
    -------
    ``[T, D]``, or ``[T, N]`` of a head

    Examples
    --------
    >>> config = TransformerConfig(dim=8, num_layers=2, num_heads=2)
    >>> layers = [TransformerLayer(config, load_ops("fused")) for _ in range(2)]
    >>> table = rotary_table(torch.arange(5), config, torch.float32)
    >>> run_layers(layers, torch.randn(5, 8), table, torch.tensor([0, 5])).shape
    torch.Size([5, 8])
    """
    layers = list(layers)
    y = few_rows(layers, x, table, documents, head=head) if isinstance(documents, list) else None
    if y is not None:
        return y
    for layer, own in zip(layers, of_layers(documents, len(layers)), strict=True):
        x = layer(x, table, own, ranges)
    return multiply_normed(head[0], x, head[1])[0] if head else x


def few_rows(
    layers: Sequence[Any], x: Tensor, table: Tensor, keys: Sequence[Any], crosses: Sequence[Any] = (),
    patches: Sequence[tuple[Tensor, Tensor]] = (), patch_ids: Tensor | None = None, head: Sequence[Any] = (),
) -> Tensor | None:  # fmt: skip
    """Return what `run_layers` does, from one call of the operator; None if it does not compute that.

    Parameters
    ----------
    layers : sequence of TransformerLayer
    x, table
        As in `run_layers`.
    keys : sequence of CachedKeys
        Those of each layer.
    crosses : sequence of CrossAttention
        Each runs before a layer, and adds its queries twice.
    patches : sequence of (``[C, K, G, E]``, ``[C, K, G, E]``)
        The keys and values of each of `crosses`.
    patch_ids : int32 ``[T]``, optional
        The patch that each entry reads; -1 for none.
    head : (RMSNorm, Linear), optional
    """
    own = keys[0] if keys else None
    if type(own) is not CachedKeys or own.offsets is None or own.keys.dtype != x.dtype:
        return None
    if torch.compiler.is_compiling() or _has_any_global_hook():
        return None
    modules = [*(m for pair in zip_longest(crosses, layers) for m in pair if m is not None), *head]
    stack = _KNOWN.get(modules[0])
    if stack is None or not stack.is_of(modules):
        stack = _stack_of(modules)
        if stack is None and head:  # perhaps only the head is of another kind
            y = few_rows(layers, x, table, keys, crosses, patches, patch_ids)
            return None if y is None else multiply_normed(head[0], y, head[1])[0]
        if stack is None:
            return None
        _KNOWN[modules[0]] = stack
    if not takes(x, *stack.weights, *stack.norms, *stack.head):
        return None
    return few_row_layer_step(
        x, stack.weights, stack.scales, stack.norms, stack.eps, table, [k.keys for k in keys],
        [k.values for k in keys], own.index, *own.offsets, stack.window, [k for k, _ in patches],
        [v for _, v in patches], patch_ids, *stack.head,
    )  # fmt: skip


class _Facts:
    """Notes entries of dictionaries, so that `hold` compares them without a loop of Python."""

    def __init__(self) -> None:
        self.places: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.values: list[Any] = []

    def note(self, place: dict[str, Any], name: str) -> Any:
        """Return what `place` has under `name`, or None."""
        self.places.append(place)
        self.names.append(name)
        self.values.append(place.get(name))
        return self.values[-1]

    def hold(self) -> bool:
        return all(map(is_, map(dict.get, self.places, self.names), self.values))


@dataclass(frozen=True)
class _Stack:
    """Holds the tensors of a stack of modules as the operator takes them, and what `is_of` compares.

    Attributes
    ----------
    own : list of dict
        Those of the attributes of each module, and of the norm and the matrix of a head behind them. The modules are
        the keys of `_KNOWN`, so nothing here refers to them.
    parts : list of Module
        The modules inside.
    hooks : list of dict
    facts : _Facts
        The parts, parameters and attributes that the operator's arguments follow from.
    types : list
        The types of the modules and their parts.
    tensors, dtypes : list
        The weights of all matrices and norms, and their dtypes.
    head : (norm, matrix)
        None and None if there is none.
    """

    own: list[dict[str, Any]]
    parts: list[Any]
    hooks: list[dict[int, Any]]
    facts: _Facts
    types: list[type]
    tensors: list[Tensor]
    dtypes: list[torch.dtype]
    weights: list[Tensor]
    scales: list[Tensor]
    norms: list[Tensor]
    head: tuple[Tensor | None, Tensor | None]
    eps: float
    window: int | None

    def is_of(self, modules: Sequence[Any]) -> bool:
        """Return whether these modules compute what the operator computes from these tensors.

        It runs before every call, so it has no loop of Python, which would take as long as the operator.
        """
        return (
            len(modules) == len(self.own)
            and all(map(is_, map(attrgetter("__dict__"), modules), self.own))
            and not any(self.hooks)
            and self.facts.hold()
            and [*map(type, modules), *map(type, self.parts)] == self.types
            and [*map(attrgetter("dtype"), self.tensors)] == self.dtypes
        )


_KNOWN: WeakKeyDictionary[nn.Module, _Stack] = WeakKeyDictionary()  # by the first module of a stack


def _stack_of(modules: Sequence[Any]) -> _Stack | None:
    """Return what the operator takes for these modules; None if it does not compute what they do."""
    facts = _Facts()
    parts: dict[tuple[int, str], Any] = {}  # by the parent and the name

    def part(module: Any, path: str) -> Any:
        for name in path.split("."):
            if (id(module), name) not in parts:
                parts[id(module), name] = facts.note(module._modules, name)
            module = parts[id(module), name]
            if type(module) not in _PLAIN:
                return None
        return module

    head_parts = modules[-2:] if type(modules[-1]) is Linear and type(modules[-2]) is RMSNorm else []
    layers = modules[: len(modules) - len(head_parts)]
    if not all(type(module) in _MATRICES for module in layers):
        return None
    matrices = [part(module, path) for module in layers for path in _MATRICES[type(module)]]
    norms = [part(module, path) for module in layers for path in _NORMS[type(module)]]
    if None in matrices or None in norms:
        return None
    norms += head_parts[:1]
    matrices += head_parts[1:]
    weights = [facts.note(matrix._parameters or matrix._buffers, "weight") for matrix in matrices]
    scales = [facts.note(matrix._buffers, "scale") for matrix in matrices if matrix._buffers]
    norm_weights = [facts.note(norm._parameters, "weight") for norm in norms]
    if not all(isinstance(x, Tensor) for x in (*weights, *norm_weights)) or not all(map(stores, weights)):
        return None
    tensors = [*weights, *norm_weights]
    dtypes = [x.dtype for x in tensors]
    if any(x.dtype != torch.float32 for x in norm_weights):
        return None
    head = (norm_weights.pop(), weights.pop()) if head_parts else (None, None)
    eps = [facts.note(norm.__dict__, "eps") for norm in norms]
    attentions = [module._modules.get("self_attn", module) for module in layers]
    windows = [facts.note(attention.__dict__, "window") for attention in attentions]
    of_patches = [isinstance(attention, CrossAttention) for attention in attentions]
    window = windows[of_patches.index(False)]
    every = [*modules, *parts.values()]
    changed = [
        *(facts.note(m.__dict__, "forward") for m in every),
        *(facts.note(matrix._parameters, "bias") for matrix in matrices),
    ]
    hooks = [own for m in every for own in (m._forward_hooks, m._forward_pre_hooks)]
    if any(hooks) or any(x is not None for x in changed) or len({weight.dtype for weight in weights}) > 1:
        return None
    if not isinstance(eps[0], float) or len(set(eps)) > 1:
        return None
    if any(w not in ((None, 1) if patches else (window,)) for w, patches in zip(windows, of_patches, strict=True)):
        return None
    own, types = [module.__dict__ for module in modules], [type(m) for m in every]
    scales = [scale for scale in scales if scale is not None]
    return _Stack(
        own,
        [*parts.values()],
        hooks,
        facts,
        types,
        tensors,
        dtypes,
        weights,
        scales,
        norm_weights,
        head,
        eps[0],
        window,
    )
