"""The target that the stages run on: a GPU, or in a rehearsal the emulator and Triton's interpreter in its place."""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TESTS = Path(__file__).resolve().parents[2] / "tests"
CALLS = 20  # a graph calls a function so often
FAULTS = "BLT_KERNELS_FAULTS"  # rehearsals read it: "fail STAGE CASE; hang STAGE CASE; end STAGE CASE"


class Target:
    """Runs cases on a GPU.

    Attributes
    ----------
    device : of tensors
    rehearsal : are sizes tiny, and times without meaning?
    only : parts of the names of cases; all cases if empty
    warm : are cases run for nothing but what they compile?
    """

    device = "cuda"
    rehearsal = False

    def __init__(self, only: Sequence[str] = (), warm: bool = False) -> None:
        self.only, self.warm = tuple(only), warm

    @contextmanager
    def running(self) -> Iterator[None]:
        """Open while cases run."""
        yield

    def wants(self, name: str) -> bool:
        """Return whether the case of this name runs."""
        return not self.only or any(part in name for part in self.only)

    def disturb(self, stage: str, case: str) -> None:
        """Do nothing. A rehearsal injects faults here, before each case."""

    def usable(self) -> bool:
        """Return whether this process can still use the GPU: after an illegal access every call fails."""
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").add_(1)
            torch.cuda.synchronize()
        except Exception:
            return False
        return True

    def free(self) -> None:
        """Give memory back that nothing holds."""
        torch.cuda.empty_cache()

    def l2_bytes(self) -> int:
        """Return size of the cache that inputs must not fit in."""
        return torch.cuda.get_device_properties(0).L2_cache_size

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Warm up, then capture a CUDA graph: what replays it, and the results that it fills."""
        from cuda_graphs import warm_up

        from blt_kernels.models.captured import capture

        warm_up(function)
        graph, results = capture(function)
        return graph.replay, results

    def seconds_a_call(
        self, functions: Sequence[Callable[[], Any]], calls: int = CALLS
    ) -> tuple[Callable[[], float], str]:
        """Return a function that times a call, and how: by replays of a graph of `calls` calls, `functions` in turn.

        What cannot be captured, since it waits for the GPU, is timed call by call with a cold L2.
        """
        from timing import FLUSH_BYTES

        try:
            replay, _ = self.capture(lambda: _call_in_turn(functions, calls))
        except Exception:
            if not self.usable():
                raise
            flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
            return lambda: _elapsed(functions[0], flush.zero_), "by events"
        return lambda: _elapsed(replay) / calls, "by graphs"

    def tool(self, name: str) -> list[str]:
        """Return the command of ncu or compute-sanitizer."""
        found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
        if found is None:
            raise FileNotFoundError(f"{name} is not installed")
        return [found]


class Rehearsal(Target):
    """Stands in for a GPU: kernels run on the emulator and in Triton's interpreter, times are of the wall clock."""

    device = "cpu"
    rehearsal = True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put the emulated and interpreted kernels in the place of those of the CPU."""
        import backends

        from blt_kernels.triton.block_causal_attention import backward, forward

        with ExitStack() as stack:
            stack.enter_context(backends.use("emulated"))
            library = torch.library.Library("blt_kernels", "IMPL")
            stack.callback(library._destroy)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about each kernel that is replaced
                for name, module in (("fwd", forward), ("bwd", backward)):
                    operator = f"block_causal_attention_{name}"
                    library.impl(operator, getattr(module, f"{operator}_cuda"), "CPU")
            yield

    def disturb(self, stage: str, case: str) -> None:
        """Fail, hang or end the process where the environment says so."""
        for injected in filter(None, os.environ.get(FAULTS, "").split(";")):
            fault, of_stage, of_case = injected.split(maxsplit=2)
            if of_stage != stage or of_case not in case:
                continue
            if fault == "fail":
                raise RuntimeError("injected fault")
            if fault == "end":
                os._exit(139)
            time.sleep(3600)

    def usable(self) -> bool:
        return True

    def free(self) -> None:
        return

    def l2_bytes(self) -> int:
        return 0

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return a function that runs `function` again and writes into its first results, as a graph does."""
        results = function()

        def replay() -> None:
            for held, new in zip(pytree.tree_leaves(results), pytree.tree_leaves(function()), strict=True):
                if isinstance(held, Tensor):
                    held.detach().copy_(new.detach())

        return replay, results

    def seconds_a_call(
        self, functions: Sequence[Callable[[], Any]], calls: int = CALLS
    ) -> tuple[Callable[[], float], str]:
        def seconds() -> float:
            start = time.perf_counter()
            functions[0]()
            return time.perf_counter() - start

        return seconds, "rehearsed"

    def tool(self, name: str) -> list[str]:
        return [sys.executable, str(TESTS / "gpu_stand_in.py"), name]


def make_target(rehearse: bool, only: Sequence[str] = (), warm: bool = False) -> Target:
    """Return a GPU, or its rehearsal."""
    return (Rehearsal if rehearse else Target)(only, warm)


def _call_in_turn(functions: Sequence[Callable[[], Any]], calls: int) -> None:
    for i in range(calls):
        functions[i % len(functions)]()


def _elapsed(function: Callable[[], Any], before: Callable[[], Any] | None = None) -> float:
    if before is not None:
        before()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
