"""Times every op at the shapes of BASELINES, beside its peers, by CUDA graphs: the comparisons of ``bench_<op>.py``.

A graph holds 20 calls, fewer of long ones, on several copies of the inputs where one copy would fit in the L2 cache.
Graphs of all implementations and of the limit are replayed in turn, so that a ratio is one of neighbours.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timing
from timing import Comparison, Make, Row

from blt_kernels._extension import OPERATORS
from gpu_stages import Case
from gpu_stages.target import CALLS, Target

# The most informative ops come first. Attention has a stage of its own.
FIRST = ("patch_pool", "entropy_patch", "patch_cross_attention", "ngram_hash_embed", "patch_unpool", "token_entropy")
BENCHED = {path.stem.removeprefix("bench_") for path in Path(timing.__file__).parent.glob("bench_*.py")}
OTHERS = sorted(BENCHED & set(OPERATORS.values()) - {*FIRST, "block_causal_attention"})
ROUNDS = 5
MAX_COPIES = 4
SLOW_SECONDS = 0.05  # a peer that takes longer is timed call by call
GRAPH_SECONDS = 0.03  # a graph of longer calls holds fewer of them
WITH_FLEX = (0, 3)  # these cases of bench_block_causal_attention run again last: compiling takes many seconds


def timings_cases(target: Target) -> list[Case]:
    """Return the first comparison of every op, then the second ones."""
    device = target.device
    found = []
    for op in (*FIRST, *OTHERS):
        bench = importlib.import_module(f"bench_{op}")
        makes = list(bench.comparisons(small=target.rehearsal, device=device, compile_peers=False))
        found.append([case_of(op, make) for make in makes][: 1 if target.rehearsal else None])
    in_turn = [case for cases in itertools.zip_longest(*found) for case in cases if case is not None]
    if not target.rehearsal:
        in_turn += [
            case_of("models", make) for make in importlib.import_module("bench_models").comparisons(device=device)
        ]
    return [case for case in in_turn if target.wants(case.name)]


def attention_cases(target: Target) -> list[Case]:
    """Return block_causal_attention beside cuDNN, varlen_attn and, for two shapes, flex_attention; decoding is 5th."""
    bench = importlib.import_module("bench_block_causal_attention")
    device = target.device
    if target.rehearsal:
        tiny = replace(bench.CASES[device][0][0], lengths=[5, 0, 3], heads=2, key_heads=2, width=16)
        makes = [partial(bench.comparison, tiny, device, False, False)]
    else:
        passes = [(number, case, b) for number, (case, both) in enumerate(bench.CASES[device]) for b in both]
        # Triton's kernels are the same for all lengths, so short inputs warm them up. While they are compiled in the
        # background, a GPU that is being measured should have little else to do.
        makes = [
            partial(bench.comparison, replace(case, lengths=bench.SMALL) if target.warm else case, device, b, False)
            for _, case, b in passes
        ]
        used, room = ([60, 1, 33], 64) if target.warm else (bench.USED, bench.ROOM)
        makes.insert(4, partial(bench.decoding, used, room, device))
        makes += [partial(bench.comparison, case, device, b, True) for number, case, b in passes if number in WITH_FLEX]
    found = [case_of("block_causal_attention", make) for make in makes]
    return [case for case in found if target.wants(case.name)]


def case_of(op: str, make: Make) -> Case:
    _, arguments = timing.name_of_case(make)
    return Case(f"{op} {getattr(make, 'func', make).__name__} {arguments}", partial(measure, make=make))


def measure(target: Target, make: Make) -> Iterator[Row]:
    """Yield the rows of a comparison, and the failures of peers."""
    yield from timing.rows_of(make, lambda comparison: compare(target, comparison, make))
    target.free()


def compare(target: Target, comparison: Comparison, make: Make) -> list[Row]:
    """Check that the implementations agree, then time them."""
    failures = dict(comparison.failures)
    results = timing.run_each(comparison.implementations, failures)
    if target.warm:
        return []
    comparison.agree(results)
    del results
    target.free()
    others = [make().implementations for _ in range(copies_for(target, comparison) - 1)]
    limits = {f"limit: {name}": function for name, function in comparison.limits.items()}
    samplers: dict[str, Callable[[], float]] = {}
    ways: dict[str, str] = {}
    for name, function in {**comparison.implementations, **limits}.items():
        if name in failures:
            continue
        with timing.failing(name, failures):
            functions = [function, *(other[name] for other in others if name in other)]
            samplers[name], ways[name] = sampler(target, functions)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(1 if target.rehearsal else ROUNDS):
        for name in [name for name in samplers if name not in failures]:
            with timing.failing(name, failures):
                samples[name].append(samplers[name]())
    measured = {name: times for name, times in samples.items() if name not in failures}
    shown = replace(comparison, device="graph")  # the memory that a call holds is measured on the CPU only
    rows = timing._rows(shown, {}, measured)
    rows = [replace(row, status=f"ok, {ways[row.implementation]}") for row in rows]
    return rows + [timing.failed(comparison, *failure) for failure in failures.items()]


def copies_for(target: Target, comparison: Comparison) -> int:
    """Return how many copies of the inputs to time on; products reuse what they read, so one copy serves them."""
    return copies_beyond_l2(target, comparison.work) if comparison.unit == "byte" else 1


def copies_beyond_l2(target: Target, size: int) -> int:
    """Return how many copies of `size` bytes exceed the L2 cache together."""
    large = 2 * target.l2_bytes()
    return 1 if size >= large else min(MAX_COPIES, large // max(size, 1) + 1)


def sampler(target: Target, functions: Sequence[Callable[[], Any]]) -> tuple[Callable[[], float], str]:
    """Return a function that times a call: long calls are sampled less often, and a slow peer runs once a sample."""
    if target.rehearsal:
        return target.seconds_a_call(functions)
    clock = timing._Clock("cuda")
    functions[0]()
    seconds = clock.sample(functions[0], 1)
    if seconds > SLOW_SECONDS:
        return lambda: clock.sample(functions[0], 1), "by events"
    return target.seconds_a_call(functions, max(2, min(CALLS, int(GRAPH_SECONDS / seconds))))
