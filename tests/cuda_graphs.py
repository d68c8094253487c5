"""CUDA graphs on a GPU: warm-up, capture, and new inputs for a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a graph of what `function` does, and its result. After a failure, captures and allocations work again.

    `torch.cuda.graph` leaves its stream current, and the allocator on the memory of the graph, when a capture ends in
    an error.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        try:
            with torch.cuda.graph(graph, stream=stream):
                result = function()
        except BaseException:
            end_allocations(graph)
            raise
    return graph, result


def end_allocations(graph: torch.cuda.CUDAGraph) -> None:
    """Allocate outside of the memory of a graph whose capture failed, if that has not ended already."""
    try:
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), graph.pool())
    except RuntimeError:
        return


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
