"""`Steps` decodes without drafts in fixed shapes: every step is the same calls on the same memory, as CUDA graphs need.

What a state remembers of its rows is copied to buffers of fixed size, and lengths, boundary decisions and the choice of
the next id are tensors on the device. A step reads back one tensor: the ids, and the rows whose patch has closed.
Buffers that become too small are replaced by larger ones, and their steps are captured anew.

A row that has ended stays among the others: its results are left out, and its patches do not close any more.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from blt_kernels.models.sampling import Sampling
from blt_kernels.models.state import ByteLMState, ByteState, DocumentStarts, byte_lm_logits
from blt_kernels.nn.fixed_cache import FixedKeys

_EAGER_CALLS = 3  # of each step: they compile kernels, and short texts need no graph


def capture(function: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a graph of what `function` does, and its result. After a failure, captures and allocations work again.

    It is captured on `stream`, which is not the default one, or on a new one.

    `torch.cuda.graph` leaves its stream current, and the allocator on the memory of the graph, when a capture ends in
    an error.
    """
    graph, stream = torch.cuda.CUDAGraph(), stream or torch.cuda.Stream()
    with torch.cuda.stream(stream):
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
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


class _Streams(threading.local):
    """Has one stream for each thread and device: cuBLAS keeps memory for every stream that it was called on."""

    def __init__(self) -> None:
        self.found: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.found:
            self.found[device] = torch.cuda.Stream(device)
        return self.found[device]


_streams = _Streams()


def shifted(rows: Tensor, new: Tensor) -> Tensor:
    """Return ``[rows, width]`` without the first entry of each row, and with a new one at its end."""
    return torch.cat([rows[:, 1:], new[:, None].to(rows.dtype)], 1)


class Step:
    """Calls a function without arguments and results. On CUDA, it is captured after its first calls, and then replayed.

    Parameters
    ----------
    function : callable
    device : torch.device
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function, self.eager_calls = function, _EAGER_CALLS
        self.captures = device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run the function."""
        if self.captures and self.graph is None and not self.eager_calls:
            self.graph, _ = capture(self.function, torch.cuda.current_stream())
        if self.graph is not None:
            self.graph.replay()
        else:
            self.function()
            self.eager_calls = max(0, self.eager_calls - 1)


class FixedStarts:
    """Notes where attention starts anew in each row, as `DocumentStarts` does, on the device."""

    def __init__(self, starts: DocumentStarts, device: torch.device) -> None:
        self.ids = {x: between for x, between in starts.ids.items() if x is not None}
        self.start = torch.tensor([found[-1][1] if found else 0 for found in starts.found], device=device)

    def extend(self, ids: Tensor, position: Tensor) -> Tensor:
        """Return where the document of each new id starts, int64 ``[rows]``."""
        new = self.start
        for x, between in self.ids.items():
            new = torch.where(ids == x, position + between, new)
        own = torch.where(new > position, self.start, new)  # an EOS starts the document after it
        self.start.copy_(new)
        return own


class FixedByteLM:
    """Holds the state of a `ByteLM` in fixed shapes.

    Parameters
    ----------
    state : ByteLMState
    """

    def __init__(self, state: ByteLMState) -> None:
        self.model, self.keys = state.model, FixedKeys(state.cache)
        self.starts = FixedStarts(state.starts, state.device)

    def extend(self, ids: Tensor, position: Tensor) -> Tensor:
        """Append an id to each row; return their logits ``[rows, vocab_size]``."""
        start = self.starts.extend(ids, position)
        return byte_lm_logits(self.model, ids, position, self.keys.extend(self.model.ops, position, start))


