"""Checks of arguments, shared by ops, layers and models: errors name the argument, its value and what was expected."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling

from blt_kernels._files import shortened

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int32, torch.int64)
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
_DENSE = torch.strided


def check_tensor(name: str, value: object, dims: int | Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    """Raise TypeError or ValueError unless `value` is a tensor of one of `dtypes` with one of `dims` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not _DENSE or value.is_nested:
        check_dense(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype in {_names(dtypes)}, got {value.dtype}")
    dim = value.dim()
    if dim != dims and (isinstance(dims, int) or dim not in dims):
        expected = " or ".join(map(str, (dims,) if isinstance(dims, int) else dims))
        raise ValueError(f"{name}: expected {expected} dimensions, got shape {list(value.shape)}")


def check_shape(name: str, value: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """Raise ValueError unless `value` has the `expected` shape (None is any size).

    `meaning` names the dimensions. It holds no sizes: formatting a symbolic one would fix it for `torch.compile`.
    """
    shape = shape_of(name, value)
    fits = len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))
    if not fits:
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected shape {meaning} = [{sizes}], got {list(shape)}")


def shape_of(name: str, value: Tensor) -> torch.Size:
    """Return the shape of a tensor, which a nested one does not have."""
    try:
        return value.shape
    except RuntimeError:
        check_dense(name, value)
        raise


def check_same(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Raise unless `value` is on the device of `other`, and of its dtype too unless `dtype` is False."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} of {other_name}, got {value.device}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype} of {other_name}, got {value.dtype}")


def check_like(
    name: str, value: object, dims: Sequence[int], other_name: str, other: Tensor, *, dtype: bool = True
) -> None:
    """Raise unless `value` is a floating tensor with one of `dims` dimensions, like `other` as in `check_same`."""
    floating = isinstance(value, Tensor) and value.dtype == other.dtype
    if floating and value.device == other.device and value.dim() in dims:  # type: ignore[attr-defined]
        return
    check_tensor(name, value, dims, FLOATS)
    check_same(name, value, other_name, other, dtype=dtype)  # type: ignore[arg-type]


def check_number(name: str, value: object) -> None:
    """Raise unless `value` is an int or a float, and not NaN."""
    if type(value) is float and value == value:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {shortened(value)}")
    if value != value:
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name}: expected a number that a float holds, got an int of {value.bit_length()} bits")


def check_finite(name: str, value: object) -> None:
    """Raise unless `value` is an int or a float that is finite."""
    check_number(name, value)
    if value in (math.inf, -math.inf):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_int(name: str, value: object, minimum: int) -> None:
    """Raise unless `value` is an int (or a symbolic one) of at least `minimum` that an int64 holds."""
    if type(value) is int and minimum <= value <= INT64_MAX:
        return
    check_is_int(name, value)
    if value < minimum:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a value >= {minimum}, got {value}")
    if value > INT64_MAX:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a value <= 2**63 - 1, got {value}")


