"""Search how block_causal_attention is launched on this GPU, and print tables for `triton/attention_launch.py`.

Every kernel is timed in each way that compiles, the others of its pass as the table says, on long causal documents. The
fastest of each is printed: `tests/test_aot.py` says whether it spills. Run it on a machine with a GPU as
``python bench/search_attention.py [--width 128] [--dtype bfloat16] [--window 512]``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from common import normal
from timing import FLUSH_BYTES

from blt_kernels.testing import offsets_of
from blt_kernels.triton import attention_backward, block_causal_attention
from blt_kernels.triton.attention_launch import WIDTHS, Launch, launch_options

LENGTHS, HEADS = [8192] * 2, 16
SAMPLES = 7


def launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Yield the space that is searched."""
    most = 128 if dtype.itemsize == 2 else 64
    sizes = [n for n in (16, 32, 64, 128) if n <= most]
    for rows, step, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3, 4)):
        if 256 <= rows * step * 8 // warps <= 128 * 128 * 2:
            yield Launch(rows, step, warps, stages)


def milliseconds(function: Callable[[], object]) -> float:
    """Median of a call's time with a cold L2."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(SAMPLES + 2):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def search(kernel: str, width: int, dtype: torch.dtype, window: int | None) -> tuple[Launch, float, float]:
    """Return the fastest launch of a kernel, what it takes, and what the one in the table takes: milliseconds."""
    size, arch = sum(LENGTHS), torch.cuda.get_device_capability()
    q, k, v, grad = (normal(size, HEADS, width, seed=n, dtype=dtype, device="cuda") for n in range(4))
    rest = (offsets_of(LENGTHS, device="cuda"), None, window, True, None, None)
    out, lse = block_causal_attention.block_causal_attention_fwd_cuda(q, k, v, *rest)

    def run(launch: Launch) -> float:
        """Time the whole pass, of which only this kernel is launched in another way."""

        def chosen(name: str, *arguments: object) -> Launch:
            return launch if name == kernel else launch_options(name, *arguments)

        module = block_causal_attention if kernel == "fwd" else attention_backward
        with mock.patch.object(module, "launch_options", chosen):
            if kernel == "fwd":
                return milliseconds(lambda: module.block_causal_attention_fwd_cuda(q, k, v, *rest))
            return milliseconds(lambda: module.block_causal_attention_bwd_cuda(grad, q, k, v, out, lse, *rest))

    times = {}
    for launch in launches(dtype):
        try:
            times[launch] = run(launch)
        except Exception as error:  # too much shared memory, or what the compiler does not take
            print(f"# {kernel} {width} {launch}: {type(error).__name__}")
    best = min(times, key=lambda launch: times[launch])
    return best, times[best], run(launch_options(kernel, width, dtype, window, arch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, choices=WIDTHS, action="append")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--window", type=int)
    parser.add_argument("--kernel", choices=("fwd", "bwd_dkdv", "bwd_dq"), action="append")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(f"# {torch.cuda.get_device_name()}, window {options.window}")
    for kernel in options.kernel or ("fwd", "bwd_dkdv", "bwd_dq"):
        row = []
        for width in options.width or WIDTHS:
            best, time, before = search(kernel, width, dtype, options.window)
            print(f"# {kernel} {width}: {time:.3f} ms, {before:.3f} ms as it is in the table")
            row.append(f"Launch({best.rows}, {best.step}, {best.warps}, {best.stages})")
        print(f'("{kernel}", {dtype.itemsize}): ({", ".join(row)}),')


if __name__ == "__main__":
    main()
