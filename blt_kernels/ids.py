"""Bytes to ids and back: a byte's id is the byte plus 4; the ids below 4 are special.

The alphabet is that of facebookresearch/blt and of transformers' BLT.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor

from blt_kernels import _checks, bpe

BOE, BOS, EOS, BPE = 0, 1, 2, 3
BYTE_OFFSET = 4
ALPHABET = 256 + BYTE_OFFSET
NEWLINE = ord("\n") + BYTE_OFFSET


@overload
def to_ids(
    data: list[Any] | tuple[Any, ...],
    *,
    bos: bool = False,
    eos: bool = False,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def to_ids(
    data: Any,
    *,
    bos: bool = False,
    eos: bool = False,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
) -> Tensor: ...


def to_ids(
    data: Any,
    *,
    bos: bool = False,
    eos: bool = False,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return ids of bytes: byte + 4.

    Parameters
    ----------
    data
        Text: a str, which is encoded in UTF-8; bytes, a bytearray or a memoryview; a uint8 tensor, a NumPy array of
        uint8 or any other buffer of unsigned bytes, ``[S]`` or ``[B, S]``. Or a list or tuple of such documents
        ``[S]``, which are packed.
    bos, eos : bool
        Put BOS (1) before and EOS (2) after every document.
    tokenizer : optional
        Put BPE (3) before every token of this BPE tokenizer, as facebookresearch/blt does, for ``patching="bpe"`` of
        `BLTConfig`: a ``tokenizers.Tokenizer``, a fast tokenizer of transformers or the path of a ``tokenizer.json``.
        `blt_kernels.bpe.token_lengths` says which work. Not for data ``[B, S]``.
    dtype : torch.int64 or torch.int32
    device : torch.device or str, optional
        If None, that of a tensor, and the CPU for everything else.

    Returns
    -------
    ids : `dtype` ``[T]``, or ``[B, T]`` for data of shape ``[B, S]``
        For a list of documents: packed end to end, together with
    cu_seqlens : int32 ``[B+1]``
        their offsets. Every op and model takes the two.

    Raises
    ------
    TypeError
        The data or the tokenizer is none of these, or `dtype` is no integer type for ids.
    ValueError
        The data has another number of dimensions, or is a str with lone surrogates, which UTF-8 cannot encode. The
        tokenizer cannot take the data, or changes it.
    ImportError, FileNotFoundError
        tokenizers is not installed, or `tokenizer` is the path of no file.

    Examples
    --------
    >>> to_ids("né", bos=True)
    tensor([  1, 114, 199, 173])
    >>> ids, cu_seqlens = to_ids(["one", b"\xff", ""])
    >>> ids, cu_seqlens
    (tensor([115, 114, 105, 259]), tensor([0, 3, 4, 4], dtype=torch.int32))
    >>> to_bytes(ids, cu_seqlens)
    [b'one', b'\xff', b'']
    """
    return _to_ids("data", data, bos, eos, dtype, device, tokenizer)


def to_bytes(ids: Any, cu_seqlens: Tensor | None = None, *, special: str = "drop") -> bytes | list[bytes]:
    r"""Return bytes of ids: id - 4.

    Parameters
    ----------
    ids : integer tensor ``[T]`` or ``[B, S]``, or a list of ints
        From 4 to 259; smaller ones are special ids, or padding such as -100.
    cu_seqlens : int32 or int64 ``[B+1]``, optional
        Documents of packed ids. Ids beyond the last document are left out.
    special : "drop" or "raise"
        What to do with ids below 4.

    Returns
    -------
    bytes
        Or a list of B bytes objects, for ``[B, S]`` and with `cu_seqlens`. ``.decode(errors="replace")`` makes a str of
        bytes that may end inside a character.

    Raises
    ------
    TypeError
        The ids are no integers.
    ValueError
        An id is above 259, or below 4 with ``special="raise"``; the ids are on meta, or their shape or `cu_seqlens` is
        wrong.

    Examples
    --------
    >>> to_bytes(to_ids("né", bos=True, eos=True)).decode()
    'né'
    >>> to_bytes([1, 76, 109])
    b'Hi'
    """
    _checks.check_choice("special", special, ("drop", "raise"))
    if not isinstance(ids, Tensor):
        ids = _as_ids(ids)
    if ids.is_floating_point() or ids.is_complex() or ids.is_quantized or ids.dtype == torch.bool:
        raise TypeError(f"ids: expected integers, got {ids.dtype}")
    _checks.check_dense("ids", ids)
    if ids.is_meta:
        raise ValueError("ids: expected a tensor that has values, got one on device meta")
    if ids.dim() not in (1, 2):
        raise ValueError(f"ids: expected 1 or 2 dimensions, got shape {list(ids.shape)}")
    several = cu_seqlens is not None or ids.dim() == 2
    packed, documents = _checks.pack("ids", ids, cu_seqlens, trailing=0)
    offsets = documents.offsets.long().cpu()
    packed = packed[: int(offsets[-1])].long().cpu()
    wrong = packed >= ALPHABET if special == "drop" else (packed >= ALPHABET) | (packed < BYTE_OFFSET)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        lowest = "at most 259" if special == "drop" else "from 4 to 259, since special is 'raise'"
        raise ValueError(f"ids: expected values {lowest}, got {int(packed[at])} at position {at}")
    kept = packed >= BYTE_OFFSET
    data = _bytes((packed[kept] - BYTE_OFFSET).to(torch.uint8))
    if not several:
        return data
    ends = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), kept.cumsum(0)])[offsets].tolist()
    return [data[start:end] for start, end in pairwise(ends)]