class Steps:
    """Decodes the rows of a state id by id.

    Parameters
    ----------
    state : ByteState
        It is copied. Each row has read an id at least.
    sampling : Sampling

    Attributes
    ----------
    ids : int64 ``[rows]``
        The ids that were appended last.
    position : int64 ``[rows]``
        How many ids each row has.
    closes : bool ``[rows]``
        Whether a patch ends with the last id.
    alive : bool ``[rows]``
        Which rows have not ended.
    lengths, num_patches : list of int
        The ids of each row, and its patches that have passed the global transformer.
    passes : Counter
        How often each part of the model has run.
    """

    reading: tuple[str, ...] = ()  # parts of the model that an id passes before its patch closes
    writing: tuple[str, ...] = ()  # and after that

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, state: ByteState, sampling: Sampling) -> None:
        rows, device = state.rows, state.device
        self.model, self.device, self.sampling = state.model, device, sampling
        self.position = torch.tensor(state.lengths, device=device)
        self.ids = torch.zeros_like(self.position)
        self.closes = torch.zeros(rows, dtype=torch.bool, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.logits = torch.zeros(rows, self.model.config.vocab_size, dtype=torch.float64, device=device)
        self.numbers = torch.zeros(rows, dtype=torch.float64, device=device)
        self.report = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.lengths, self.num_patches = list(state.lengths), list(state.num_patches)
        self.passes: Counter[str] = Counter()
        self._going = self._closing = [False] * rows
        self._staged = torch.zeros(rows, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._step = Step(self._write_and_read, device)
        self._stream = _streams.of(device) if device.type == "cuda" else None
        with self._on_stream():
            self._prepare(state)

    def start(self, ids: Sequence[int]) -> None:
        """Append the ids that were chosen from the logits of the prompts."""
        self._going = [True] * len(ids)
        with self._on_stream():
            self.ids.copy_(torch.tensor(ids))
            self._read()
            self._closing = self.closes.tolist()
        self.lengths = [n + 1 for n in self.lengths]
        self.passes.update(self.reading)

    def step(self, going: Sequence[bool], numbers: Sequence[float]) -> list[int]:
        """Return the id that follows in each row, and append it.

        Parameters
        ----------
        going : sequence of bool
            Rows that have not ended. The ids of the others mean nothing.
        numbers : sequence of float
            A random number for each row, from 0 to 1. Not read by greedy choice.

        Raises
        ------
        ValueError
            A logit is no number.
        """
        with self._on_stream():
            if going != self._going:
                self._going = list(going)
                self.alive.copy_(torch.tensor(going))
            if self._reserve(max(self.lengths) + 1):  # no step is running: its report was read
                self._step = Step(self._write_and_read, self.device)
            closing = [a and b for a, b in zip(self._closing, going, strict=True)]
            if any(closing):
                self._close(closing)
                self.num_patches = [n + closes for n, closes in zip(self.num_patches, closing, strict=True)]
                self.passes["global"] += 1
            if not self.sampling.greedy:
                self._staged.copy_(torch.tensor(numbers, dtype=torch.float64))
                self.numbers.copy_(self._staged, non_blocking=True)
            self._step()
            ids, closes = self.report.tolist()  # the only time that the host waits for the device
            self._closing = [bool(x) for x in closes]
            if any(x < 0 and goes for x, goes in zip(ids, going, strict=True)):
                self.sampling.probabilities(self.logits[torch.tensor(going)])  # raises
        self.lengths = [n + 1 for n in self.lengths]
        self.passes.update((*self.writing, *self.reading))
        return ids

    def _on_stream(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _write_and_read(self) -> None:
        """Choose the id that follows in each row, and append it."""
        self.logits.copy_(self._write())
        self.ids.copy_(self.sampling.pick(self.sampling.distribution(self.logits), self.numbers))
        finite = self.logits.amax(-1).isfinite()
        self._read()
        self.report.copy_(torch.stack([torch.where(finite, self.ids, -1), self.closes.long()]))

    def _prepare(self, state: Any) -> None:
        """Copy what the state remembers."""
        raise NotImplementedError

    def _reserve(self, total: int) -> bool:
        """Make room for rows of `total` ids. Return whether the tensors of a step are others now."""
        raise NotImplementedError

    def _read(self) -> None:
        """Append `ids`, as far as possible before their patches close."""
        self.position.add_(1)

    def _close(self, closing: Sequence[bool]) -> None:
        """Pass the patches of these rows through the global transformer."""
        raise NotImplementedError

    def _write(self) -> Tensor:
        """Return the logits ``[rows, vocab_size]`` of the id after the last one."""
        raise NotImplementedError


class ByteLMSteps(Steps):
    """Decodes with a `ByteLM`."""

    writing = ("byte_lm",)

    def _prepare(self, state: ByteLMState) -> None:
        self.state = FixedByteLM(state)

    def _reserve(self, total: int) -> bool:
        return self.state.keys.reserve(total)

    def _write(self) -> Tensor:
        return self.state.extend(self.ids, self.position - 1)
