"""H-Net (goombalab/hnet) on the ops: `apply` replaces its chunking, its smoothing and its attention.

`chunk` and `dechunk` do the same to tensors, on any device and without H-Net, whose package imports on CUDA only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from blt_kernels import _checks
from blt_kernels.integrations._applied import Applied, check_model, check_parameters, stock, version_of
from blt_kernels.layout import PatchLayout
from blt_kernels.ops._patch_layout import check_layout
from blt_kernels.ops.block_causal_attention import block_causal_attention
from blt_kernels.ops.boundary_patch import boundary_patch
from blt_kernels.ops.ema_scan import ema_scan
from blt_kernels.ops.patch_pool import patch_pool
from blt_kernels.ops.patch_unpool import patch_unpool

# Maps what `apply` replaces to the op that computes it.
REPLACES = {
    "ChunkLayer.forward": "patch_pool",
    "DeChunkLayer.forward": "ema_scan",
    "FlashCausalSelfAttention.forward": "block_causal_attention",
    "FlashCausalCrossAttention.forward": "block_causal_attention",
}
MIN_WEIGHT = 1e-4  # H-Net clamps the weights of chunks to [MIN_WEIGHT, 1 - MIN_WEIGHT]


def chunk(hidden_states: Tensor, boundary_mask: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, PatchLayout]:
    """Keep the vectors at boundaries, as H-Net's ``ChunkLayer`` does.

    Parameters
    ----------
    hidden_states : ``[T, D]``
    boundary_mask : bool ``[T]``
        The bytes that start a chunk. The first byte of a document starts one whatever its mark.
    cu_seqlens : int32 or int64 ``[B+1]``, optional
        Documents, which may be empty; one document if None.

    Returns
    -------
    chunks : ``[P, D]``
    layout : PatchLayout
        The chunks as patches: ``cu_patches`` has the documents of the chunks, and `dechunk` takes it.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device or shape; the message names it.

    Examples
    --------
    >>> marks = torch.tensor([True, False, True, False])
    >>> chunks, layout = chunk(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), marks)
    >>> chunks.flatten().tolist(), layout.cu_patches.tolist()
    ([1.0, 3.0], [0, 2])
    """
    _checks.check_tensor("hidden_states", hidden_states, (2, 3), _checks.FLOATS)
    _checks.check_tensor("boundary_mask", boundary_mask, (1, 2), (torch.bool,))
    _checks.check_shape("boundary_mask", boundary_mask, hidden_states.shape[:-1], "that of hidden_states without D")
    layout = boundary_patch(boundary_mask, cu_seqlens, at="start").compact()
    return patch_pool(hidden_states, layout, "first"), layout


def dechunk(chunks: Tensor, boundary_prob: Tensor, layout: PatchLayout) -> Tensor:
    """Smooth chunks along each document and give every byte its chunk's average, as H-Net's ``DeChunkLayer`` does.

    Parameters
    ----------
    chunks : ``[P, D]``
    boundary_prob : fp32, bf16, fp16 or fp64 ``[T]``
        The probability that a byte is a boundary. That of the first byte of a chunk is the chunk's weight in
        `ema_scan`, clamped to [1e-4, 1 - 1e-4].
    layout : PatchLayout
        From `chunk`.

    Returns
    -------
    dtype of `chunks` ``[T, D]``
        Accumulated in fp32 (fp64 for fp64 chunks). H-Net's own kernel rounds weights to bf16.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device or shape; the message names it.

    Examples
    --------
    >>> marks = torch.tensor([True, False, True, False])
    >>> chunks, layout = chunk(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), marks)
    >>> dechunk(chunks, torch.tensor([1.0, 0.1, 0.5, 0.2]), layout).flatten().round(decimals=3).tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    _checks.check_tensor("chunks", chunks, 2, _checks.FLOATS)
    check_layout(layout, "chunks", chunks)
    _checks.check_shape("chunks", chunks, (layout.capacity, None), "[P, D] of layout")
    _checks.check_tensor("boundary_prob", boundary_prob, (1, 2), _checks.FLOATS)
    _checks.check_same("boundary_prob", boundary_prob, "chunks", chunks, dtype=False)
    if boundary_prob.numel() != layout.num_bytes:
        raise ValueError(
            f"boundary_prob: expected the {layout.num_bytes} bytes of layout, got shape {list(boundary_prob.shape)}"
        )
    return _smooth(chunks, boundary_prob, layout, layout.cu_patches)


