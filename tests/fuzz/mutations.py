"""Replacements for one argument of a valid call: other strides, values, sizes, dtypes, layouts, devices and types.

`mutate` draws one at random. Each has a label, which the report of a find names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from blt_kernels import PatchLayout

HUGE = (2**31 + 5, 2**40)


class Subclass(Tensor):
    """Has the behaviour of a tensor."""


class Text(str):
    """Is a str of another type."""


def _room(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return memory that holds NaN, or the largest integer."""
    if x.is_floating_point():
        return x.new_full(shape, math.nan)
    return x.new_full(shape, 1 if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


def _every_second(x: Tensor) -> Tensor:
    room = _room(x, (*x.shape[:-1], 2 * x.shape[-1]))
    room[..., ::2] = x
    return room[..., ::2]


def _rows_apart(x: Tensor) -> Tensor:
    room = _room(x, (3 * x.shape[0], *x.shape[1:]))
    room[1::3] = x
    return room[1::3]


def _offset(x: Tensor) -> Tensor:
    room = _room(x, (x.numel() + 3,))
    room[3:] = x.reshape(-1)
    return room[3:].view(x.shape)


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def _fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


SAME_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second column": _every_second,
    "rows apart": _rows_apart,
    "storage offset": _offset,
    "inference tensor": _inference,
    "parameter": lambda x: torch.nn.Parameter(x.clone(), x.is_floating_point()),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "not a leaf": lambda x: x.clone().requires_grad_() * 1,
    "negative bit": lambda x: torch._neg_view(-x),
    "subclass": lambda x: x.as_subclass(Subclass),
}
FOREIGN_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "sparse COO": lambda x: x.to_sparse(),
    "sparse COO of rows": lambda x: x.to_sparse(1),
    "sparse CSR": lambda x: x.to_sparse_csr(),
    "sparse CSC": lambda x: x.to_sparse_csc(),
    "sparse BSR": lambda x: x.to_sparse_bsr((1, 1)),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "nested rows": lambda x: torch.nested.nested_tensor(list(x[:2])),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"),
    "fake": _fake,
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "imaginary part of a conjugate": lambda x: (x.to(torch.complex64) * 1j).conj().imag,
}
_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.uint64,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
)
OTHER_SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "no rows": lambda x: x[:0],
    "one row": lambda x: x[:1],
    "a row less": lambda x: x[:-1],
    "a row more": lambda x: torch.cat([x, x[-1:]]),
    "no columns": lambda x: x[..., :0],
    "one column": lambda x: x[..., :1],
    "a column less": lambda x: x[..., :-1],
    "a column more": lambda x: torch.cat([x, x[..., -1:]], -1),
    "a dimension before": lambda x: x[None],
    "a dimension behind": lambda x: x[..., None],
    "two dimensions before": lambda x: x[None, None],
    "70 dimensions": lambda x: x.view(*[1] * (64 - x.dim()), *x.shape),
    "flat": lambda x: x.reshape(-1),
    "no dimension": lambda x: x.reshape(-1)[0],
    "a row alone": lambda x: x[0],
    "expanded row": lambda x: x[:1].expand(x.shape),
    "expanded number": lambda x: x.reshape(-1)[0].expand(x.shape),
    "overlapping": lambda x: x.as_strided(x.shape, [1] * x.dim()),
    "overlapping rows": lambda x: x.as_strided(x.shape, [1, *x.stride()[1:]]),
    "announces 2**31 rows": lambda x: x[:1].expand(HUGE[0], *x.shape[1:]),
    "announces 2**40 rows": lambda x: x[:1].expand(HUGE[1], *x.shape[1:]),
    "announces 2**31 columns": lambda x: x[..., :1].expand(*x.shape[:-1], HUGE[0]),
    "announces 2**40 columns": lambda x: x[..., :1].expand(*x.shape[:-1], HUGE[1]),
    "announces 2**62 rows": lambda x: x[:1, ..., :0].expand(2**62, *x.shape[1:-1], 0),
    "announces 2**31 documents": lambda x: x.reshape(-1)[:1].expand(HUGE[0]),
    "announces empty rows": lambda x: x[..., :0][:1].expand(HUGE[1], *x.shape[1:-1], 0),
}
_FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-310, 3.4e38, -3.4e38, 65504.0, 1e300, 1.0)
_INTS = (0, 1, -1, 3, 259, 260, -100, 2**15, 2**31 - 1, 2**31, -(2**31), 2**40, 2**63 - 1, -(2**63))


def _values(random: Random, x: Tensor) -> tuple[str, Tensor]:
    """Return other values of the same shape and dtype: all of them, a row, or one number."""
    x = x.clone().contiguous()
    if x.dtype == torch.bool:
        return "other marks", ~x
    if random.random() < 0.2:
        return "turned", x.flip(0)
    if x.is_floating_point() or x.is_complex():
        value: Any = random.choice(_FLOATS)
    else:
        info = torch.iinfo(x.dtype)
        value = max(info.min, min(random.choice(_INTS), info.max))
    if not x.numel():
        return f"{value} nowhere", x
    where = random.choice(("everywhere", "in a row", "once", "here and there"))
    if where == "everywhere":
        x.fill_(value)
    elif where == "in a row":
        x[random.randrange(x.shape[0])] = value
    elif where == "once":
        x.view(-1)[random.randrange(x.numel())] = value
    else:
        x.view(-1)[torch.tensor([i for i in range(x.numel()) if random.random() < 0.3], dtype=torch.int64)] = value
    return f"{value} {where}", x


