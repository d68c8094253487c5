"""Compile a Triton kernel ahead of time, as its launcher would, on a machine without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from blt_kernels.triton.block_causal_attention.launch import HEAD_DIMS, MAX_SPLITS, Launch, launch_options

KERNELS = ("fwd", "bwd_dkdv", "bwd_dq", "decode")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
OFFSETS = ("first", "last", "of_queries", "of_keys", "cu_q", "cu_k", "used")
STORED_AS_FP32 = ("lse", "sums", "parts")


def configurations(arch: tuple[int, int]) -> Iterator[tuple[str, int, torch.dtype, Launch]]:
    """Yield every (kernel, padded width, dtype, launch) that `launch_options` returns; fp16 is launched as bf16."""
    for kernel in KERNELS:
        for padded in HEAD_DIMS:
            for dtype in (torch.bfloat16, torch.float32):
                for launch in dict.fromkeys(launch_options(kernel, n, dtype, arch) for n in (padded, padded - 1)):
                    yield kernel, padded, dtype, launch


def kernel_of(name: str) -> Any:
    from blt_kernels.triton.block_causal_attention import backward, decode, forward, ranges

    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "kernels for the interpreter cannot be compiled"
    kernel = f"block_causal_attention_{name}_kernel"
    return next(vars(module)[kernel] for module in (forward, backward, decode, ranges) if kernel in vars(module))


@cache
def compiled(
    name: str, width: int, dtype: torch.dtype, launch: Launch, arch: tuple[int, int], even: bool = True,
    offsets: bool = True,
) -> Any:  # fmt: skip
    """Compile a kernel as its launcher would, for aligned tensors; `width` is the padded one.

    Without `offsets`, documents are of one length.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from blt_kernels.triton.block_causal_attention.tiles import precision_of

    kernel = kernel_of(name)
    constants = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK": launch.block_m, "BLOCK_D": width}
    constants |= {"HEAD_DIM": width if even else width * 3 // 4}  # a padded head has width 24, 48, 96 or 192
    constants |= {"PRECISION": precision_of(torch.empty(0, width, dtype=dtype))}
    constants |= {"CAUSAL": True, "WINDOWED": True, "USED": True, "MAX_SPLITS": MAX_SPLITS}
    constants |= {"BLOCK_SPLITS": launch.block_n} | ({} if offsets else {"cu_q": None, "cu_k": None})
    signature, aligned = {}, {}
    for index, argument in enumerate(p.name for p in kernel.params):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in OFFSETS:
            signature[argument] = "*i32"
        elif argument in STORED_AS_FP32 or (name == "decode" and argument == "out"):
            signature[argument] = "*fp32"
        elif argument in ("q", "k", "v", "out") or argument.startswith("grad_"):
            signature[argument] = f"*{NAMES[dtype]}"
        else:
            signature[argument] = "fp32" if argument.endswith(("scale", "power", "factor")) else "i32"
        if signature[argument][0] == "*" or argument.startswith("stride"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    own = {k: v for k, v in constants.items() if k in signature}
    return triton.compile(
        ASTSource(kernel, signature, own, aligned),
        target=GPUTarget("cuda", arch[0] * 10 + arch[1], 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    )
