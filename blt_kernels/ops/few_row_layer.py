"""few_row_layer: a transformer layer over a few new entries of rows whose earlier keys and values are cached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.ops import _common
from blt_kernels.ops.few_row_linear import MAX_ROWS as MAX_ROWS
from blt_kernels.ops.few_row_linear import check_weight, takes
from blt_kernels.reference import few_row_layer as reference

WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down")

# --- public function --------------------------------------------------------------------------------------------------


def few_row_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    input_norm: Tensor,
    post_norm: Tensor,
    eps: float,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None = None,
) -> Tensor:
    """Return ``h + W_down (silu(W_gate n) * W_up n)`` with ``n = norm(h)`` and ``h = x + W_o attention(norm(x))``.

    Queries and keys have rotary positions. Up to 16 rows of fp32 on the CPU are one call, which reads every weight once
    and records no gradient; everything else is composed of torch's functions. New keys and values are written to the
    cache, also where an error follows.

    Parameters
    ----------
    x : floating ``[T, D]``
        New entries, packed.
    weights : sequence of ``[N, K]``
        The matrices of q, k, v, o, gate, up and down, each of the dtype of `x`, bf16 or int8.
    scales : sequence of ``[N]``
        Factors of the rows of int8 weights, one for each matrix; empty for others.
    input_norm, post_norm : ``[D]``
        Weights of RMSNorm.
    eps : float
    table : complex ``[T, 1, E/2]``
        Of `rotary_table`.
    keys, values : dtype of `x` ``[S, G, E]``
        The cache, which is changed in place.
    index : int64 ``[T]``
        Where in the cache the new keys and values go.
    cu_seqlens_q, cu_seqlens_k : int32 ``[B+1]``
        Offsets of documents among the new entries and in the cache, as in `block_causal_attention`.
    window : int, optional

    Returns
    -------
    dtype of `x` ``[T, D]``

    Raises
    ------
    TypeError, ValueError
        Dtypes, devices or shapes do not match; the message names the argument.

    Examples
    --------
    >>> x, weights = torch.ones(1, 4), [torch.zeros(4, 4)] * 7
    >>> cache, ends = torch.zeros(2, 8, 1, 4), torch.tensor([0, 1], dtype=torch.int32)
    >>> few_row_layer(
    ...     x, weights, (), x[0], x[0], 1e-5, torch.ones(1, 1, 2) + 0j, *cache, torch.tensor([0]), ends, ends
    ... ).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    _checks.check_tensor("x", x, 2, _checks.FLOATS)
    for name, given, allowed in (("weights", weights, (7,)), ("scales", scales, (0, 7))):
        expected = " or ".join(map(str, allowed))
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name}: expected a sequence of {expected} tensors, got {type(given).__name__}")
        if len(given) not in allowed:
            raise ValueError(f"{name}: expected {expected}, of {', '.join(WEIGHTS)}, got {len(given)}")
    for name, cache in (("keys", keys), ("values", values)):
        _checks.check_tensor(name, cache, 3, _checks.FLOATS)
        _checks.check_same(name, cache, "x", x)
        _checks.check_shape(name, cache, keys.shape, "[S, G, E of keys]")
        if _overlaps(cache):
            raise ValueError(f"{name}: expected a cache without overlapping memory, got strides {cache.stride()}")
        if cache.is_neg():
            raise ValueError(f"{name}: expected a cache whose memory has its values, got a negated view")
        if cache.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a cache without gradients, since it is changed, got requires_grad=True")
    if keys.numel() and keys.data_ptr() == values.data_ptr():
        raise ValueError("values: expected other memory than that of keys, got the same")
    factors: Sequence[Tensor | None] = scales or [None] * len(weights)
    for name, weight, scale in zip(WEIGHTS, weights, factors, strict=True):
        check_weight(f"weights of {name}", weight, f"scales of {name}", scale, x)
    (total, dim), (_, kv_heads, width) = x.shape, keys.shape
    if kv_heads == 0 or width == 0 or width % 2:
        raise ValueError(f"keys: expected heads of even width in [S, G, E], got {list(keys.shape)}")
    queries, hidden = weights[0].shape[0] // width * width, weights[WEIGHTS.index("gate")].shape[0]
    keys_size, ffn_size = (kv_heads * width, dim), (hidden, dim)
    sizes = (queries, dim), keys_size, keys_size, (dim, queries), ffn_size, ffn_size
    for name, weight, size in zip(WEIGHTS, weights, (*sizes, (dim, hidden)), strict=True):
        _checks.check_shape(f"weights of {name}", weight, size, "[N, K]")
    if queries // width % kv_heads:
        raise ValueError(f"weights of q: expected a multiple of {kv_heads} heads of keys, got {queries // width}")
    for name, norm in (("input_norm", input_norm), ("post_norm", post_norm)):
        _checks.check_like(name, norm, (1,), "x", x)
        _checks.check_dense(name, norm)
        _checks.check_shape(name, norm, (dim,), "[D of x]")
    _checks.check_number("eps", eps)
    _checks.check_tensor("table", table, 3, (torch.complex64, torch.complex128))
    _checks.check_shape("table", table, (total, 1, width // 2), "[T of x, 1, E of keys / 2]")
    _checks.check_same("table", table, "x", x, dtype=False)
    table = table.resolve_conj()
    _checks.check_tensor("index", index, 1, (torch.int64,))
    _checks.check_same("index", index, "x", x, dtype=False)
    _checks.check_shape("index", index, (total,), "[T of x]")
    if _checks.readable(index):
        outside = [slot for slot in index.tolist() if not 0 <= slot < keys.shape[0]]
        if outside:
            raise ValueError(f"index: expected values from 0 to {keys.shape[0] - 1}, got {outside[0]}")
    cu_seqlens_q = _checks.check_offsets("cu_seqlens_q", cu_seqlens_q, total, device=x.device)
    cu_seqlens_k = _checks.check_offsets("cu_seqlens_k", cu_seqlens_k, keys.shape[0], device=x.device)
    _checks.check_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, "[B+1 of cu_seqlens_q]")
    if window is not None:
        _checks.check_int("window", window, 1)
    contiguous = all(cache.stride()[1:] == (width, 1) for cache in (keys, values))
    kernel = contiguous and table.dtype == torch.complex64 and takes(x, *weights, *scales, input_norm, post_norm)
    documents = index, cu_seqlens_q, cu_seqlens_k, window
    if not kernel:
        arguments = x, weights, scales, input_norm, post_norm, eps, table, keys, values
        return reference.few_row_layer_reference(*arguments, *documents)
    norms, caches = (input_norm, post_norm), ((keys,), (values,))
    return few_row_layer_step(x, weights, scales, norms, eps, table, *caches, *documents, (), (), None, None, None)


def _overlaps(x: Tensor) -> bool:
    """Return whether two elements of `x` may have one place in memory."""
    reach = 0  # the last place of the dimensions with smaller strides
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * max(size - 1, 0)
    return False


# --- schema and fake --------------------------------------------------------------------------------------------------


def _empty(x: Tensor, *rest: object) -> Tensor:
    head = rest[-1]
    return x.new_empty(x.shape if head is None else (x.shape[0], head.shape[0]))  # type: ignore[attr-defined]


# The operator runs a stack of layers. Its lists have the tensors of all of them, end to end.
few_row_layer_step = _common.define(
    "few_row_layer_step",
    "(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] norms, float eps, Tensor table, Tensor(a!)[] keys,"
    " Tensor(b!)[] values, Tensor index, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? window,"
    " Tensor[] patch_keys, Tensor[] patch_values, Tensor? patches, Tensor? head_norm,"
    " Tensor? head) -> Tensor",
    reference.few_row_layer_step_reference,
    _empty,
)
