"""entropy_patch: from next-byte logits to patches, and every other way to cut bytes into patches.

Local index i counts from 0 at the first byte of a document. Patches start at 0 and 1 whatever the entropies are, and at
i + 1 where the rule says so for byte i. Byte 0's entropy is never read. The rule applied to a document's last byte
decides about the byte to come, which only `PatchLayout.decode_ids` shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from blt_kernels import _checks
from blt_kernels.layout import PatchLayout
from blt_kernels.ops import _autograd, _common
from blt_kernels.ops._patch_layout import DOCUMENTS, LAYOUT, define_scheme, empty_layout, layout_of
from blt_kernels.ops.token_entropy import check_alphabet, empty_entropy, logits_grad, save_logits
from blt_kernels.reference import entropy_patch as reference

# --- public functions -------------------------------------------------------------------------------------------------


def entropy_patch(
    logits: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    threshold: float,
    threshold_add: float | None = None,
    monotonic: bool = False,
    max_patch_length: int | None = None,
    compare: str = "fp32",
    max_patches: int | None = None,
) -> tuple[Tensor, PatchLayout]:
    """Cut bytes into patches where the next byte is hard to predict, straight from the logits.

    One pass over the logits gives the entropies (see `token_entropy`); `patch_starts` describes the rules. The
    entropies are differentiable in the logits, the layout is not.

    Parameters
    ----------
    logits : fp32, bf16, fp16 or fp64 ``[T, A]`` or ``[B, S, A]``
        Row i predicts byte i + 1.
    cu_seqlens : int32 or int64 ``[B+1]``, optional
        Documents of packed logits; one document if None. Padded logits are B documents of length S.
    threshold, threshold_add, monotonic, max_patch_length, max_patches
        As in `patch_starts`.
    compare : str
        "fp32", whatever the dtype of the logits, or "model": entropies are rounded to the dtype of the logits, and
        compared as in `patch_starts`. The entropies that are returned are not rounded.

    Returns
    -------
    entropy : fp32 (fp64 for fp64 logits) ``logits.shape[:-1]``
        In nats. 0 for rows beyond the last document, which may hold anything and get no gradient.
    layout : PatchLayout
        With capacity `max_patches`, or T.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Notes
    -----
    The BLT paper (arXiv 2412.09871), section 2.3; its released models use ``threshold=1.335442066192627``.

    With ``compare="model"`` a decision of a bf16 model may still differ from that of transformers, which computes the
    entropy itself in bf16. `patch_starts` of its entropies decides as it does, always.

    Examples
    --------
    >>> logits = torch.zeros(4, 260)
    >>> logits[1, 65] = 100.0  # the model is sure of the byte after byte 1
    >>> entropy, layout = entropy_patch(logits, threshold=1.0)
    >>> [round(h, 2) for h in entropy.tolist()]  # in nats: ln 260 = 5.56
    [5.56, 0.0, 5.56, 5.56]
    >>> layout.compact().patch_offsets.tolist()  # bytes 1 and 2 are one patch
    [0, 1, 3, 4]
    """
    _checks.check_tensor("logits", logits, (2, 3), _checks.FLOATS)
    check_alphabet("logits", logits.shape[-1])
    rules = _check_rules(threshold, threshold_add, monotonic, max_patch_length, compare)
    packed, offsets, documents = _checks.documents_of("logits", logits, cu_seqlens, trailing=1)
    _checks.check_capacity(max_patches, documents)
    entropy, _log_sum, *layout = entropy_patch_fwd(packed, offsets, documents, *rules, max_patches)
    return entropy if logits.dim() == 2 else entropy.view(logits.shape[:-1]), layout_of(layout, offsets)


def patch_starts(
    entropy: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    threshold: float,
    threshold_add: float | None = None,
    monotonic: bool = False,
    max_patch_length: int | None = None,
    compare: str = "fp32",
    max_patches: int | None = None,
) -> PatchLayout:
    """Cut bytes into patches by entropies that are already there.

    Per document, with local index i (the rules of facebookresearch/blt's patcher):

    - by default ``entropy[i] > threshold``, strictly, for i >= 1 starts a patch at i + 1;
    - `monotonic`: ``entropy[i] - entropy[i-1] > threshold`` for i >= 2 does, and 2 is always a start;
    - `threshold_add`: ``entropy[i] - entropy[i-1] > threshold_add and entropy[i] > threshold`` for i >= 2 does, 2 is
      always a start, 3 never is. Ignored if `monotonic` is set.

    Parameters
    ----------
    entropy : fp32, bf16, fp16 or fp64 ``[T]`` or ``[B, S]``
        In nats.
    cu_seqlens : int32 or int64 ``[B+1]``, optional
        Documents of packed entropies; one document if None.
    threshold, threshold_add : float
        In nats.
    max_patch_length : int, optional
        Cut longer patches from the left into ``[m, m, ..., rest]``. The byte to come counts.
    compare : str
        "fp32": entropies and thresholds are rounded to fp32 and compared there. "model": in the dtype of the entropies,
        as PyTorch does: thresholds and differences are rounded to it. In bf16 the released threshold becomes 1.3359375.
    max_patches : int, optional
        Capacity C of the layout, at least the number of documents; T if None. If it is too small, surplus bytes stay in
        the last patch of their document and ``layout.overflowed`` is true.

    Returns
    -------
    PatchLayout
        The patches, on the device of the argument. Its `overflowed` is true where `max_patches` was too small.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Examples
    --------
    >>> entropy = torch.tensor([9.0, 0.5, 2.0, 0.5, 2.0, 0.5])
    >>> patch_starts(entropy, threshold=1.0).compact().patch_offsets.tolist()  # entropy[0] is never read
    [0, 1, 3, 5, 6]
    """
    _checks.check_tensor("entropy", entropy, (1, 2), _checks.FLOATS)
    rules = _check_rules(threshold, threshold_add, monotonic, max_patch_length, compare)
    return _cut(patch_starts_fwd, "entropy", entropy.detach(), cu_seqlens, *rules, max_patches)


def space_patch(tokens: Tensor, cu_seqlens: Tensor | None = None, *, max_patches: int | None = None) -> PatchLayout:
    """Cut after space-like bytes: the BLT-Space scheme.

    A byte is space-like unless it is an ASCII letter or digit, or a UTF-8 continuation byte. The first of a run of
    space-like bytes ends a patch, and so does every special id (< 4).

    Parameters
    ----------
    tokens : int32 or int64 ``[T]`` or ``[B, S]``
        Ids: byte + 4.
    cu_seqlens, max_patches
        As in `patch_starts`.

    Returns
    -------
    PatchLayout
        The patches, on the device of the argument. Its `overflowed` is true where `max_patches` was too small.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Examples
    --------
    >>> layout = space_patch(to_ids("a cat, a dog")).compact()
    >>> to_bytes(to_ids("a cat, a dog"), layout.patch_offsets)
    [b'a', b' ', b'cat,', b' a ', b'dog']
    """
    _checks.check_tensor("tokens", tokens, (1, 2), _checks.INTS)
    return _cut(space_patch_fwd, "tokens", tokens, cu_seqlens, max_patches)


def static_patch(
    cu_seqlens: Tensor,
    size: int,
    first: int = 1,
    *,
    num_bytes: int | None = None,
    max_patches: int | None = None,
) -> PatchLayout:
    """Cut every `size` bytes.

    Parameters
    ----------
    cu_seqlens : int32 or int64 ``[B+1]``
    size : int
        Bytes in a patch; the last one of a document may be shorter.
    first : int
        Bytes in the first patch of a document: 1 for BLT, whose first patch must have one byte; `size` for MegaByte.
    num_bytes : int, optional
        T. Read from `cu_seqlens` if None, which is allowed on the CPU only: elsewhere it would wait for the device.
    max_patches : int, optional
        As in `patch_starts`.

    Returns
    -------
    PatchLayout
        The patches, on the device of the argument. Its `overflowed` is true where `max_patches` was too small.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Examples
    --------
    >>> static_patch(torch.tensor([0, 5, 9]), 3).compact().patch_lengths.tolist()
    [1, 3, 1, 1, 3]
    >>> static_patch(torch.tensor([0, 5, 9]), 3, first=3).compact().patch_lengths.tolist()
    [3, 2, 3, 1]
    """
    _checks.check_int("size", size, 1)
    _checks.check_int("first", first, 1)
    _checks.check_tensor("cu_seqlens", cu_seqlens, 1, _checks.INTS)
    if num_bytes is None:
        if cu_seqlens.device.type != "cpu":
            raise ValueError("num_bytes: expected an int where cu_seqlens is not on the CPU, got None")
        num_bytes = int(cu_seqlens[-1]) if cu_seqlens.shape[0] else 0
    _checks.check_int("num_bytes", num_bytes, 0)
    _checks.check_total("num_bytes", num_bytes)
    offsets = _checks.check_offsets("cu_seqlens", cu_seqlens, num_bytes, device=cu_seqlens.device)
    _checks.check_capacity(max_patches, offsets.shape[0] - 1)
    return layout_of(static_patch_fwd(offsets, num_bytes, size, first, max_patches), offsets)


def byte_patch(cu_seqlens: Tensor, *, num_bytes: int | None = None, max_patches: int | None = None) -> PatchLayout:
    """Make every byte a patch.

    Parameters
    ----------
    cu_seqlens, num_bytes, max_patches
        As for `static_patch`.

    Returns
    -------
    PatchLayout
        The patches, on the device of the argument. Its `overflowed` is true where `max_patches` was too small.

    Raises
    ------
    TypeError, ValueError
        As for `static_patch`.

    Examples
    --------
    >>> byte_patch(torch.tensor([0, 3])).compact().patch_lengths.tolist()
    [1, 1, 1]
    """
    return static_patch(cu_seqlens, 1, num_bytes=num_bytes, max_patches=max_patches)


def delimiter_patch(
    tokens: Tensor, id: int, cu_seqlens: Tensor | None = None, *, max_patches: int | None = None
) -> PatchLayout:
    """Cut after every token that equals `id`, and after the first byte.

    Parameters
    ----------
    tokens : int32 or int64 ``[T]`` or ``[B, S]``
    id : int
    cu_seqlens, max_patches
        As in `patch_starts`.

    Returns
    -------
    PatchLayout
        The patches, on the device of the argument. Its `overflowed` is true where `max_patches` was too small.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Examples
    --------
    >>> tokens = to_ids("one,two")
    >>> to_bytes(tokens, delimiter_patch(tokens, ord(",") + 4).compact().patch_offsets)
    [b'o', b'ne,', b'two']
    """
    _checks.check_tensor("tokens", tokens, (1, 2), _checks.INTS)
    _checks.check_int("id", id, -_checks.INT64_MAX - 1)
    return _cut(delimiter_patch_fwd, "tokens", tokens, cu_seqlens, id, max_patches)


def topk_patch(
    entropy: Tensor, patch_size: int, cu_seqlens: Tensor | None = None, *, max_patches: int | None = None
) -> PatchLayout:
    """Cut after the highest entropies, into patches of `patch_size` bytes on average.

    A document of S bytes is cut after its ``S // patch_size - 2`` highest entropies, that of the first byte excluded.
    Of equal ones the earlier counts. The result is not causal, so it is for analysis only.

    Parameters
    ----------
    entropy : fp32, bf16, fp16 or fp64 ``[T]`` or ``[B, S]``
    patch_size : int
    cu_seqlens, max_patches
        As in `patch_starts`.

    Returns
    -------
    PatchLayout
        The patches, on the device of the argument. Its `overflowed` is true where `max_patches` was too small.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype, shape or value; the message names it.

    Examples
    --------
    >>> entropy = torch.tensor([0.0, 1.0, 5.0, 1.0, 4.0, 1.0, 1.0, 1.0])
    >>> topk_patch(entropy, 2).compact().patch_offsets.tolist()
    [0, 1, 3, 5, 8]
    """
    _checks.check_tensor("entropy", entropy, (1, 2), _checks.FLOATS)
    _checks.check_int("patch_size", patch_size, 1)
    return _cut(topk_patch_fwd, "entropy", entropy.detach(), cu_seqlens, patch_size, max_patches)


def _cut(
    operator: Callable[..., Any], name: str, data: Tensor, cu_seqlens: Tensor | None, *arguments: Any
) -> PatchLayout:
    """Return the patches of `data`, one number a byte. The last of the operator's `arguments` is the capacity."""
    packed, offsets, documents = _checks.documents_of(name, data, cu_seqlens, trailing=0)
    _checks.check_capacity(arguments[-1], documents)
    return layout_of(operator(packed, offsets, documents, *arguments), offsets)


def _check_rules(
    threshold: float, threshold_add: float | None, monotonic: bool, max_patch_length: int | None, compare: str
) -> tuple[Any, ...]:
    """Check the rules and return them in the order of the schemas."""
    _checks.check_number("threshold", threshold)
    if threshold_add is not None:
        _checks.check_number("threshold_add", threshold_add)
    if not isinstance(monotonic, bool):
        raise TypeError(f"monotonic: expected a bool, got {monotonic!r}")
    if max_patch_length is not None:
        _checks.check_int("max_patch_length", max_patch_length, 1)
    _checks.check_choice("compare", compare, ("fp32", "model"))
    return threshold, threshold_add, monotonic, max_patch_length, compare


# --- schemas, references and fakes ------------------------------------------------------------------------------------
_RULES = (
    "float threshold, float? threshold_add, bool monotonic, SymInt? max_patch_length, str compare, SymInt? max_patches"
)

patch_starts_fwd = define_scheme("patch_starts_fwd", "entropy", _RULES, reference.patch_starts_fwd_reference)
space_patch_fwd = define_scheme("space_patch_fwd", "tokens", "SymInt? max_patches", reference.space_patch_fwd_reference)
delimiter_patch_fwd = define_scheme(
    "delimiter_patch_fwd", "tokens", "int id, SymInt? max_patches", reference.delimiter_patch_fwd_reference
)
topk_patch_fwd = define_scheme(
    "topk_patch_fwd", "entropy", "SymInt patch_size, SymInt? max_patches", reference.topk_patch_fwd_reference
)
static_patch_fwd = _common.define(
    "static_patch_fwd",
    f"(Tensor cu_seqlens, SymInt num_bytes, SymInt size, SymInt first, SymInt? max_patches) -> ({LAYOUT})",
    reference.static_patch_fwd_reference,
    lambda offsets, num_bytes, *sizes: empty_layout(num_bytes, offsets, offsets, 0, sizes[-1]),
)


def _empty_outputs(logits: Tensor, cu_seqlens: Tensor | None, num_documents: int, *rules: Any) -> tuple[Tensor, ...]:
    layout = empty_layout(logits.shape[0], logits, cu_seqlens, num_documents, rules[-1])
    return *empty_entropy(logits), *layout


entropy_patch_fwd = _common.define(
    "entropy_patch_fwd",
    f"(Tensor logits, {DOCUMENTS}, {_RULES}) -> (Tensor entropy, Tensor log_sum, {LAYOUT})",
    reference.entropy_patch_fwd_reference,
    _empty_outputs,
)
_autograd.register_autograd("entropy_patch_fwd", logits_grad, setup_context=save_logits)
