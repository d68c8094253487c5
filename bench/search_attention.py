"""Search how block_causal_attention is launched on this GPU, for the tables of its `launch.py`.

At most 12 candidates a kernel are tried, the table's own first. Each is compiled, left out if it spills, and compared
with the result of the table's. CUDA graphs of several calls time it, as in `gpu_stages/timings.py`, on several copies
of the inputs where one copy would fit in the L2 cache. The other kernels of its pass are launched as the table says. A
row that has been confirmed, or replaced, is marked 'measured' in the table, with the GPU. Rows are printed as they come
by ``python bench/search_attention.py [--width 64] [--window 512]``; `bench/gpu.py` calls `search`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from common import normal
from gpu_stages.target import Target
from gpu_stages.timings import copies_beyond_l2, sampler
from torch import Tensor

from blt_kernels.testing import offsets_of
from blt_kernels.triton.block_causal_attention import backward, decode, forward
from blt_kernels.triton.block_causal_attention.launch import HEAD_DIMS, Launch, launch_options

MAX_CANDIDATES = 12
SAMPLES = 7
PROCESSES = 4
MODULES: dict[str, ModuleType] = {
    "fwd": forward,
    "bwd_dkdv": backward,
    "bwd_dq": backward,
    "decode": decode,
}
KERNELS = tuple(MODULES)
CANDIDATES = {  # (block_m, block_n, num_warps, num_stages)
    "fwd": [
        (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 4), (64, 128, 4, 3),
        (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 2), (128, 64, 8, 2),
    ],
    "bwd_dkdv": [
        (64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2),
        (32, 64, 4, 3), (32, 64, 4, 2), (32, 128, 8, 2), (128, 64, 8, 2), (32, 64, 8, 3),
    ],
    "bwd_dq": [
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3), (64, 64, 4, 2),
        (64, 32, 4, 3), (64, 128, 8, 2), (128, 128, 8, 2), (64, 64, 8, 3), (64, 32, 4, 4),
    ],
    "decode": [
        (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 4), (16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 4, 4),
        (32, 32, 4, 3), (32, 32, 4, 4), (16, 128, 4, 2), (32, 128, 4, 2), (16, 32, 4, 4),
    ],
}  # fmt: skip


def candidates(kernel: str, width: int, dtype: torch.dtype) -> list[Launch]:
    """Return the launches to try: the table's own, then others, in fp32 with tiles of half the size."""
    arch = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    shrink = dtype.itemsize // 2
    others = [Launch(max(m // shrink, 16), max(n // shrink, 16), w, s) for m, n, w, s in CANDIDATES[kernel]]
    return list(dict.fromkeys([launch_options(kernel, width, dtype, arch), *others]))[:MAX_CANDIDATES]


def sizes(kernel: str, length: int) -> tuple[int, int, int, int, int]:
    """Return documents, query heads, key heads, queries and keys of the text that a kernel is timed on."""
    if kernel == "decode":  # 32 caches have one query each, a key head has 8 heads
        return 32, 32, 4, 32, 32 * length // 2
    return 2, 16, 16, 2 * length, 2 * length


def prepare(
    kernel: str, width: int, dtype: torch.dtype, window: int | None, length: int, copy: int = 0
) -> Callable[[Launch], tuple[Tensor, ...]]:
    """Return a function that runs the pass of a kernel in the given launch, on documents of `length` bytes.

    Every `copy` has random inputs of its own.
    """
    documents, heads, kv_heads, queries, keys = sizes(kernel, length)
    cu_q, cu_k = (offsets_of([n // documents] * documents, device="cuda") for n in (queries, keys))
    q, grad = (normal(queries, heads, width, seed=4 * copy + n, dtype=dtype, device="cuda") for n in (0, 1))
    k, v = (normal(keys, kv_heads, width, seed=4 * copy + n, dtype=dtype, device="cuda") for n in (2, 3))
    rest = (cu_q, cu_k if kernel == "decode" else None, window, True, None, None)
    run_forward = forward.block_causal_attention_fwd_cuda
    run_backward = backward.block_causal_attention_bwd_cuda
    saved = run_forward(q, k, v, *rest) if kernel.startswith("bwd") else ()

    def run(launch: Launch) -> tuple[Tensor, ...]:
        def chosen(name: str, *arguments: Any) -> Launch:
            return launch if name == kernel else launch_options(name, *arguments)

        with mock.patch.object(MODULES[kernel], "launch_options", chosen):
            return run_backward(grad, q, k, v, *saved, *rest) if saved else run_forward(q, k, v, *rest)

    return run


def check(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise ArithmeticError unless half of the digits agree."""
    for actual, other in zip(results, expected, strict=True):
        error = float((actual.double() - other.double()).norm() / other.double().norm())
        if not error <= torch.finfo(actual.dtype).eps ** 0.5:
            raise ArithmeticError(f"differs from the table's launch by {error:.2e}")


def milliseconds(target: Target, functions: Sequence[Callable[[], object]], seconds: float) -> float:
    """Return the median time of a call, from up to `SAMPLES` graphs of calls of `functions`, in about `seconds`."""
    sample, _ = sampler(target, functions)
    times: list[float] = []
    start = time.monotonic()
    while len(times) < SAMPLES and (len(times) < 2 or time.monotonic() - start < seconds):
        times.append(1e3 * sample())
    return statistics.median(times)


def binaries(kernel: str) -> list[Any]:
    """Return what Triton has compiled of a kernel in this process, the newest last."""
    function = getattr(MODULES[kernel], f"block_causal_attention_{kernel}_kernel")
    return [binary for caches in function.device_caches.values() for binary in caches[0].values()]


def search(
    target: Target,
    kernel: str,
    budget: float,
    *,
    width: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    length: int = 8192,
) -> Iterator[dict[str, Any]]:
    """Time the candidates of a kernel, and yield a row for each as it is done, until `budget` seconds are spent.

    Rows have kernel, width, dtype, window, the fields of `Launch`, milliseconds (None if there is none, and `error`
    says why), in_table, and the seconds spent so far.
    """
    start = time.monotonic()
    _, heads, kv_heads, queries, keys = sizes(kernel, length)
    copies = copies_beyond_l2(target, (queries * heads + 2 * keys * kv_heads) * width * dtype.itemsize)
    runs = [prepare(kernel, width, dtype, window, length, copy) for copy in range(copies)]
    launches = candidates(kernel, width, dtype)
    expected: tuple[Tensor, ...] = ()
    for number, launch in enumerate(launches):
        spent = time.monotonic() - start
        if number and spent >= budget:
            return
        row = {"kernel": kernel, "width": width, "dtype": str(dtype).removeprefix("torch."), "window": window}
        row |= vars(launch) | {"milliseconds": None, "error": "", "in_table": number == 0}
        try:
            known = len(binaries(kernel))
            results = runs[0](launch)
            if spills := max((binary.n_spills for binary in binaries(kernel)[known:]), default=0):
                raise MemoryError(f"spills {spills} registers")
            expected = expected or results
            check(results, expected)
            share = (budget - spent) / (len(launches) - number)
            row["milliseconds"] = milliseconds(target, [partial(run, launch) for run in runs], share)
        except Exception as error:  # the launch has too much shared memory, or the compiler refuses it
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        yield row | {"seconds": time.monotonic() - start}


def compile_one(arguments: tuple[str, Launch, int, torch.dtype]) -> str:
    """Compile one launch, by running it on a short text; Triton keeps it on disk. Return what went wrong."""
    kernel, launch, width, dtype = arguments
    try:
        prepare(kernel, width, dtype, None, 64)(launch)
    except Exception as error:
        return f"{kernel} {launch}: {type(error).__name__}"
    return ""


def precompile(kernels: Iterable[str] = KERNELS, width: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Compile all candidates in processes of their own, and return what went wrong; `search` then only loads them."""
    work = [(kernel, launch, width, dtype) for kernel in kernels for launch in candidates(kernel, width, dtype)]
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        return [message for message in pool.map(compile_one, work) if message]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, choices=HEAD_DIMS, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--window", type=int)
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a kernel")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(f"# {torch.cuda.get_device_name()}, width {options.width}, {options.dtype}, window {options.window}")
    for kernel in options.kernel or KERNELS:
        for row in search(Target(), kernel, options.budget, width=options.width, dtype=dtype, window=options.window):
            launch = Launch(row["block_m"], row["block_n"], row["num_warps"], row["num_stages"])
            took = row["error"] or f"{row['milliseconds']:.3f} ms"
            print(f"{kernel} {launch}: {took}{', in the table' if row['in_table'] else ''}", flush=True)


if __name__ == "__main__":
    main()