def check_is_int(name: str, value: object) -> None:
    """Raise TypeError unless `value` is an int or a symbolic one."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {shortened(value)}")


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_device(name: str, value: object) -> None:
    """Raise unless `value` names a device that this torch knows."""
    if isinstance(value, torch.device):
        return
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a torch.device or a str, got {value!r}")
    try:
        torch.device(value)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected a torch.device or a str, got {value!r}: {error}") from None


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {shortened(value)}")


def readable(x: Tensor) -> bool:
    """Return whether the host can read the values of `x` at no cost: on the CPU, in eager code, not in `torch.func`."""
    return type(x) is Tensor and x.is_cpu and not is_compiling() and not is_functorch_wrapped_tensor(x)


def check_total(name: str, total: int) -> None:
    """Raise unless int32 offsets reach over the `total` positions of the data."""
    if not is_compiling() and total > INT32_MAX:
        raise ValueError(f"{name}: expected at most 2**31 - 1 positions, which int32 offsets reach, got {total}")


class Documents(NamedTuple):
    """Checked offsets of packed data, and of ids what else was checked. Ops take them in the place of `cu_seqlens`.

    Attributes
    ----------
    offsets : int32 ``[B+1]``
    total : int
        T, the number of positions of the data.
    end : int or None
        Where the last document ends, if the host knows.
    alphabet : int or None
        What all ids of the documents are known to be below.
    """

    offsets: Tensor
    total: int
    end: int | None
    alphabet: int | None = None

    def holds_ids_below(self, alphabet: int) -> bool:
        """Return whether the host knows that all ids of the documents are below `alphabet`."""
        return self.alphabet is not None and self.alphabet <= alphabet

    @property
    def full(self) -> bool:
        """True if the host knows that every position is in a document."""
        return self.end is not None and self.end == self.total


def check_documents(name: str, offsets: Tensor | Documents, total: int, *, device: torch.device) -> Documents:
    """Check the offsets of documents over `total` positions; what was checked before is not read again.

    The values are checked where they are `readable`. Kernels bound every access by `total` themselves, whatever the
    values are.
    """
    if not isinstance(offsets, Documents):
        return Documents(*_check_offsets(name, offsets, total, device))
    if offsets.total != total or offsets.offsets.device != device:
        expected = f"offsets of {total} positions on {device}"
        got = f"those of {offsets.total} on {offsets.offsets.device}"
        raise ValueError(f"{name}: expected {expected}, got {got}")
    return offsets


def check_offsets(name: str, offsets: Tensor | Documents, total: int, *, device: torch.device) -> Tensor:
    """Check document offsets as `check_documents` does and return them as int32."""
    if not isinstance(offsets, Documents):
        return _check_offsets(name, offsets, total, device)[0]
    return check_documents(name, offsets, total, device=device).offsets


def _check_offsets(name: str, offsets: Tensor, total: int, device: torch.device) -> tuple[Tensor, int, int | None]:
    """Return the fields of `Documents`."""
    dtype = offsets.dtype if isinstance(offsets, Tensor) else None
    if dtype not in INTS or offsets.dim() != 1 or offsets.layout is not _DENSE or offsets.is_nested:
        check_tensor(name, offsets, 1, INTS)
    if offsets.device != device:
        raise ValueError(f"{name}: expected device {device} of the data, got {offsets.device}")
    values = offsets.tolist() if readable(offsets) else None
    if values is None or total > INT32_MAX:
        check_total(name, total)
    if not (offsets.numel() if values is None else values):
        raise ValueError(f"{name}: expected at least one entry, got an empty tensor")
    end = None
    if values is not None:
        end = values[-1]
        if values[0] != 0 or values != sorted(values) or end > total:
            shown = values if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...] ending in {end}"
            expected = f"offsets that start at 0, never fall and end at most at {total}"
            raise ValueError(f"{name}: expected {expected}, got {shown}")
    if dtype is not torch.int32 or not offsets.is_contiguous():
        offsets = offsets.to(torch.int32).contiguous()
    return offsets, total, end


_FEW_IDS = 64


def check_ids(
    tokens: Tensor, documents: Documents | None, alphabet: int, meaning: str, *, padded: bool = False
) -> None:
    """Raise ValueError unless the packed ids of all documents are below `alphabet`, which `meaning` names.

    The values are checked where they are `readable`. Beyond the last document there may be anything: without
    `documents` there is no such place. `padded`: the caller was given ``[B, S]``.
    """
    if documents is not None and (documents.end is None or documents.holds_ids_below(alphabet)):
        return
    if not readable(tokens):
        return
    inside = tokens if documents is None or documents.full else tokens[: documents.end]
    count = inside.numel()
    if not count:
        return
    if count <= _FEW_IDS:  # where two calls of torch take longer
        values = inside.tolist()
        low, high = min(values), max(values)
    else:
        low, high = (int(x) for x in inside.aminmax())
    if low >= 0 and high < alphabet:
        return
    got = low if low < 0 else high
    hint = ". Every id of padded tokens is in a document: padding may only follow cu_seqlens[-1]" if padded else ""
    raise ValueError(f"tokens: expected ids from 0 to {alphabet - 1}, {meaning}, got {got}{hint}")


def documents_of(
    name: str, data: Tensor, cu_seqlens: Tensor | Documents | None, trailing: int, offsets_name: str = "cu_seqlens"
) -> tuple[Tensor, Tensor | None, int]:
    """Return packed data ``[T, ...]``, the int32 offsets of its documents and their number B, as `split_documents`."""
    if cu_seqlens is not None and data.dim() == trailing + 1:
        offsets = check_offsets(offsets_name, cu_seqlens, data.shape[0], device=data.device)
        return data, offsets, offsets.shape[0] - 1
    packed, _, count = split_documents(name, data, cu_seqlens, trailing, offsets_name)
    return packed, None, count


def split_documents(
    name: str, data: Tensor, cu_seqlens: Tensor | Documents | None, trailing: int, offsets_name: str = "cu_seqlens"
) -> tuple[Tensor, Documents | None, int]:
    """Return packed data ``[T, ...]``, its documents and their number B.

    The documents are None if all have one length: operators that take ``num_documents`` need no offsets. `data` is
    ``[T, ...]`` or ``[B, S, ...]`` with `trailing` dimensions behind the bytes. Packed data without `cu_seqlens` is one
    document.
    """
    if data.dim() == trailing + 2:
        if cu_seqlens is not None:
            raise ValueError(f"{offsets_name}: expected None, since {name} is padded with shape {list(data.shape)}")
        rows, length = data.shape[:2]
        check_total(name, rows * length)
        return data.flatten(0, 1), None, rows
    total = data.shape[0]
    if cu_seqlens is None:
        check_total(name, total)
        return data, None, 1
    documents = check_documents(offsets_name, cu_seqlens, total, device=data.device)
    return data, documents, documents.offsets.shape[0] - 1


def pack(name: str, data: Tensor, cu_seqlens: Tensor | Documents | None, trailing: int) -> tuple[Tensor, Documents]:
    """Return packed data ``[T, ...]`` and its documents, as `split_documents`, with offsets in any case."""
    packed, documents, count = split_documents(name, data, cu_seqlens, trailing)
    if documents is None:
        total = packed.shape[0]
        length = data.shape[1] if data.dim() == trailing + 2 else total
        if is_compiling() or not length:  # a step of 0 is none
            offsets = torch.arange(count + 1, dtype=torch.int32, device=data.device) * length
        else:
            offsets = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=data.device)
        documents = Documents(offsets, total, total)
    return packed, documents


def check_capacity(max_patches: int | None, documents: int) -> None:
    """Raise unless `max_patches` leaves at least one patch for every document."""
    if max_patches is None:
        return
    check_int("max_patches", max_patches, 0)
    if max_patches > INT32_MAX:
        raise ValueError(f"max_patches: expected at most 2**31 - 1, as int32 ids count, got {max_patches}")
    if max_patches < documents:
        raise ValueError(f"max_patches: expected at least one patch a document ({documents}), got {max_patches}")


def check_dense(name: str, value: Tensor) -> None:
    """Raise TypeError if `value` is sparse, nested, quantized or in a layout of mkldnn."""
    if value.layout is not _DENSE or value.is_nested or value.is_quantized:
        raise TypeError(f"{name}: expected a dense tensor, got {_kind(value)}")


def check_all_dense(**tensors: Tensor) -> None:
    """Check each of these as `check_dense` does."""
    for name, value in tensors.items():
        check_dense(name, value)


def _kind(value: Tensor) -> str:
    if value.is_nested:
        return "a nested one"
    return "a quantized one" if value.is_quantized else f"one of layout {value.layout}"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
