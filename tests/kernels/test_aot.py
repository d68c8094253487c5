"""The Triton kernels compile ahead of time for every launch on every GPU, without one: no spills, shared memory fits.

Triton brings ptxas, cuobjdump and nvdisasm along. `make cuda-check` does the same for the kernels in CUDA C++.

The Triton that is installed compiles for all GPUs, Triton 3.6, the oldest that the kernels are for, for Hopper: that is
where measurements are made, with the Triton of torch 2.11.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_compile import KERNELS, NAMES, compiled, configurations

from blt_kernels.triton.block_causal_attention.launch import HEAD_DIMS, Launch, launch_options

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / "build" / "triton-3.6"
ARCHS = [(8, 0), (9, 0), (10, 0)]
HOPPER = (9, 0)
archs = pytest.mark.parametrize("arch", ARCHS, ids=["ampere", "hopper", "blackwell"])
SHARED = {(8, 0): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}  # tables for (8, 0) serve GPUs of 99 KB too
REGISTERS = 65536  # a multiprocessor has so many, a thread at most 255
RESIDENT = {  # a multiprocessor has registers for so many warps, by (kernel, bytes a number) and width
    ("fwd", 2): (8, 8, 8, 8),
    ("fwd", 4): (8, 8, 8, 12),
    ("bwd_dkdv", 2): (8, 8, 8, 8),
    ("bwd_dkdv", 4): (8, 8, 8, 16),
    ("bwd_dq", 2): (8, 8, 8, 8),
    ("bwd_dq", 4): (8, 8, 8, 16),
    ("decode", 2): (12, 12, 8, 8),  # it waits for memory, with at least 64 KB of loads under way
    ("decode", 4): (12, 8, 8, 8),
}
# The hot loop waits so often for products, and at least 24 times if it waits for each wgmma.
WARPGROUP = {"fwd": 4, "bwd_dkdv": 6, "bwd_dq": 5}
RESIDENT_SMALL = {"ranges": 48, "bwd_sums": 16, "combine": 16}  # these kernels stream


def tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def output(*command: str | Path) -> str:
    """Return what a program prints to either stream."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def resources(binary: Any, folder: Path) -> dict[str, int]:
    """Return REG, STACK and LOCAL as cuobjdump shows them."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    shown = output(tool("cuobjdump"), "-res-usage", path)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown)}


def messages(binary: Any, folder: Path) -> list[str]:
    """Return what ptxas says about performance: C7510 and its neighbours are reasons to serialise wgmma."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = folder / "kernel.ptx"
    path.write_text(binary.asm["ptx"])
    shown = output(get_ptxas(90).path, "-v", "--gpu-name=sm_90a", path, "-o", folder / "again.cubin")
    return re.findall(r".*\(C75\d\d\).*", shown)


