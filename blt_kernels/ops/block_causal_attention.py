"""block_causal_attention: attention that stays within documents, for bytes packed end to end.

Document b has queries ``[cu_seqlens_q[b], cu_seqlens_q[b+1])`` and as many keys as `cu_seqlens_k` or `seqused_k` says.
Its last query is aligned with its last key, so that a query at position i of n attends, of m keys, to those up to
``i + m - n`` if causal, and of these to the last `window`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import gt, sub
from typing import Any

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels._namespace import NAMESPACE
from blt_kernels.layout import AttentionRanges
from blt_kernels.ops import _attention_backend, _common
from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.reference._ragged import backward_takes_padded_heads, takes_padded_heads
from blt_kernels.triton.block_causal_attention import flash


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    seqused_k: Tensor | None = None,
    ranges: AttentionRanges | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute scaled dot-product attention within documents, causal and with a sliding window.

    Parameters
    ----------
    q : fp32, bf16, fp16 or fp64 ``[Tq, H, E]`` or ``[B, Sq, H, E]``
        Queries, packed or padded: padded tensors are B documents of one length.
    k, v : same dtype ``[Tk, G, E]`` or ``[B, Sk, G, E]``
        Keys and values, packed if q is. G divides H; query head h reads head ``h // (H / G)``. Padded tensors may have
        any strides, as transposed ``[B, H, S, E]`` tensors have: the CPU reads them where they are, CUDA packs them by
        a copy. Gradients have their order of dimensions in memory, so that transposing them back makes no copy.
    cu_seqlens_q : int32 or int64 ``[B+1]``, optional
        Documents of packed queries; one document if None. None for padded queries.
    cu_seqlens_k : int32 or int64 ``[B+1]``, optional
        Documents of packed keys, as many as of queries. The offsets of the queries if None: then Tk is Tq.
    window : int, optional
        A query attends to the keys less than `window` positions away, itself counted; to all of its document if None.
        With ``causal=False`` the window reaches to both sides.
    causal : bool
        Whether a query attends to no key behind its own position.
    scale : float, optional
        Factor of ``q k^T``; ``1 / sqrt(E)`` if None.
    seqused_k : int32 or int64 ``[B]``, optional
        Number of keys of each document that count, the first ones, as in a cache with room to spare: what lies behind
        is never read. All of them if None.
    ranges : AttentionRanges, optional
        What `attention_ranges` returns for the same offsets, window, causal and `seqused_k`: on CUDA, forward and
        backward then launch one kernel less each. Layers of one layout share them. Not read on the CPU.
    return_lse : bool
        Return the logsumexp of the scores too.

    Returns
    -------
    out : dtype and shape of `q`
        Contiguous. 0 for a query that attends to no key, or lies beyond the last document. Accumulated in fp32 (fp64
        for fp64 inputs). Such queries, and keys and values that no query attends to, may hold anything and get
        gradients of 0.
    lse : fp32 (fp64 for fp64 inputs) ``q.shape[:-1]``, if `return_lse`
        Natural logarithm; -inf for a query that attends to no key. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device, shape or value; the message names it.

    Notes
    -----
    Second derivatives are those of the reference, in its time and memory. Under autocast q, k and v are cast to the
    autocast dtype, as in `F.scaled_dot_product_attention`. The last query is aligned with the last key as in flash
    attention 2.1 and later: n new bytes and a cache of m keys need no more.

    fp32 on CUDA: errors against fp64 are at most twice those of eager attention in fp32, as on the CPU. Up to a width
    of 128 each product is three products of tf32 on tensor cores, which truncate their sums: so each tile of keys is
    summed from 0, and added to the rest in fp32. Wider heads are multiplied in fp32.

    Scores may be of any size that fp32 holds. On the CPU gradients are about as precise as those of eager attention:
    for queries whose lse is 128 or more, 1024 in 16 bits, backward takes the products of q and k twice. On CUDA
    backward takes the weights ``exp(s - lse)`` from the rounded lse: their relative error is up to about
    ``2^-22 |lse|``, 0.2% for 1e4. Far beyond 1e6 they are finite and at most 1, but need not sum to 1.

    A NaN in q or k reaches the queries that attend to it. A NaN or an infinity in v may also reach queries of the same
    tile for which it is masked, since 0 * NaN is NaN: earlier ones of its document and neighbouring documents. Keys
    that no query attends to are never read, and may hold anything.

    Examples
    --------
    >>> v = torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1).expand(3, 1, 8)
    >>> q = k = torch.zeros(3, 1, 8)  # equal scores: the mean of the bytes so far
    >>> block_causal_attention(q, k, v, torch.tensor([0, 2, 3]))[:, 0, 0].tolist()
    [1.0, 2.0, 5.0]
    """
    _checks.check_tensor("q", q, (3, 4), _checks.FLOATS)
    dims, dtype, device, autocast = q.dim(), q.dtype, q.device, _common.autocast_enabled(q)
    for name, x in (("k", k), ("v", v)):
        if not (isinstance(x, Tensor) and x.dtype == dtype and x.device == device and x.dim() == dims):
            _checks.check_like(name, x, (dims,), "q", q, dtype=not autocast)
    try:
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    except RuntimeError:
        _checks.check_all_dense(k=k, v=v)
        raise
    heads, width, kv_heads = q_shape[-2], q_shape[-1], k_shape[-2]
    if k_shape[-1] != width:
        raise ValueError(f"k: expected the head width E = {width} of q, got shape {list(k.shape)}")
    if v_shape != k_shape:
        raise ValueError(f"v: expected shape {list(k.shape)} of k, got {list(v.shape)}")
    if heads < 1 or width < 1:
        raise ValueError(f"q: expected at least one head, of a width of at least 1, got shape {list(q.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"k: expected a number of heads G that divides H = {heads}, got {kv_heads}")
    if window is not None:
        _checks.check_int("window", window, 1)
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {flag!r}")
    if scale is not None:
        _checks.check_finite("scale", scale)

    if dims == 4:
        for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if offsets is not None:
                raise ValueError(f"{name}: expected None, since q is padded with shape {list(q.shape)}")
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k: expected None, since cu_seqlens_q is None")
    offsets_q, offsets_k, documents, num_queries, num_keys = None, None, 1, q_shape[0], k_shape[0]
    if dims == 4:
        documents, num_queries, num_keys = q_shape[0], q_shape[0] * q_shape[1], k_shape[0] * k_shape[1]
        if k_shape[0] != documents:
            raise ValueError(f"k: expected the B = {documents} documents of q, got shape {list(k.shape)}")
    elif cu_seqlens_q is not None:
        offsets_q = _checks.check_offsets("cu_seqlens_q", cu_seqlens_q, num_queries, device=device)
        documents = offsets_q.numel() - 1
        if cu_seqlens_k is not None:
            offsets_k = _check_key_offsets(cu_seqlens_k, num_keys, offsets_q)
    if dims == 3 and offsets_k is None and num_keys != num_queries:
        raise ValueError(f"cu_seqlens_k: expected offsets, since q has {num_queries} rows and k {num_keys}; got None")
    if offsets_q is None:
        _checks.check_total("q", num_queries)
        _checks.check_total("k", num_keys)
    if seqused_k is not None:
        keys = offsets_q if offsets_k is None else offsets_k
        seqused_k = _check_seqused(seqused_k, keys, documents, num_keys, device)
    intervals = None if ranges is None else _check_ranges(ranges, q, num_queries, num_keys, window, causal)
    if dims == 4:
        q, k, v = _common.packed(q, k, v)
    if autocast:
        q, k, v = _common.autocast(q=q, k=k, v=v)
    out, lse = block_causal_attention_fwd(q, k, v, offsets_q, offsets_k,
        window, causal, scale, seqused_k, intervals, documents,
    )  # fmt: skip
    if q.dim() != dims:
        out, lse = out.view(q_shape), lse.view(q_shape[:-1])
    return (out, lse) if return_lse else out


def attention_ranges(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    num_queries: int,
    num_keys: int | None = None,
    window: int | None = None,
    causal: bool = True,
    seqused_k: Tensor | None = None,
) -> AttentionRanges:
    """Find which keys each query of `block_causal_attention` attends to, once for all layers of a layout.

    Parameters
    ----------
    cu_seqlens_q, cu_seqlens_k, window, causal, seqused_k
        Those of `block_causal_attention`.
    num_queries : int
        Tq, the number of packed queries.
    num_keys : int, optional
        Tk, the number of packed keys. Tq if None.

    Returns
    -------
    AttentionRanges
        For calls with these arguments, on the same device.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device, shape or value; the message names it.

    Examples
    --------
    >>> ranges = attention_ranges(torch.tensor([0, 2, 4]), num_queries=4)
    >>> ranges.intervals.view(4, 4)[:2].tolist()
    [[0, 0, 2, 2], [1, 2, 3, 4]]
    """
    _checks.check_int("num_queries", num_queries, 0)
    if num_keys is None:
        if cu_seqlens_k is not None:
            raise ValueError("num_keys: expected an int, since cu_seqlens_k is not None; got None")
        num_keys = num_queries
    _checks.check_int("num_keys", num_keys, 0)
    if window is not None:
        _checks.check_int("window", window, 1)
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {causal!r}")
    _checks.check_tensor("cu_seqlens_q", cu_seqlens_q, 1, _checks.INTS)
    device = cu_seqlens_q.device
    offsets_q = _checks.check_offsets("cu_seqlens_q", cu_seqlens_q, num_queries, device=device)
    offsets_k = None
    if cu_seqlens_k is not None:
        offsets_k = _check_key_offsets(cu_seqlens_k, num_keys, offsets_q)
    elif num_keys != num_queries:
        raise ValueError(f"num_keys: expected num_queries = {num_queries}, since cu_seqlens_k is None; got {num_keys}")
    if seqused_k is not None:
        keys = offsets_q if offsets_k is None else offsets_k
        seqused_k = _check_seqused(seqused_k, keys, offsets_q.shape[0] - 1, num_keys, device)
    intervals = block_causal_attention_ranges_fwd(
        offsets_q, offsets_k, num_queries, num_keys, window, causal, seqused_k
    )
    return AttentionRanges(intervals, num_queries, num_keys, window, causal)


def _check_key_offsets(cu_seqlens_k: Tensor | _checks.Documents, keys: int, offsets_q: Tensor) -> Tensor:
    """Check the offsets of keys and return them as int32."""
    offsets_k = _checks.check_offsets("cu_seqlens_k", cu_seqlens_k, keys, device=offsets_q.device)
    if offsets_k.numel() != offsets_q.numel():
        expected = f"{offsets_q.numel()} entries, as cu_seqlens_q has"
        raise ValueError(f"cu_seqlens_k: expected {expected}, got {offsets_k.numel()}")
    return offsets_k


def _check_ranges(
    ranges: object, q: Tensor, num_queries: int, num_keys: int, window: int | None, causal: bool
) -> Tensor:
    """Check that `ranges` were made for such a call, as far as the host knows, and return the intervals."""
    if not isinstance(ranges, AttentionRanges):
        raise TypeError(f"ranges: expected an AttentionRanges, got {type(ranges).__name__}")
    _checks.check_same("ranges", ranges.intervals, "q", q, dtype=False)
    if ranges.num_queries != num_queries or ranges.num_keys != num_keys:
        made = f"{ranges.num_queries} queries and {ranges.num_keys} keys"
        raise ValueError(f"ranges: expected those of {num_queries} queries and {num_keys} keys, got {made}")
    if ranges.window != window or ranges.causal != causal:
        made = f"window = {ranges.window} and causal = {ranges.causal}"
        raise ValueError(f"ranges: expected those of window = {window} and causal = {causal}, got {made}")
    return ranges.intervals


def _check_seqused(
    seqused_k: Tensor, offsets_k: Tensor | None, documents: int, num_keys: int, device: torch.device
) -> Tensor:
    """Check the used lengths and return them as int32; their values where they are readable.

    Without `offsets_k` all documents have as many keys.
    """
    _checks.check_tensor("seqused_k", seqused_k, 1, _checks.INTS)
    if seqused_k.device != device:
        raise ValueError(f"seqused_k: expected device {device} of the data, got {seqused_k.device}")
    if seqused_k.numel() != documents:
        raise ValueError(f"seqused_k: expected one entry for each of {documents} documents, got {seqused_k.numel()}")
    if _checks.readable(seqused_k) and (offsets_k is None or _checks.readable(offsets_k)):
        if offsets_k is None:
            lengths = [num_keys // max(documents, 1)] * documents
        else:
            ends = offsets_k.tolist()
            lengths = list(map(sub, ends[1:], ends))
        used = seqused_k.tolist()
        if documents and (min(used) < 0 or any(map(gt, used, lengths))):
            document = next(b for b in range(documents) if not 0 <= used[b] <= lengths[b])
            expected = f"0 to {lengths[document]} keys, the length of document {document}"
            raise ValueError(f"seqused_k: expected {expected}, got {used[document]}")
        if seqused_k.dtype == torch.int32 and seqused_k.is_contiguous():
            return seqused_k
    return seqused_k.clamp(max=_checks.INT32_MAX).to(torch.int32).contiguous()


# --- schemas, references and fakes ------------------------------------------------------------------------------------

# Without cu_seqlens_q there are num_documents documents of one length, of queries as of keys.
_ARGUMENTS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? window, bool causal, float? scale, Tensor? seqused_k,"
    " Tensor? ranges, SymInt num_documents"
)

block_causal_attention_fwd = _common.define(
    "block_causal_attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    reference.block_causal_attention_fwd_reference,
    _common.empty_attention,
)
block_causal_attention_bwd = _common.define(
    "block_causal_attention_bwd",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    reference.block_causal_attention_bwd_reference,
    lambda _grad, q, k, v, *_: _common.empty_gradients(q, k, v),
)


def _empty_ranges(offsets: Tensor, _cu_seqlens_k: Tensor | None, num_queries: int, num_keys: int, *_: Any) -> Tensor:
    return offsets.new_empty((num_queries + 3) // 4 * 8 + (num_keys + 3) // 4 * 8, dtype=torch.int32)


block_causal_attention_ranges_fwd = _common.define(
    "block_causal_attention_ranges_fwd",
    "(Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt num_queries, SymInt num_keys, SymInt? window, bool causal,"
    " Tensor? seqused_k) -> Tensor",
    reference.block_causal_attention_ranges_fwd_reference,
    _empty_ranges,
)


# --- autograd ---------------------------------------------------------------------------------------------------------

_common.register_attention(
    "block_causal_attention", reference.block_causal_attention_fwd_reference, block_causal_attention_bwd
)


# --- CUDA -------------------------------------------------------------------------------------------------------------


@takes_padded_heads
def _forward_cuda(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if _attention_backend.attention_backend() == "flash":
        mask = reference.AttentionMask(*arguments)
        return flash.forward(q, k, v, mask, mask.scale)
    return _launchers()["fwd"](q, k, v, *arguments)


@backward_takes_padded_heads
def _backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _launchers()["bwd"](*arguments)


@cache
def _launchers() -> dict[str, Callable[..., Any]]:
    """Return the Triton launchers by the ends of the operators' names. Triton is imported at the first call."""
    from blt_kernels.triton.block_causal_attention import backward, forward, ranges
    from blt_kernels.triton.capture import refuse_in_captures

    refuse_in_captures()
    return {
        "fwd": forward.block_causal_attention_fwd_cuda,
        "bwd": backward.block_causal_attention_bwd_cuda,
        "ranges_fwd": ranges.block_causal_attention_ranges_fwd_cuda,
    }


def _ranges_cuda(*arguments: Any) -> Tensor:
    return _launchers()["ranges_fwd"](*arguments)


if _attention_backend.HAS_TRITON:
    torch.library.impl(f"{NAMESPACE}::block_causal_attention_fwd", "CUDA", _forward_cuda)
    torch.library.impl(f"{NAMESPACE}::block_causal_attention_bwd", "CUDA", _backward_cuda)
    torch.library.impl(f"{NAMESPACE}::block_causal_attention_ranges_fwd", "CUDA", _ranges_cuda)