def _smooth(chunks: Tensor, probability: Tensor, layout: PatchLayout, cu_chunks: Tensor | None) -> Tensor:
    """Compute `dechunk` of packed chunks ``[P, D]``, or of chunks ``[B, M, D]`` where `cu_chunks` is None."""
    # Clamped in fp32, since 1 - MIN_WEIGHT is 1 in bf16.
    weights = probability.to(torch.promote_types(probability.dtype, torch.float32)).clamp(MIN_WEIGHT, 1 - MIN_WEIGHT)
    of_chunks = patch_pool(weights.flatten()[:, None], layout, "first").view(chunks.shape[:-1])
    return patch_unpool(ema_scan(chunks, of_chunks, cu_chunks).flatten(0, -2), layout)


def apply(model: nn.Module | None = None, *, attention: bool = True, chunking: bool = True) -> Applied:
    """Run H-Net on the ops: packed documents and padded rows, in any dtype, on any device.

    Parameters
    ----------
    model : nn.Module, optional
        Only the layers of this model are replaced; the classes, and so every model, if None.
    attention : bool
        Replace the attention of training and of prefill; a window of w is `window` = w + 1 here. Generation goes on
        with flash-attn's ``flash_attn_with_kvcache``.
    chunking : bool
        Replace ``ChunkLayer`` and ``DeChunkLayer``. Documents may be empty. Padding behind the chunks of a row holds
        zeros; H-Net's own holds vectors that are no chunks.

    Returns
    -------
    Applied
        Its `undo` brings H-Net's own back. Calls that its own assertions refuse and rows without any chunk are left to
        it; `report` counts them.
        A copy of a changed model is changed as well, and stays so. A pickled one is loaded with H-Net's methods as its
        own attributes: ``apply(model)`` replaces them, and ``apply()`` does not.

    Raises
    ------
    ModuleNotFoundError
        H-Net is not installed, or a package that it imports.
    TypeError
        A function takes other parameters than in H-Net at 3673fe1; the message names them. Or `model` is no module, or
        an option no bool.
    ValueError
        The model has no layer of H-Net that was asked for, or both options are False.

    Examples
    --------
    >>> from blt_kernels.integrations import hnet
    >>> from hnet.modules.dc import ChunkLayer, DeChunkLayer
    >>> layers = torch.nn.ModuleList([ChunkLayer(), DeChunkLayer(32)])
    >>> with hnet.apply(layers, attention=False) as applied:
    ...     marks = torch.tensor([True, False, True])
    ...     chunks, cu_chunks, longest, _ = layers[0](torch.randn(3, 32), marks, torch.tensor([0, 3]))
    >>> chunks.shape, cu_chunks.tolist(), longest
    (torch.Size([2, 32]), [0, 2], 2)
    >>> applied.report().replaced
    {'ChunkLayer.forward': 1, 'DeChunkLayer.forward': 0}
    """
    check_model(model)
    _checks.check_bool("attention", attention)
    _checks.check_bool("chunking", chunking)
    if not attention and not chunking:
        raise ValueError("attention, chunking: expected one of them to be True, got False for both")
    applied = Applied(f"hnet {version_of(import_module('hnet'))}")
    modules = [*(["hnet.modules.dc"] if chunking else []), *(["hnet.modules.mha"] if attention else [])]
    found = 0
    for module in modules:
        for name, (parameters, make) in _REPLACEMENTS[module].items():
            layer = getattr(import_module(module), name)
            theirs, label = stock(layer, "forward"), f"{name}.forward"
            check_parameters(theirs, ("self", *parameters), applied.code_base)
            applied.add_label(label)
            forward = make(theirs, applied, label)
            owners = [layer] if model is None else [own for own in model.modules() if isinstance(own, layer)]
            for owner in owners:
                applied.replace(owner, "forward", forward if owner is layer else MethodType(forward, owner))
            found += len(owners)
    if not found:
        raise ValueError(f"model: expected a layer of {' or '.join(modules)} in it, got {type(model).__name__}")
    return applied


# --- replacements -----------------------------------------------------------------------------------------------------


