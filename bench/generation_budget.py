"""List what a generation step of a BLT takes, part by part: ``python bench/generation_budget.py --weights int8``.

It is the BLT of ``bench_generate.py``, with batch 1. Parts are functions: a time is that of the function without the
other parts that it calls, on the clock of one thread. The least of the rounds is reported, whose parts add up to it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from bench_generate import PATCH_SIZE, Case, Steps, text
from peers import models as peers

from blt_kernels.models import blt_layers, blt_state, state
from blt_kernels.models.base import ByteModel
from blt_kernels.nn import cache, few_rows, layers

# Each entry has the owner of some functions, their names, and the part of a step that their time counts for.
PARTS: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (few_rows, ("few_row_layer_step",), "operator of layers, with cross attention and head"),
    (few_rows._Stack, ("is_of",), "whether modules are as they were"),
    (few_rows, ("few_rows",), "calls of the operator"),
    (blt_layers, ("few_rows",), "calls of the operator"),
    (cache.RowBuffer, ("append", "write", "read", "trim"), "entries of buffers"),
    (cache.KeyCache, ("extend",), "slots and documents of keys"),
    (state, ("rotary_table",), "rotations"),
    (blt_state, ("rotary_table",), "rotations"),
    (blt_layers.LocalEncoder, ("pool",), "pooling of patches"),
    (layers.CrossAttention, ("keys",), "keys and values that the decoder reads"),
    (blt_state.BLTState, ("_cuts", "extend_patcher"), "boundaries, with entropies"),
    (blt_state, ("encode",), "n-grams and embeddings"),
    (state, ("embed_ids",), "n-grams and embeddings"),
    (ByteModel, ("pack", "extend"), "checks of arguments"),
    (Steps, ("step",), "choice of the byte"),
)
REST = "the rest of the state"


class Clock:
    """Counts the time of parts and their calls. `wrapped` functions of parts may call each other."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner: list[float] = []  # for each running function, the time of the parts that it has called

    def wrapped(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.thread_time()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                took = time.thread_time() - begin
                self.seconds[part] += took - self._inner.pop()
                self.calls[part] += 1
                if self._inner:
                    self._inner[-1] += took

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the parts while the context is open."""
        with ExitStack() as stack:
            for owner, names, part in (*PARTS, (blt_state.BLTState, ("_extend",), REST)):
                for name in names:
                    stack.enter_context(mock.patch.object(owner, name, self.wrapped(getattr(owner, name), part)))
            yield


def budget(steps: Callable[[], Any], rounds: int) -> Clock:
    """Return the clock of the shortest of these rounds."""
    steps()
    clocks = []
    for _ in range(rounds):
        clock = Clock()
        with clock.running():
            steps()
        clocks.append(clock)
    return min(clocks, key=lambda clock: sum(clock.seconds.values()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=("bf16", "int8"), help="how matrices are stored; fp32 if not given")
    parser.add_argument("--behind", type=int, default=512, help="bytes of the prompt")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="few bytes, and one global layer")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case = Case(1, options.behind, 16 if options.small else 64)
    tokens = text(case.rows, case.length + case.new)
    sizes = peers.SMALLEST if options.small else peers.SMALL
    model: Any = peers.with_weights_of(peers.transformers_blt(tokens, PATCH_SIZE, sizes), "cpu")
    model = model if options.weights is None else model.quantized(options.weights)
    clock = budget(Steps(model, tokens, case), options.rounds)
    print(f"{'us a step':>10} {'calls':>6}")
    for part, seconds in clock.seconds.most_common():
        print(f"{seconds / case.new * 1e6:10.0f} {clock.calls[part] / case.new:6.2f}  {part}")
    print(f"{sum(clock.seconds.values()) / case.new * 1e6:10.0f}         in all")


if __name__ == "__main__":
    main()