_NUMBERS: tuple[Any, ...] = (
    True, False, 0, 1, -1, 2, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**400,
    0.0, -0.0, 1.0, 1.5, 5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf, 1j, np.int64(3), np.float32(0.5),
    np.float64(0.5), np.bool_(True), Fraction(1, 3),
)  # fmt: skip
_OBJECTS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "empty str": lambda: "",
    "str": lambda: "x",
    "bytes": lambda: b"x",
    "empty list": list,
    "empty tuple": tuple,
    "dict": dict,
    "list of ints": lambda: [1, 2],
    "list of a list": lambda: [[1]],
    "list of None": lambda: [None],
    "object": object,
    "class": lambda: int,
    "function": lambda: abs,
    "generator": lambda: (i for i in range(3)),
    "array": lambda: np.ones(3),
    "array of str": lambda: np.array(["max", "sum"]),
    "number tensor": lambda: torch.tensor(3),
    "int tensor": lambda: torch.tensor([0, 3]),
    "float tensor": lambda: torch.ones(2, 3),
    "bool tensor": lambda: torch.tensor([True, False]),
    "NotImplemented": lambda: NotImplemented,
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float32,
}


def _pick(random: Random, table: dict[str, Callable[..., Any]], *arguments: Any) -> tuple[str, Any]:
    label = random.choice(list(table))
    return label, table[label](*arguments)


def _foreign(random: Random) -> tuple[str, Any]:
    if random.random() < 0.5:
        number = random.choice(_NUMBERS)
        return f"{type(number).__name__} {str(number)[:24]}", number
    return _pick(random, _OBJECTS)


def _tensor(random: Random, x: Tensor) -> tuple[str, Any]:
    kind = random.random()
    if kind < 0.25:
        return _pick(random, SAME_VALUES, x)
    if kind < 0.4:
        return _pick(random, FOREIGN_TENSORS, x)
    if kind < 0.65:
        return _pick(random, OTHER_SHAPES, x)
    if kind < 0.9:
        return _values(random, x)
    if kind < 0.97:
        dtype = random.choice(_DTYPES)
        return f"dtype {dtype}", x.to(dtype)
    return random.choice((("list", x.tolist), ("array", lambda: x.float().numpy()), ("tuple", lambda: (x,))))[0], [x]


def _sequence(random: Random, x: Any) -> tuple[str, Any]:
    changes: dict[str, Callable[[], Any]] = {
        "empty": lambda: type(x)(),
        "shorter": lambda: x[:-1],
        "longer": lambda: [*x, x[0]],
        "tuple": lambda: tuple(x),
        "list": lambda: list(x),
        "set": lambda: set(map(str, x)),
        "nested": lambda: [x],
        "turned": lambda: x[::-1],
        "its first": lambda: x[0],
        "array": lambda: np.array(x),
    }
    if len(x) and random.random() < 0.6:
        place = random.randrange(len(x))
        label, entry = mutate(random, x[place])
        return f"entry {place}: {label}", [*x[:place], entry, *x[place + 1 :]]
    return _pick(random, changes)


def _layout(random: Random, layout: PatchLayout) -> tuple[str, Any]:
    kind = random.random()
    if kind < 0.1:
        return "meta", layout.to("meta")
    if kind < 0.2:
        return "compact", layout.compact()
    field = random.choice(dataclasses.fields(layout)).name
    label, value = mutate(random, getattr(layout, field))
    return f"{field}: {label}", dataclasses.replace(layout, **{field: value})


def mutate(random: Random, value: Any) -> tuple[str, Any]:
    """Return a label and what takes the place of `value`; raise whatever torch raises where it cannot be made."""
    if value is None or (random.random() < 0.12 and not isinstance(value, PatchLayout)):
        return _foreign(random)
    if isinstance(value, Tensor):
        return _tensor(random, value)
    if isinstance(value, PatchLayout):
        return _layout(random, value)
    if isinstance(value, (list, tuple)):
        return _sequence(random, value)
    if isinstance(value, str) and random.random() < 0.5:
        return "str of another type", random.choice((Text(value), value.upper(), value + " ", value.encode(), [value]))
    if isinstance(value, bool):
        return _foreign(random) if random.random() < 0.7 else ("other bool", not value)
    if isinstance(value, int) and random.random() < 0.3:
        return random.choice((("one more", value + 1), ("one less", value - 1), ("twice", 2 * value)))
    if isinstance(value, (int, float)):
        number = random.choice(_NUMBERS)
        return f"{type(number).__name__} {str(number)[:24]}", number
    return _foreign(random)
