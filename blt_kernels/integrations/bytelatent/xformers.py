"""A stand-in for the few names of xformers that facebookresearch/blt imports, so that it imports and runs without it.

Masks are `AttentionBias`, as those of `bytelatent` are: documents and a window, and no matrix. `block_causal_attention`
computes attention, on every device. Other names of xformers are not here: profiling needs xformers itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from itertools import accumulate
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from blt_kernels.ops.block_causal_attention import block_causal_attention


@dataclass(frozen=True)
class AttentionBias:
    """Restricts causal attention to documents and a window.

    Attributes
    ----------
    cu_seqlens : int32 ``[D+1]``, optional
        Documents of the rows of a batch, packed end to end, which attention does not cross; the rows if None.
    window : int, optional
        Positions that a query attends to, its own included; no limit if None.
    """

    cu_seqlens: Tensor | None = None
    window: int | None = None


class LowerTriangularMask(AttentionBias):
    """Causal attention along a row."""


class BlockDiagonalCausalMask(AttentionBias):
    """Causal attention within documents."""

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int]) -> BlockDiagonalCausalMask:
        """Take the lengths of the documents."""
        return cls(torch.tensor([0, *accumulate(q_seqlen)], dtype=torch.int32))

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalMask:
        """Return the same documents with a window."""
        return replace(self, window=window_size)


class LocalAttentionFromBottomRightMask(AttentionBias):
    """Causal attention along a row, to the last positions."""

    def __init__(self, window_left: int, window_right: int) -> None:
        if window_right != 0:
            raise ValueError(f"window_right: expected 0 in this stand-in for xformers, got {window_right}")
        super().__init__(window=window_left + 1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias | None) -> Tensor:
    """Attend from ``[B, S, H, E]`` to ``[B, S, G, E]``: causal as `bias` says, or to the whole row if it is None."""
    if bias is None:
        out = block_causal_attention(q, k, v, causal=False)
    elif bias.cu_seqlens is None:
        out = block_causal_attention(q, k, v, window=bias.window)
    else:
        cu_seqlens = bias.cu_seqlens.to(q.device)
        rows = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        out = block_causal_attention(*rows, cu_seqlens, window=bias.window)
    assert isinstance(out, Tensor)
    return out.view_as(q)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: AttentionBias | None = None
) -> Tensor:
    """Compute what the function of this name in xformers does, for the masks of this file."""
    if attn_bias is not None and not isinstance(attn_bias, AttentionBias):
        raise TypeError(f"attn_bias: expected a mask of this stand-in for xformers, got {type(attn_bias).__name__}")
    return attend(query, key, value, attn_bias)


class _Profiler:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise ModuleNotFoundError("profiling needs xformers itself: pip install xformers", name="xformers")


def _step() -> None:
    """Do nothing: no profiler runs without xformers."""


def install() -> None:
    """Make ``import xformers`` give the stand-in, for the rest of the process."""
    fmha = {
        "attn_bias": _module(
            "xformers.ops.fmha.attn_bias",
            AttentionBias=AttentionBias,
            LowerTriangularMask=LowerTriangularMask,
            BlockDiagonalCausalMask=BlockDiagonalCausalMask,
            LocalAttentionFromBottomRightMask=LocalAttentionFromBottomRightMask,
        ),
        "memory_efficient_attention": memory_efficient_attention,
        "flash": SimpleNamespace(FwOp=SimpleNamespace(OPERATOR=None)),
    }
    ops = _module("xformers.ops", AttentionBias=AttentionBias, fmha=_module("xformers.ops.fmha", **fmha))
    profiler = _module(
        "xformers.profiler", profile=_Profiler, MemSnapshotsProfiler=_Profiler, PyTorchProfiler=_Profiler, step=_step
    )
    _module("xformers", ops=ops, profiler=profiler)
    # facebookresearch/blt lists these two operators of xformers among those that checkpointing does not recompute.
    ours = SimpleNamespace(default=torch.ops.blt_kernels.block_causal_attention_fwd.default)
    for namespace, name in (("xformers_flash", "flash_fwd"), ("xformers", "efficient_attention_forward_cutlass")):
        setattr(getattr(torch.ops, namespace), name, ours)


def _module(name: str, **values: Any) -> ModuleType:
    module = ModuleType(name, __doc__)
    module.__spec__ = ModuleSpec(name, None, is_package=True)  # importlib.util.find_spec asks for one
    module.__path__ = []
    vars(module).update(values)
    sys.modules[name] = module
    return module