def _as_ids(ids: Any) -> Tensor:
    """Return ids that are no tensor as one."""
    try:
        return torch.as_tensor(ids, device="cpu") if len(ids) else torch.empty(0, dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"ids: expected a tensor or a list of integers, got {type(ids).__name__}: {error}") from None


def ids_of(
    tokens: Any, cu_seqlens: Tensor | _checks.Documents | None, device: torch.device
) -> tuple[Tensor, Tensor | _checks.Documents | None]:
    """Return `tokens` and `cu_seqlens` for a model: ids stay as they are, text becomes ids on `device`."""
    if isinstance(tokens, Tensor) and tokens.dtype != torch.uint8:
        return tokens, cu_seqlens
    ids = _to_ids("tokens", tokens, False, False, torch.int64, device)
    if isinstance(ids, Tensor):
        return ids, cu_seqlens
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None, since tokens is a list of documents")
    return ids


def _to_ids(
    name: str,
    data: Any,
    bos: bool,
    eos: bool,
    dtype: torch.dtype,
    device: torch.device | str | None,
    tokenizer: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    _checks.check_bool("bos", bos)
    _checks.check_bool("eos", eos)
    if device is not None:
        _checks.check_device("device", device)
    if not isinstance(dtype, torch.dtype) or dtype not in _checks.INTS:
        raise TypeError(f"dtype: expected torch.int32 or torch.int64, got {dtype}")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = bpe.load_tokenizer(tokenizer)

    def ids_of_bytes(name: str, data: Any, dims: tuple[int, ...]) -> Tensor:
        values = _uint8(name, data, dims if tokenizer is None else (1,))
        ids = values.to(device, dtype) + BYTE_OFFSET
        if tokenizer is not None:
            lengths = torch.tensor(bpe.token_lengths(tokenizer, _bytes(values), name), dtype=torch.int64, device="cpu")
            token = torch.arange(lengths.shape[0], device="cpu").repeat_interleave(lengths)  # [T]
            places = (token + 1 + torch.arange(ids.shape[0], device="cpu")).to(ids.device)
            ids = ids.new_full((ids.shape[0] + lengths.shape[0],), BPE).scatter(0, places, ids)
        ends = [ids.new_full((*ids.shape[:-1], int(on)), id) for on, id in ((bos, BOS), (eos, EOS))]
        return torch.cat([ends[0], ids, ends[1]], -1) if bos or eos else ids

    if not isinstance(data, (list, tuple)):
        return ids_of_bytes(name, data, (1, 2))
    documents = [ids_of_bytes(f"{name}[{i}]", document, (1,)) for i, document in enumerate(data)]
    lengths = torch.tensor([0, *(document.shape[0] for document in documents)], device="cpu")
    packed = torch.cat(documents) if documents else torch.empty(0, dtype=dtype, device=device or "cpu")
    return packed, lengths.cumsum(0).to(packed.device, torch.int32)


def _uint8(name: str, data: Any, dims: tuple[int, ...]) -> Tensor:
    """Return the bytes of one argument, as a tensor of their shape."""
    if isinstance(data, str):
        try:
            data = data.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: expected text that UTF-8 can encode, got {data[error.start]!r} at position {error.start}"
            ) from None
    if isinstance(data, Tensor):
        if data.dtype != torch.uint8:
            raise TypeError(f"{name}: expected text of dtype uint8, got {data.dtype}")
        _checks.check_dense(name, data)
        shape = tuple(data.shape)
    else:
        try:
            view = memoryview(data)
        except TypeError:
            kinds = "a str, bytes, a uint8 array or tensor" + (", or a list of them" if 2 in dims else "")
            raise TypeError(f"{name}: expected {kinds}, got {type(data).__name__}") from None
        if view.format != "B":
            raise TypeError(f"{name}: expected unsigned bytes (uint8), got a buffer of format {view.format!r}")
        shape = view.shape or ()
        buffer = bytearray(view)  # torch wants memory that it may write to
        empty = torch.empty(0, dtype=torch.uint8, device="cpu")
        data = torch.frombuffer(buffer, dtype=torch.uint8) if buffer else empty
    if len(shape) not in dims:
        expected = " or ".join(map(str, dims))
        raise ValueError(f"{name}: expected {expected} dimensions, got shape {list(shape)}")
    return data.view(shape)


def _bytes(values: Tensor) -> bytes:
    """Return uint8 values ``[T]`` as bytes."""
    buffer = bytearray(values.shape[0])
    if buffer:
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(values)
    return bytes(buffer)