def hot_loop(binary: Any, folder: Path) -> list[str]:
    """Return the instructions of the first loop that multiplies, from its label to the branch that goes back there."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in output(tool("nvdisasm"), "-c", path).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", code[-1])
            if branch and branch[1] in labels:
                loop = code[labels[branch[1]] :]
                if any("MMA" in x for x in loop):
                    return loop
    raise AssertionError("no loop multiplies")


def check(binary: Any, resident: int, arch: tuple[int, int], folder: Path) -> None:
    """No spills, no more registers than leave room for `resident` warps, and shared memory that fits."""
    used = resources(binary, folder)
    assert set(used) == {"REG", "STACK", "LOCAL"}
    assert used["STACK"] == used["LOCAL"] == 0, f"spills: {used}"
    ceiling = min(REGISTERS // (resident * 32) // 8 * 8, 255)  # a warp gets a multiple of 8 for each thread
    assert used["REG"] <= ceiling, f"{used['REG']} registers, of {ceiling} for {resident} warps"
    assert binary.metadata.shared <= SHARED[arch]


@archs
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("width", HEAD_DIMS)
def test_every_launch_compiles_without_spills(name: str, width: int, arch: tuple[int, int], tmp_path: Path) -> None:
    own = [c for c in configurations(arch) if c[:2] == (name, width)]
    assert {dtype for _, _, dtype, _ in own} == {torch.bfloat16, torch.float32}
    failures = []
    for _, _, dtype, launch in own:
        try:
            resident = RESIDENT[name, dtype.itemsize][HEAD_DIMS.index(width)]
            check(compiled(name, width, dtype, launch, arch), resident, arch, tmp_path)
        except AssertionError as error:
            failures.append(f"{NAMES[dtype]} {launch}: {error}")
    assert failures == []


@pytest.mark.parametrize("name", KERNELS)
def test_padded_widths_and_fp16_on_hopper(name: str, tmp_path: Path) -> None:
    launch = launch_options(name, 64, torch.float16, HOPPER)
    check(compiled(name, 64, torch.float16, launch, HOPPER), 8, HOPPER, tmp_path)
    for width in (128,) if name == "decode" else HEAD_DIMS:
        launch = launch_options(name, width * 3 // 4, torch.bfloat16, HOPPER)
        check(compiled(name, width, torch.bfloat16, launch, HOPPER, even=False), 8, HOPPER, tmp_path)


@archs
@pytest.mark.parametrize(("name", "block_m", "block_n"), [("ranges", 128, 1), ("bwd_sums", 64, 1), ("combine", 1, 16)])
def test_small_kernels(name: str, block_m: int, block_n: int, arch: tuple[int, int], tmp_path: Path) -> None:
    check(
        compiled(name, 256, torch.bfloat16, Launch(block_m, block_n, 4, 1), arch), RESIDENT_SMALL[name], arch, tmp_path
    )


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("name", ["fwd", "bwd_dkdv", "bwd_dq"])
def test_hopper_multiplies_in_wgmma(name: str, width: int) -> None:
    launch = launch_options(name, width, torch.bfloat16, HOPPER)
    ptx = compiled(name, width, torch.bfloat16, launch, HOPPER).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx


@pytest.mark.parametrize(
    ("name", "width"), [(n, w) for n in WARPGROUP for w in HEAD_DIMS if (n, w) != ("bwd_dkdv", 256)]
)  # tiles of the last one have 32 rows, for want of registers
def test_products_run_in_wgmma_beside_the_rest_on_hopper(name: str, width: int, tmp_path: Path) -> None:
    """ptxas serialises none of them: then each one would be waited for before the next is issued."""
    launch = launch_options(name, width, torch.bfloat16, HOPPER)
    binary = compiled(name, width, torch.bfloat16, launch, HOPPER)
    assert messages(binary, tmp_path) == []
    loop = hot_loop(binary, tmp_path)
    assert any("HGMMA" in x for x in loop) or launch.block_m < 64  # a wgmma has more rows
    assert sum("WARPGROUP" in x for x in loop) <= WARPGROUP[name]


@pytest.mark.parametrize("name", ["fwd", "bwd_dkdv", "bwd_dq"])
def test_loads_run_ahead_of_products(name: str) -> None:
    """Tiles of 16 bytes a load are copied to shared memory asynchronously, on every GPU."""
    for arch in ARCHS:
        launch = launch_options(name, 64, torch.bfloat16, arch)
        ptx = compiled(name, 64, torch.bfloat16, launch, arch).asm["ptx"]
        assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", ptx)


@pytest.mark.parametrize("name", ["fwd", "bwd_dkdv", "bwd_dq"])
def test_padded_heads_are_loaded_ahead_too(name: str) -> None:
    launch = launch_options(name, 96, torch.bfloat16, HOPPER)
    ptx = compiled(name, 128, torch.bfloat16, launch, HOPPER, even=False).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
    assert "ld.global.b16" not in ptx


@pytest.mark.parametrize(("name", "width"), [("fwd", 64), *((n, w) for n in ("bwd_dkdv", "bwd_dq") for w in (64, 128))])
def test_results_are_stored_in_16_bytes(name: str, width: int) -> None:
    launch = launch_options(name, width, torch.bfloat16, HOPPER)
    ptx = compiled(name, width, torch.bfloat16, launch, HOPPER).asm["ptx"]
    assert "st.global.v4.b32" in ptx
    assert "st.global.b16" not in ptx


@pytest.mark.parametrize("name", KERNELS)
def test_fp32_is_summed_in_fp32_over_tiles(name: str) -> None:
    """Tensor cores truncate their sums: each product starts at 0, and is added to the rest by an ordinary addition."""
    for width in (64, 128):
        launch = launch_options(name, width, torch.float32, HOPPER)
        code = compiled(name, width, torch.float32, launch, HOPPER).asm["ttgir"]
        products = dict(re.findall(r"(%\w+) = tt\.dot %\w+, %\w+, (%\w+)", code))
        assert products
        for begin in products.values():
            while begin in products:
                begin = products[begin]
            assert begin.startswith("%cst") or re.search(rf"{re.escape(begin)} = arith\.select", code), begin


@pytest.mark.parametrize("name", ["decode", "combine", "ranges"])
def test_documents_of_one_length_compile_without_offsets_on_hopper(name: str, tmp_path: Path) -> None:
    decode = launch_options("decode", 128, torch.bfloat16, HOPPER)
    launch = {"decode": decode, "combine": Launch(1, 16, 1, 1), "ranges": Launch(128, 1, 4, 1)}[name]
    check(compiled(name, 128, torch.bfloat16, launch, HOPPER, offsets=False), 8, HOPPER, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
def test_triton_3_6() -> None:
    """The tests on Hopper pass with the oldest Triton, in a process of its own."""
    assert (OLDEST / "triton").is_dir(), "no Triton 3.6: make build/triton-3.6"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(OLDEST), str(ROOT)])}
    code = "import sys, triton, pytest; assert triton.__version__ == '3.6.0'; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "-k", "hopper", __file__],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
