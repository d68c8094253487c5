"""What the kernels of block_causal_attention share: loads and masks of tiles, the softmax, preparation of arguments."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_kernels.triton.attention_launch import WIDTHS

_LOG2_E = math.log2(math.e)
MIN_SCALE = 1e-37  # a smaller scale counts as 0
_MAX_ROWS = (1 << 31) - 256  # so that ends of tiles fit into 32 bits
_MAX_STRIDE = 1 << 22  # of rows, so that offsets within a tile fit into 32 bits


@triton.jit
def row_mask(live, width, E: tl.constexpr, EVEN: tl.constexpr):
    """Return the mask of a ``[rows, E]`` tile of which the rows `live` and the first `width` columns are loaded."""
    return live[:, None] if EVEN else live[:, None] & (tl.arange(0, E) < width)[None, :]


@triton.jit
def tile_at(x, start, stride, local, E: tl.constexpr):
    """Return pointers ``[rows, E]`` to the rows `start` + `local`: 64 bits to the first one, 32 from there on."""
    return x + start.to(tl.int64) * stride + (local[:, None] * stride + tl.arange(0, E)[None, :])


@triton.jit
def packed_at(x, row, width, E: tl.constexpr, KNOWN: tl.constexpr):
    """Return pointers ``[rows, E]`` to rows of `width` without gaps, to store there.

    KNOWN: the width is E. Stores are then of 16 bytes, not of one number, and go through shared memory, for which there
    are registers where heads are narrow.
    """
    return x + row[:, None] * (E if KNOWN else width) + tl.arange(0, E)[None, :]


@triton.jit
def load_rows(tile, width, E: tl.constexpr, EVEN: tl.constexpr):
    """Load a tile, all of whose rows are there."""
    if EVEN:
        return tl.load(tile)
    return tl.load(tile, mask=(tl.arange(0, E) < width)[None, :], other=0.0)


@triton.jit
def multiply(x, power):
    """Return a tile times `power` of `scales`, which rounds nothing."""
    return (x.to(tl.float32) * power).to(x.dtype)


@triton.jit
def is_partial(start, first, last, STEP: tl.constexpr):
    """Whether some row does not see all of the tile from `start` on."""
    return (start < tl.max(first)) | (start + STEP > tl.min(last))


@triton.jit
def sees(first, last, start, end, STEP: tl.constexpr):
    """Return which rows see which of the tile from `start` on, in a run that stops at `end`: ``[ROWS, STEP]``."""
    other = start + tl.arange(0, STEP)
    return (first[:, None] <= other[None, :]) & (other[None, :] < tl.minimum(last, end)[:, None])


@triton.jit
def attend_run(
    acc, top, total, q, k, v, stride_kt, stride_vt, scale, first, last, begin, end, width,
    STEP: tl.constexpr, E: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """Add the keys ``[begin, end)`` to what the rows `q` ``[ROWS, E]`` have seen.

    `acc` is the sum of values with weights ``exp2(scale * (score - top))``, and `total` that of the weights. Without
    EXACT an exponent is one fused multiply-add, off by half a unit in the last place of ``scale * top``: `top` is right
    whatever its size, but weights are wrong by any factor where it is huge. STAGES are tiles in flight; as launched if
    None.
    """
    step = tl.arange(0, STEP)
    for offset in tl.range(0, end - begin, STEP, num_stages=STAGES):
        start = begin + offset
        local = tl.minimum(step, end - 1 - start)  # the last key again, not what is behind it
        k_rows = load_rows(tile_at(k, start, stride_kt, local, E), width, E, EVEN)
        v_rows = load_rows(tile_at(v, start, stride_vt, local, E), width, E, EVEN)
        score = tl.dot(q, k_rows.T, input_precision=PRECISION)  # [ROWS, STEP]
        if is_partial(start, first, last, STEP):
            if EXACT:
                seen = sees(first, last, start, end, STEP)
            else:  # one unsigned comparison a pair, since a key in front of `first` is a huge one behind it
                count = tl.maximum(tl.minimum(last, end) - first, 0).to(tl.uint32)
                seen = (step[None, :] - (first - start)[:, None]).to(tl.uint32) < count[:, None]
            score = tl.where(seen, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # 0 for rows that have not seen a key yet
        p = tl.exp2((score - base[:, None]) * scale) if EXACT else tl.exp2(score * scale - (base * scale)[:, None])
        decay = tl.exp2((top - base) * scale)  # exactly 1 where the top stays
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


# --- arguments --------------------------------------------------------------------------------------------------------


def rows_of(x: Tensor) -> Tensor:
    """Return `x`, or a copy, with a last dimension of unit stride and rows that are not too far apart."""
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
    nothing and no product overflows whose score does not; products of fp16 never do, and rows of fp16 would lose bits.
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
    """Return the strides of rows and heads of each tensor."""
    return tuple(x.stride(dim) for x in tensors for dim in (0, 1))


def processors(x: Tensor) -> int:
    """Return how many multiprocessors the GPU of `x` has; a few on the CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


def runs_here(x: Tensor) -> bool:
    """Whether the kernels take heads like those of `x`; the reference takes fp64 and heads that are wider."""
    return x.dtype != torch.float64 and x.shape[-1] <= WIDTHS[-1]


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_documents: int,
    window: int | None,
    seqused_k: Tensor | None,
) -> None:
    """Raise ValueError unless shapes and types are such that no access can be out of bounds."""
    if k.shape != v.shape or q.shape[2] != k.shape[2] or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q, k, v: shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)} do not fit together")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[1] * q.shape[2] >= _MAX_STRIDE:
        raise ValueError(f"q: expected rows of fewer than {_MAX_STRIDE} numbers, got shape {list(q.shape)}")
    if max(q.shape[0], k.shape[0]) > _MAX_ROWS:
        raise ValueError(f"q, k: expected at most {_MAX_ROWS} rows, got {q.shape[0]} and {k.shape[0]}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected a value >= 1, got {window}")
    documents = num_documents if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k: expected None without cu_seqlens_q, got a tensor")
        for name, total in (("q", q.shape[0]), ("k", k.shape[0])):
            if documents < 0 or total % max(documents, 1) or (total and not documents):
                raise ValueError(f"num_documents: expected a divisor of the {total} rows of {name}, got {documents}")
    elif cu_seqlens_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected the {q.shape[0]} rows of q, got {k.shape[0]}")
    for name, x, size in (
        ("cu_seqlens_q", cu_seqlens_q, documents + 1),
        ("cu_seqlens_k", cu_seqlens_k, documents + 1),
        ("seqused_k", seqused_k, documents),
    ):
        if x is not None and (x.dtype != torch.int32 or x.shape != (size,) or not x.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous int32 [{size}], got {x.dtype} {list(x.shape)}")
