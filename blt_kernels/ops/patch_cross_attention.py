"""patch_cross_attention: patches read bytes (encode), or bytes read patches (decode).

Every query reads one short run of rows: encoding, the bytes of its patch; decoding, the K vectors of one patch. Nothing
of size bytes times patches exists, in time or in memory.
"""

from __future__ import annotations

from torch import Tensor

from blt_kernels import _checks
from blt_kernels.layout import PatchLayout
from blt_kernels.ops import _common
from blt_kernels.ops._patch_layout import check_layout, check_readers
from blt_kernels.reference import patch_cross_attention as reference


def patch_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PatchLayout,
    *,
    direction: str,
    queries_per_patch: int,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute scaled dot-product attention between the bytes and the patches of a layout.

    Parameters
    ----------
    q, k, v : fp32, bf16, fp16 or fp64
        One side has a row for each byte, ``[T, H, E]`` or ``[B, S, H, E]`` with ``B * S = T``. The other has K rows for
        each patch, ``[C * K, H, E]`` or ``[B, P * K, H, E]`` with ``B * P = C``: row ``p * K + j`` is vector j of patch
        p. E is at most 256 on CUDA. k and v may have fewer heads, ``[*, G, E]`` with a G that divides H: query head h
        reads head ``h // (H / G)``. Padded tensors may have any strides, as transposed ``[B, H, S, E]`` tensors have:
        the CPU reads them where they are, if no patch reads over the end of a row; otherwise, and on CUDA, they are
        packed by a copy. Gradients have their order of dimensions in memory.

        - "encode": q is on the patches, k and v on the bytes.
        - "decode": q is on the bytes, k and v on the patches.
    layout : PatchLayout
        Of T bytes and C patches.
    direction : str
        "encode": the K queries of patch p read the bytes with ``layout.patch_ids == p``. "decode": byte i reads the K
        vectors of patch ``layout.decode_ids[i]``.
    queries_per_patch : int
        K.
    window : int, optional
        Reach back over patches: with w, encoding reads the bytes of patches ``(p - w, p]``, and decoding the vectors of
        patches ``(d - w, d]`` for a byte with decode id d, always within the document. 1 if None.
    scale : float, optional
        Factor of ``q k^T``; ``1 / sqrt(E)`` if None.

    Returns
    -------
    dtype and shape of `q`
        0 for an empty patch, and for a byte that has no patch to read (id -1); they send no gradient either. Bytes
        beyond the last document and patches beyond the last one may hold anything and get gradients of 0.
        Accumulated in fp32 (fp64 for fp64 inputs).

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, device, shape or value; the message names it.

    Notes
    -----
    The BLT paper (arXiv 2412.09871), sections 3.2.2 and 3.3.1; the window is that of facebookresearch/blt's masks.
    Second derivatives are those of the reference, in its time and memory. Under autocast q, k and v are cast to the
    autocast dtype, as in `F.scaled_dot_product_attention`.

    Scores, and products of q and k, may be of any size that fp32 holds. Some gradients have the error of the rounded
    lse: up to 0.05% for scores of 1e4 and 3% for 1e6; beyond they are bounded, but wrong. On the CPU these are those of
    queries with more than 128 keys, with a window, or that encode with grouped heads; on CUDA those of encoding queries
    with 64 keys or more and no window.

    Examples
    --------
    >>> layout = static_patch(torch.tensor([0, 5]), 2).compact()  # patches of 1, 2 and 2 bytes
    >>> q, kv = torch.zeros(3, 1, 8), torch.arange(5.0)[:, None, None].expand(5, 1, 8)
    >>> out = patch_cross_attention(q, kv, kv, layout, direction="encode", queries_per_patch=1)
    >>> out[:, 0, 0].tolist()  # equal scores: the mean of the bytes of each patch
    [0.0, 1.5, 3.5]
    """
    _checks.check_choice("direction", direction, ("encode", "decode"))
    _checks.check_int("queries_per_patch", queries_per_patch, 1)
    encode = direction == "encode"
    _checks.check_tensor("q", q, (3, 4), _checks.FLOATS)
    autocast = _common.autocast_enabled(q)
    for name, x in (("k", k), ("v", v)):
        _checks.check_like(name, x, (3, 4), "q", q, dtype=not autocast)
    check_layout(layout, "q", q)
    try:
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    except RuntimeError:
        _checks.check_all_dense(k=k, v=v)
        raise
    heads, width = q_shape[-2], q_shape[-1]
    if heads < 1 or width < 1:
        raise ValueError(f"q: expected at least one head, of a width of at least 1, got shape {list(q.shape)}")
    kv_heads = k_shape[-2]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"k: expected a number of heads G that divides H = {heads}, got {kv_heads}")
    patch_rows, byte_rows = layout.capacity * queries_per_patch, layout.num_bytes
    q_rows, kv_rows = (patch_rows, byte_rows) if encode else (byte_rows, patch_rows)
    expected = (q_rows, heads, width), (kv_rows, kv_heads, width), (kv_rows, kv_heads, width)
    for name, got, shape in zip("qkv", (q_shape, k_shape, v_shape), expected, strict=True):
        rows = got[0] if len(got) == 3 else got[0] * got[1]
        if (rows, *got[-2:]) != shape:
            on_patches = (name == "q") == encode
            meaning = f"C * K = {layout.capacity} * {queries_per_patch}" if on_patches else f"T = {byte_rows}"
            letter = "H" if name == "q" else "G"
            raise ValueError(
                f"{name}: expected shape [{meaning}, {letter} = {shape[1]}, E = {width}] to {direction},"
                f" got {list(got)}"
            )
    if window is not None:
        _checks.check_int("window", window, 1)
    if scale is not None:
        _checks.check_finite("scale", scale)
    tensors = (q, k, v)
    if q.dim() == 4 or k.dim() == 4 or v.dim() == 4:
        tensors = (*_common.packed(q), *_common.packed(k, v))  # type: ignore[assignment]
    offsets, ids = layout.patch_offsets, layout.patch_ids
    if not encode:
        check_readers(layout)
        offsets, ids = layout.decode_offsets, layout.decode_ids
    out, _lse = patch_cross_attention_fwd(
        *(_common.autocast(**dict(zip("qkv", tensors, strict=True))) if autocast else tensors),
        offsets,
        layout.cu_patches,
        ids,
        direction,
        queries_per_patch,
        window,
        scale,
    )
    return out if q.dim() == out.dim() else out.view(q.shape)


# --- schemas, references and fakes ------------------------------------------------------------------------------------
# offsets and ids are patch_offsets and patch_ids, or decode_offsets and decode_ids, by the direction. The bytes that
# meet patch p lie next to each other: encoding, they are [offsets[p-w+1], offsets[p+1]), cut at the start of the
# document; decoding, those in [offsets[p], offsets[p+w]), cut at its end, that have an id.

_ARGUMENTS = (
    "Tensor offsets, Tensor cu_patches, Tensor ids,"
    " str direction, SymInt queries_per_patch, SymInt? window, float? scale"
)

patch_cross_attention_fwd = _common.define(
    "patch_cross_attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    reference.patch_cross_attention_fwd_reference,
    _common.empty_attention,
)
patch_cross_attention_bwd = _common.define(
    "patch_cross_attention_bwd",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    reference.patch_cross_attention_bwd_reference,
    lambda _grad, q, k, v, *_: _common.empty_gradients(q, k, v),
)


# --- autograd ---------------------------------------------------------------------------------------------------------

_common.register_attention(
    "patch_cross_attention", reference.patch_cross_attention_fwd_reference, patch_cross_attention_bwd
)
