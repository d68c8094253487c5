"""Launches of the Triton kernels of block_causal_attention: tables, decoding, registration, arguments."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from triton_compile import KERNELS, configurations
from triton_interpreter import inputs

from blt_kernels.reference import block_causal_attention as reference
from blt_kernels.testing import offsets_of
from blt_kernels.triton.block_causal_attention.launch import (
    MAX_SPLITS,
    Launch,
    decode_splits,
    decode_tiles,
    launch_options,
    max_decode_queries,
)

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"), pytest.mark.slow]


def test_launch_options() -> None:
    for arch in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (99, 0)):
        listed = {(kernel, width, dtype, launch) for kernel, width, dtype, launch in configurations(arch)}
        for kernel in KERNELS:
            for width, padded in ((1, 32), (32, 32), (33, 64), (96, 128), (192, 256), (256, 256)):
                for dtype in (torch.bfloat16, torch.float32):
                    launch = launch_options(kernel, width, dtype, arch)
                    assert isinstance(launch, Launch)
                    assert (kernel, padded, dtype, launch) in listed
                assert launch_options(kernel, width, torch.float16, arch) == launch_options(
                    kernel, width, torch.bfloat16, arch
                )
    with pytest.raises(ValueError, match="head_dim: expected at most 256, got 257"):
        launch_options("fwd", 257, torch.bfloat16, (9, 0))


def test_splits_fill_the_gpu_and_no_more() -> None:
    assert decode_splits(1, 1 << 20, 1, 132) == MAX_SPLITS
    assert decode_splits(8, 8192, 1, 132) == 32  # a split has 256 keys
    assert decode_splits(8, 64 * 8192, 64, 132) == 1  # all programs fit at once without splits
    assert decode_splits(8, 4 * 8192, 4, 132) == 8
    assert decode_splits(8, 0, 0, 132) == decode_splits(1, 100, 1, 132) == 1


def test_which_documents_are_decoded() -> None:
    assert max_decode_queries(16, 1, 64) == 16  # all queries are decoded, forward does not run
    assert max_decode_queries(128, 64, 1) == 128
    assert max_decode_queries(128, 64, 2) == 16
    assert max_decode_queries(463, 64, 1) == 16
    assert max_decode_queries(0, 0, 1) == 0


def test_programs_of_a_decoded_document() -> None:
    assert decode_tiles(64, 64, 64, 8, 32) == 1
    assert decode_tiles(16, 1, 16, 8, 32) == 4
    assert decode_tiles(463, 64, 16, 1, 32) == 1
    assert decode_tiles(5000, 2, 16, 128, 32) == 4  # each takes several tiles
    assert decode_tiles(0, 0, 0, 1, 32) == 1


@pytest.mark.parametrize("name", ["fwd", "bwd", "ranges_fwd"])
def test_cuda_tensors_take_triton(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"blt_kernels::block_causal_attention_{name}", "CUDA")


def test_triton_is_not_imported_with_the_package() -> None:
    code = "import sys, blt_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 32), (torch.float32, 300)])
def test_the_reference_takes_the_rest(dtype: torch.dtype, width: int) -> None:
    from blt_kernels.triton.block_causal_attention.backward import block_causal_attention_bwd_cuda
    from blt_kernels.triton.block_causal_attention.forward import block_causal_attention_fwd_cuda

    q, k, v, grad = inputs(9, 9, (2, 1), width, dtype)
    rest = (offsets_of([4, 5]), None, 3, True, None, None)
    out = block_causal_attention_fwd_cuda(q, k, v, *rest)
    expected = reference.block_causal_attention_fwd_reference(q, k, v, *rest)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    grads = block_causal_attention_bwd_cuda(grad, q, k, v, *out, *rest)
    expected = reference.block_causal_attention_bwd_reference(grad, q, k, v, *out, *rest)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(9, 2, 16)}, "q, k, v: shapes"),
        ({"v": torch.zeros(9, 1, 32).half()}, "q, k, v: expected one dtype"),
        ({"cu_seqlens_q": torch.tensor([0, 9])}, r"cu_seqlens_q: expected contiguous int32 \[2\], got torch.int64"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, r"cu_seqlens_k: expected contiguous int32 \[2\]"),
        ({"seqused_k": torch.zeros(2, dtype=torch.int32)}, r"seqused_k: expected contiguous int32 \[1\]"),
        ({"window": 0}, "window: expected a value >= 1, got 0"),
        ({name: torch.empty(0, 1 << 16, 64) for name in "qkv"}, "q: expected queries of fewer than 4194304 numbers"),
        (
            {name: torch.empty(1 << 31, 1, 32, device="meta") for name in "qkv"},
            "q, k: expected a length of at most 2147483392",
        ),
        ({"k": torch.zeros(8, 1, 32), "v": torch.zeros(8, 1, 32)}, "k: expected the length 9 of q, got 8"),
        ({"cu_seqlens_q": None, "num_documents": 2}, "num_documents: expected a divisor of the length 9 of q, got 2"),
        ({"cu_seqlens_q": None, "num_documents": 0}, "num_documents: expected a divisor of the length 9 of q, got 0"),
        (
            {"cu_seqlens_q": None, "cu_seqlens_k": offsets_of([9])},
            "cu_seqlens_k: expected None without cu_seqlens_q, got a tensor",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    from blt_kernels.triton.block_causal_attention.forward import block_causal_attention_fwd_cuda

    arguments = {name: torch.zeros(9, 1, 32) for name in "qkv"} | {
        "cu_seqlens_q": offsets_of([9]),
        "cu_seqlens_k": None,
        "window": None,
        "causal": True,
        "scale": None,
        "seqused_k": None,
        "ranges": None,
        "num_documents": 1,
    }
    with pytest.raises(ValueError, match=message):
        block_causal_attention_fwd_cuda(*{**arguments, **change}.values())


@pytest.mark.parametrize("number", [0, 4, 5])
def test_wrong_shapes_of_backward_are_named(number: int) -> None:
    from blt_kernels.triton.block_causal_attention.backward import block_causal_attention_bwd_cuda

    tensors = [*[torch.zeros(9, 2, 32)] * 5, torch.zeros(9, 2)]  # grad_out, q, k, v, out, lse
    tensors[number] = tensors[number][:8]
    name = ("grad_out", "", "", "", "out", "lse")[number]
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[9, 2.*\], as q has, got \[8, 2"):
        block_causal_attention_bwd_cuda(*tensors, offsets_of([9]), None, None, True, None, None)
