"""The kernels of block_causal_attention share this: loads and masks of tiles, the softmax, checks of arguments.

A tile is ``[BLOCK_M queries, BLOCK_N keys]``. Heads of HEAD_DIM numbers are padded to BLOCK_D in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.reference.block_causal_attention import AttentionMask
from blt_kernels.triton.block_causal_attention.launch import HEAD_DIMS

_LOG2_E = math.log2(math.e)
MIN_SCALE = 1e-37  # a smaller scale counts as 0
_MAX_LENGTH = (1 << 31) - 256  # of queries and keys, so that ends of tiles fit into 32 bits
_MAX_STRIDE = 1 << 22  # from one query or key to the next, so that offsets within a tile fit into 32 bits


@triton.jit
def head_mask(inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the mask of a ``[N, BLOCK_D]`` tile: the rows that are `inside`, and their HEAD_DIM numbers."""
    return inside[:, None] if HEAD_DIM == BLOCK_D else inside[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def tile_at(x, start, stride, offsets, BLOCK_D: tl.constexpr):
    """Return pointers ``[N, BLOCK_D]`` to `start` + `offsets`: 64 bits to the first one, 32 from there on."""
    return x + start.to(tl.int64) * stride + (offsets[:, None] * stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def packed_at(x, index, head_dim, BLOCK_D: tl.constexpr, KNOWN: tl.constexpr):
    """Return pointers ``[N, BLOCK_D]`` to heads without gaps, to store there.

    KNOWN: `head_dim` is BLOCK_D. Stores are then of 16 bytes, not of one number, and go through shared memory, for
    which there are registers where heads are narrow.
    """
    return x + index[:, None] * (BLOCK_D if KNOWN else head_dim) + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_heads(pointers, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a tile, all of whose rows are inside."""
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def multiply(x, power):
    """Return a tile times `power` of `scales`, which rounds nothing."""
    return (x.to(tl.float32) * power).to(x.dtype)


@triton.jit
def unmasked(first, last, start, end, BLOCK: tl.constexpr):
    """Return which pairs of the tile from `start` on, in a range that stops at `end`, attend: ``[rows, BLOCK]``."""
    other = start + tl.arange(0, BLOCK)
    return (first[:, None] <= other[None, :]) & (other[None, :] < tl.minimum(last, end)[:, None])


@triton.jit
def attend_range(
    acc, m_i, l_i, q, k, v, stride_kt, stride_vt, scale, first, last, begin, end,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """Add the keys ``[begin, end)`` to the softmax of the queries `q` ``[BLOCK_M, BLOCK_D]``.

    `acc` is the sum of values with weights ``exp2(scale * (score - m_i))``, and `l_i` that of the weights. Without
    EXACT an exponent is one fused multiply-add, off by half a unit in the last place of ``scale * m_i``: `m_i` is right
    whatever its size, but weights are wrong by any factor where it is huge. STAGES are tiles in flight; as launched if
    None.
    """
    offs_n = tl.arange(0, BLOCK_N)
    for offset in tl.range(0, end - begin, BLOCK_N, num_stages=STAGES):
        start = begin + offset
        local = tl.minimum(offs_n, end - 1 - start)  # the last key again, not what is behind it
        k_tile = load_heads(tile_at(k, start, stride_kt, local, BLOCK_D), HEAD_DIM, BLOCK_D)
        v_tile = load_heads(tile_at(v, start, stride_vt, local, BLOCK_D), HEAD_DIM, BLOCK_D)
        score = tl.dot(q, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if (start < tl.max(first)) | (start + BLOCK_N > tl.min(last)):  # part of the tile is masked
            if EXACT:
                attends = unmasked(first, last, start, end, BLOCK_N)
            else:  # one unsigned comparison a pair, since a key in front of `first` is a huge one behind it
                count = tl.maximum(tl.minimum(last, end) - first, 0).to(tl.uint32)
                attends = (offs_n[None, :] - (first - start)[:, None]).to(tl.uint32) < count[:, None]
            score = tl.where(attends, score, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(score, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # 0 for queries that have not met a key yet
        p = tl.exp2((score - base[:, None]) * scale) if EXACT else tl.exp2(score * scale - (base * scale)[:, None])
        decay = tl.exp2((m_i - base) * scale)  # exactly 1 where the maximum stays
        l_i = l_i * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        m_i = m_new
    return acc, m_i, l_i


# --- arguments --------------------------------------------------------------------------------------------------------


def loadable(x: Tensor) -> Tensor:
    """Return `x`, or a copy, with a last dimension of unit stride and heads that are not too far apart."""
    return x if x.stride(2) == 1 and abs(x.stride(0)) < _MAX_STRIDE else x.contiguous()


def scale_of(scale: float | None, x: Tensor) -> float:
    """Return the scale, or that of the head width of `x`."""
    return x.shape[-1] ** -0.5 if scale is None else float(scale)


def positive_scale(scale: float | None, q: Tensor) -> tuple[Tensor, float]:
    """Return `q` and a scale above 0, of which the scores are the same: other scales are rare, and take a copy of q."""
    scale = scale_of(scale, q)
    if abs(scale) < MIN_SCALE:
        return q * 0, 1.0
    return (-q, -scale) if scale < 0 else (q, scale)


def scales(scale: float, x: Tensor) -> tuple[float, float, float]:
    """Return `power`, which one side of the products of `x` is multiplied by, and their factors for exp2 and for exp.

    The scale, which is above 0, is ``power * factor``. The power is a power of two of at most 1, so that it rounds
    nothing and no product overflows whose score does not; products of fp16 never do, and fp16 would lose bits.
    """
    power = 1.0 if x.dtype == torch.float16 else 2.0 ** min(math.frexp(scale)[1] - 1, 0)
    factor = scale / power
    return power, factor * _LOG2_E, factor


def precision_of(x: Tensor) -> str:
    """Return how products are made. Those of fp32 keep all of its bits: in three products of tf32, where they fit."""
    if x.dtype != torch.float32:
        return "tf32"  # which is not used
    return "tf32x3" if x.shape[-1] <= 128 else "ieee"


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of the first two dimensions of each tensor: queries or keys, and heads."""
    return tuple(x.stride(dim) for x in tensors for dim in (0, 1))


def processors(x: Tensor) -> int:
    """Return how many multiprocessors the GPU of `x` has; a few on the CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


def runs_here(x: Tensor) -> bool:
    """Return whether the kernels take heads like those of `x`; the reference takes fp64 and wider heads."""
    return x.dtype != torch.float64 and x.shape[-1] <= HEAD_DIMS[-1]


def check(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> None:
    """Raise ValueError unless shapes and types are such that no access can be out of bounds."""
    if k.shape != v.shape or q.shape[2] != k.shape[2] or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q, k, v: shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)} do not fit together")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[1] * q.shape[2] >= _MAX_STRIDE:
        raise ValueError(f"q: expected queries of fewer than {_MAX_STRIDE} numbers, got shape {list(q.shape)}")
    if max(q.shape[0], k.shape[0]) > _MAX_LENGTH:
        raise ValueError(f"q, k: expected a length of at most {_MAX_LENGTH}, got {q.shape[0]} and {k.shape[0]}")
    documents = mask.num_documents
    if mask.window is not None and mask.window < 1:
        raise ValueError(f"window: expected a value >= 1, got {mask.window}")
    if mask.cu_seqlens_q is None:
        if mask.cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k: expected None without cu_seqlens_q, got a tensor")
        for name, length in (("q", q.shape[0]), ("k", k.shape[0])):
            if documents < 0 or length % max(documents, 1) or (length and not documents):
                raise ValueError(f"num_documents: expected a divisor of the length {length} of {name}, got {documents}")
    elif mask.cu_seqlens_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected the length {q.shape[0]} of q, got {k.shape[0]}")
    for name, x, size in (
        ("cu_seqlens_q", mask.cu_seqlens_q, documents + 1),
        ("cu_seqlens_k", mask.cu_seqlens_k, documents + 1),
        ("seqused_k", mask.seqused_k, documents),
    ):
        if x is not None and (x.dtype != torch.int32 or x.shape != (size,) or not x.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous int32 [{size}], got {x.dtype} {list(x.shape)}")
