"""CUDA graphs on a GPU: warm-up, and new inputs for a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def warm_up(function: Callable[[], Any]) -> Any:
    """Run `function` on a stream of its own, as a capture does; twice, since what is made once is made then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            result = function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return result


def replaced(first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
    """Copy the tensors of `second` into those of `first`, which a graph reads."""
    for held, new in zip(first, second, strict=True):
        held.copy_(new)
