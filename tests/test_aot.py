"""The Triton kernels compile ahead of time for every launch on every GPU, without one: no spills, shared memory fits.

Triton brings ptxas and cuobjdump along. `make cuda-check` does the same for the kernels in CUDA C++.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from blt_kernels.triton.attention_launch import KERNELS, MAX_SPLITS, WIDTHS, Launch, configurations, launch_options

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

ARCHS = [(8, 0), (9, 0), (10, 0)]
SHARED = {(8, 0): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}  # tables for (8, 0) serve GPUs of 99 KB too
REGISTERS = 65536  # of a multiprocessor, and 255 of a thread
RESIDENT = {  # warps that a multiprocessor has registers for, at least, by (kernel, bytes a number) and width
    ("fwd", 2): (8, 8, 8, 8),
    ("fwd", 4): (8, 8, 8, 12),
    ("bwd_dkdv", 2): (8, 8, 8, 8),
    ("bwd_dkdv", 4): (8, 8, 8, 16),
    ("bwd_dq", 2): (8, 8, 8, 8),
    ("bwd_dq", 4): (8, 8, 8, 16),
    ("decode", 2): (28, 20, 12, 12),  # it waits for memory, with the more loads under way the better
    ("decode", 4): (12, 12, 8, 12),
}
RESIDENT_SMALL = {"ranges": 48, "bwd_sums": 16, "combine": 16}  # kernels that stream
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
OFFSETS = ("first", "last", "cu_q", "cu_k", "used")
STORED_AS_FP32 = ("lse", "sums", "parts")


def kernel_of(name: str) -> Any:
    from blt_kernels.triton import attention_backward, attention_decode, attention_ranges, block_causal_attention

    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "kernels for the interpreter cannot be compiled"
    modules = (block_causal_attention, attention_backward, attention_decode, attention_ranges)
    return next(
        getattr(module, f"block_causal_attention_{name}_kernel")
        for module in modules
        if hasattr(module, f"block_causal_attention_{name}_kernel")
    )


@cache
def compiled(
    name: str, width: int, dtype: torch.dtype, launch: Launch, arch: tuple[int, int], even: bool = True
) -> Any:
    """A kernel as its launcher would compile it, for aligned tensors; `width` is the padded one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from blt_kernels.triton.attention_tiles import precision_of

    kernel = kernel_of(name)
    constants = {"ROWS": launch.rows, "STEP": launch.step, "E": width, "EVEN": even}
    constants |= {"PRECISION": precision_of(torch.empty(0, width, dtype=dtype))}
    constants |= {"CAUSAL": True, "WINDOWED": True, "USED": True, "OF_KEYS": True, "MOST": MAX_SPLITS}
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
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True},
    )


def resources(binary: Any, folder: Path) -> dict[str, int]:
    """What cuobjdump says: REG, STACK, LOCAL."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown)}


def check(binary: Any, resident: int, arch: tuple[int, int], folder: Path) -> None:
    """No spills, no more registers than leave room for `resident` warps, and shared memory that fits."""
    used = resources(binary, folder)
    assert set(used) == {"REG", "STACK", "LOCAL"}
    assert used["STACK"] == used["LOCAL"] == 0, f"spills: {used}"
    ceiling = min(REGISTERS // (resident * 32) // 8 * 8, 255)  # they are handed out in eights
    assert used["REG"] <= ceiling, f"{used['REG']} registers, of {ceiling} for {resident} warps"
    assert binary.metadata.shared <= SHARED[arch]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_launch_compiles_without_spills(name: str, width: int, arch: tuple[int, int], tmp_path: Path) -> None:
    own = [c for c in configurations(arch) if c[:2] == (name, width)]
    assert {dtype for _, _, dtype, _ in own} == {torch.bfloat16, torch.float32}
    failures = []
    for _, _, dtype, launch in own:
        try:
            resident = RESIDENT[name, dtype.itemsize][WIDTHS.index(width)]
            check(compiled(name, width, dtype, launch, arch), resident, arch, tmp_path)
        except AssertionError as error:
            failures.append(f"{NAMES[dtype]} {launch}: {error}")
    assert failures == []


@pytest.mark.parametrize("name", KERNELS)
def test_padded_widths_and_fp16(name: str, tmp_path: Path) -> None:
    for width, dtype in ((96, torch.bfloat16), (64, torch.float16)):
        launch = launch_options(name, width, dtype, None, (9, 0))
        binary = compiled(name, 128 if width == 96 else width, dtype, launch, (9, 0), even=width != 96)
        check(binary, 8, (9, 0), tmp_path)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("name", "rows", "step"), [("ranges", 128, 1), ("bwd_sums", 64, 1), ("combine", 1, 16)])
def test_small_kernels(name: str, rows: int, step: int, arch: tuple[int, int], tmp_path: Path) -> None:
    check(compiled(name, 256, torch.bfloat16, Launch(rows, step, 4, 1), arch), RESIDENT_SMALL[name], arch, tmp_path)


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("name", ["fwd", "bwd_dkdv", "bwd_dq"])
def test_hopper_multiplies_in_wgmma(name: str, width: int) -> None:
    launch = launch_options(name, width, torch.bfloat16, None, (9, 0))
    ptx = compiled(name, width, torch.bfloat16, launch, (9, 0)).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx


@pytest.mark.parametrize("name", ["fwd", "bwd_dkdv", "bwd_dq"])
def test_loads_run_ahead_of_products(name: str) -> None:
    """Tiles of 16 bytes a load are copied to shared memory asynchronously, on every GPU."""
    for arch in ARCHS:
        launch = launch_options(name, 64, torch.bfloat16, None, arch)
        ptx = compiled(name, 64, torch.bfloat16, launch, arch).asm["ptx"]
        assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", ptx)


@pytest.mark.parametrize("name", ["fwd", "bwd_dq"])
def test_narrow_heads_are_stored_in_16_bytes(name: str) -> None:
    launch = launch_options(name, 64, torch.bfloat16, None, (9, 0))
    ptx = compiled(name, 64, torch.bfloat16, launch, (9, 0)).asm["ptx"]
    assert "st.global.v4.b32" in ptx
    assert "st.global.b16" not in ptx
