"""Checks values that several commands have as options. Messages begin with the name of the field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def check_count(name: str, value: int, minimum: int) -> None:
    """Raise ValueError unless a number of things is at least `minimum`."""
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def check_finite(name: str, value: float, minimum: float, *, exclusive: bool = False) -> None:
    """Raise ValueError unless a number is finite and at least, or `exclusive`, more than `minimum`."""
    if not (math.isfinite(value) and (value > minimum if exclusive else value >= minimum)):
        expected = "more than" if exclusive else "at least"
        raise ValueError(f"{name}: expected a finite number of {expected} {minimum:g}, got {value}")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless a number is a fraction."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a fraction from 0 to 1, got {value}")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Make errors of a file begin with the name of the field that the file is from."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{name}: {str(error).removeprefix('path: ')}") from error


def check_device(device: str) -> None:
    """Raise ValueError unless there is such a device: "cpu", "cuda" or "cuda:N"."""
    if device == "cpu":
        return
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    count = torch.cuda.device_count()
    if int(match[1] or 0) >= count:
        seen = f"torch sees {count} CUDA devices" if count else "torch sees no CUDA device"
        raise ValueError(f"device: {seen}, got {device!r}")