def _chunk_layer(theirs: Callable[..., Any], applied: Applied, label: str) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        boundary_mask: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, int | None, Tensor | None]:
        if cu_seqlens is not None:
            applied.count(label)
            chunks, layout = chunk(hidden_states, boundary_mask, cu_seqlens)
            return chunks, layout.cu_patches, int(layout.cu_patches.diff().max()), None
        counts = boundary_mask.sum(-1)
        slots = int(counts.max()) if mask is not None else 0
        if not slots:
            applied.fell_back(label, "neither documents nor a mask" if mask is None else "rows without a chunk")
            return theirs(self, hidden_states, boundary_mask, cu_seqlens=cu_seqlens, mask=mask)
        applied.count(label)
        chunks = patch_pool(hidden_states, _padded_layout(boundary_mask, slots), "first")
        used = torch.arange(slots, device=counts.device) < counts[:, None]
        return chunks.view(-1, slots, hidden_states.shape[-1]), None, None, used

    return forward


def _dechunk_layer(theirs: Callable[..., Any], applied: Applied, label: str) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        boundary_mask: Tensor,
        boundary_prob: Tensor,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if inference_params is not None and (mask is None or not boundary_mask[:, 0].all()):
            applied.fell_back(label, "prefill of rows that do not start with a boundary, or without a mask")
            return theirs(self, hidden_states, boundary_mask, boundary_prob, cu_seqlens, inference_params, mask)
        applied.count(label)
        probability = boundary_prob[..., -1]
        if cu_seqlens is not None:
            # The first byte of every document is a boundary, so one document of all bytes has the same chunks.
            layout = boundary_patch(boundary_mask, at="start", max_patches=hidden_states.shape[0] or None)
            return _smooth(hidden_states, probability, layout, cu_seqlens)
        layout = _padded_layout(boundary_mask, hidden_states.shape[1])
        out = _smooth(hidden_states, probability, layout, None).view(*boundary_mask.shape, -1)
        if inference_params is not None:
            inference_params.last_value.copy_(out[:, -1])
        return out

    return forward


def _padded_layout(boundary_mask: Tensor, slots: int) -> PatchLayout:
    """Return the chunks of rows ``[B, S]`` with room for `slots` of them in each row."""
    ids = boundary_mask.cumsum(1) - 1
    return PatchLayout.from_ids(ids, ids, slots)


def _self_attention(_theirs: Callable[..., Any], applied: Applied, label: str) -> Callable[..., Any]:
    def forward(self: Any, qkv: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        q, k, v = qkv.unbind(-3)
        return _attend(self, q, k, v, cu_seqlens, cu_seqlens)

    return applied.counted(label, forward)


def _cross_attention(_theirs: Callable[..., Any], applied: Applied, label: str) -> Callable[..., Any]:
    def forward(
        self: Any,
        q: Tensor,
        kv: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        k, v = kv.unbind(-3)
        return _attend(self, q, k, v, cu_seqlens, cu_seqlens_k)

    return applied.counted(label, forward)


def _attend(layer: Any, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor | None, cu_keys: Tensor | None) -> Tensor:
    # flash-attn counts the keys before the query, and -1 is no window.
    before = layer.window_size[0] if isinstance(layer.window_size, tuple) else layer.window_size
    out = block_causal_attention(
        q, k, v, cu_queries, cu_keys, window=None if before < 0 else before + 1, scale=layer.softmax_scale
    )
    assert isinstance(out, Tensor)
    return out


_DECHUNK = ("hidden_states", "boundary_mask", "boundary_prob", "cu_seqlens", "inference_params", "mask")
_CROSS = ("q", "kv", "cu_seqlens", "max_seqlen", "cu_seqlens_k", "max_seqlen_k")
# Maps each class to the parameters of its forward, without self, and the function that makes the replacement.
_REPLACEMENTS: dict[str, dict[str, tuple[tuple[str, ...], Callable[..., Any]]]] = {
    "hnet.modules.dc": {
        "ChunkLayer": (("hidden_states", "boundary_mask", "cu_seqlens", "mask"), _chunk_layer),
        "DeChunkLayer": (_DECHUNK, _dechunk_layer),
    },
    "hnet.modules.mha": {
        "FlashCausalSelfAttention": (("qkv", "cu_seqlens", "max_seqlen"), _self_attention),
        "FlashCausalCrossAttention": (_CROSS, _cross_attention),
    },
}
