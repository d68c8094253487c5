"""Launches of block_causal_attention at the shapes of BASELINES.md, with the sizes of tiles from its own tables."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from cuda_model import gpus
from cuda_model.attention import Documents, TritonKernel, estimate, estimate_decode, streaming
from cuda_model.sass import functions_of, parse_function
from cuda_model.table import TABLE, WHOLE, Row, measured, measurements

HEADS = 16
FORWARD, BACKWARD = 4, 14  # a pair of query and key takes so many flops a column of a head
CASES = (  # (shape, documents, head width, key heads, a bench's name of the shape)
    ("2 x 8192, d128", Documents((8192, 8192)), 128, 16, "[16384, 16, 128] in 2"),
    ("32768, d128, 16/4 heads", Documents((32768,)), 128, 4, "[32768, 16, 128] in 1"),
    ("2 x 16384, d64, window 512", Documents((16384, 16384), 512), 64, 16, "window 512"),
)
DECODE_HEADS, DECODE_GROUPS, DECODE_WIDTH, ROOM = 32, 8, 128, 8192
USED = [ROOM * (n % 8 + 1) // 8 - n for n in range(64)]


def compiled(name: str, width: int, cuobjdump: str) -> TritonKernel:
    """Compile a kernel for sm_90 as its launcher would."""
    import torch
    from triton_compile import compiled as compile_kernel

    from blt_kernels.triton.block_causal_attention.launch import launch_options

    launch = launch_options(name, width, torch.bfloat16, (9, 0))
    binary: Any = compile_kernel(name, width, torch.bfloat16, launch, (9, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        sass, usage = (
            subprocess.run([cuobjdump, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    (code,) = functions_of(sass).values()
    registers = int(re.findall(r"\bREG:(\d+)", usage)[0])
    return TritonKernel(
        name, parse_function(code), registers, binary.metadata.shared, launch.num_warps, launch.block_m,
        launch.block_n, launch.num_stages,
    )  # fmt: skip


def compiler() -> str:
    """Return the compiler that the rows are of."""
    import triton

    return f"triton {triton.__version__}"


def _row(
    op: str, shape: str, gpu: gpus.Gpu, kernel: str, seconds: float, flops: float, limit: str,
    own: TritonKernel | None = None, details: dict[str, float] | None = None, instructions: float = 0.0,
) -> Row:  # fmt: skip
    details = details or {}
    return Row(
        op, shape, "bfloat16", gpu.name, kernel, 1, seconds * 1e6, flops / seconds / gpu.flops, limit, flops,
        instructions, details.get("moved", 0.0) / 1e6, own.registers if own else None,
        int(details["resident_warps"]) if own else None, None, None, None, None, None, compiler(),
    )  # fmt: skip


def attention_rows(kernel_of: Callable[[str, int], TritonKernel]) -> Iterator[Row]:
    """Yield rows of forward and backward: each kernel, the small ones around them, and all together."""
    for shape, documents, width, kv_heads, bench in CASES:
        for gpu in gpus.GPUS:
            results = measurements(TABLE.parent, gpu.name)
            row, ids = HEADS * width * 2, documents.rows * 8
            small = {
                "fwd": {"ranges": streaming(ids, 3, gpu)},
                "bwd": {
                    "ranges of both sides": streaming(2 * ids, 3, gpu),
                    "bwd_sums": streaming(documents.rows * (2 * row + HEADS * 12), 3, gpu),
                },
            }
            for direction, factor, names in (("fwd", FORWARD, ("fwd",)), ("bwd", BACKWARD, ("bwd_dkdv", "bwd_dq"))):
                op, flops = f"block_causal_attention {direction}", factor * documents.pairs * HEADS * width
                total, issued, limits = 0.0, 0.0, {}
                for name in names:
                    own = kernel_of(name, width)
                    e = estimate(own, documents, HEADS, kv_heads, width, gpu)
                    seconds = e["seconds"] + gpu.launch_seconds
                    limit = "L2" if e["L2"] > e["loop"] else "tensor" if e["tensor"] > e["other"] else "issue"
                    share = {"fwd": 4, "bwd_dkdv": 8, "bwd_dq": 6}[name] / factor * flops
                    instructions = e["instructions"] * e["tiles"]
                    total, issued, limits[seconds] = total + seconds, issued + instructions, limit
                    yield _row(op, shape, gpu, name, seconds, share, limit, own, e, instructions / flops * 1e6)
                for name, seconds in small[direction].items():
                    total += seconds + gpu.launch_seconds
                    yield _row(op, shape, gpu, name, seconds + gpu.launch_seconds, 1.0, "latency")
                whole = _row(op, shape, gpu, WHOLE, total, flops, limits[max(limits)], None, None, issued / flops * 1e6)
                yield _with(whole, measured(results, op, "bfloat16", bench))
    yield from decode_rows(kernel_of("decode", DECODE_WIDTH))


def decode_rows(own: TritonKernel) -> Iterator[Row]:
    """Yield rows for one new query a sequence, with caches of different lengths. Their bytes bound the speed."""
    from blt_kernels.triton.block_causal_attention.launch import decode_splits

    moved = 2 * sum(USED) * DECODE_GROUPS * DECODE_WIDTH * 2
    shape = f"64 queries, {DECODE_HEADS}/{DECODE_GROUPS} heads, d128, caches of {sum(USED)} keys"
    for gpu in gpus.GPUS:
        splits = decode_splits(DECODE_GROUPS, len(USED) * ROOM, len(USED), gpu.processors)
        e = estimate_decode(own, USED, DECODE_GROUPS, splits, moved, gpu)
        seconds = e["seconds"] + gpu.launch_seconds * (1 if splits == 1 else 2)
        limit = max(("memory", "latency", "issue"), key=e.__getitem__)
        results = measurements(TABLE.parent, gpu.name)
        for name in (f"decode, {splits} splits", WHOLE):
            row = Row(
                "block_causal_attention decode", shape, "bfloat16", gpu.name, name, 1 if splits == 1 else 2,
                seconds * 1e6, moved / gpu.copy / seconds, limit, moved, e["instructions"] / moved * 1e3, moved / 1e6,
                own.registers, int(e["resident_warps"]), e["in_flight"] / 1e3, gpus.bytes_needed(gpu) / 1e3, None,
                None, None, compiler(),
            )  # fmt: skip
            yield (
                row
                if name != WHOLE
                else _with(row, measured(results, "block_causal_attention decode", "bfloat16", "64 queries"))
            )


def _with(row: Row, found: tuple[float | None, float | None]) -> Row:
    return replace(row, measured_us=found[0], measured_share=found[1])


def cached(cuobjdump: str) -> Callable[[str, int], TritonKernel]:
    """Return `compiled`, which compiles each kernel once."""
    return cache(lambda name, width: compiled(name, width, cuobjdump))
