"""Compile forward and dk/dv of block_causal_attention with tensor descriptors and warp specialization, without a GPU.

``python tests/attention_variants.py`` prints a table for Hopper: what ptxas and the static model of `cuda_model` make
of each variant, and of other tiles for dk/dv. Another Triton is tried by PYTHONPATH, as in `tests/kernels/test_aot.py`.

The variants take packed documents without a cache, whose rows attend to one run of the other side; they have neither
the exact pass of forward nor padded heads. Rows behind a run read as 0 through a descriptor that is made on the device,
since its shape ends there. One that is made on the host cannot know that end: that variant is wrong where such rows
hold infinities or NaN, and shows only how fast a right one could be.

Triton specializes warps on Hopper only in this form: a program has 4 warps and one loop with products, no ``while``
around the loop and no ``if`` inside, all operands come from descriptors, and masks do not depend on loads of 128
elements or more. So the ends of runs are scalars, and the loop carries the ranges of its rows and moves them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from cuda_model import attention, gpus
from cuda_model.attention_cases import CASES, HEADS
from cuda_model.sass import functions_of, parse_function
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton_compile import compiled

from blt_kernels.triton.block_causal_attention.backward import load_copies, weights
from blt_kernels.triton.block_causal_attention.launch import Launch, launch_options
from blt_kernels.triton.block_causal_attention.tiles import tile_at

LOADS = ("pointers", "device descriptors", "host descriptors")
IN_TURN = 0.5  # this share of the shorter of products and the rest is hidden, as by programs on one multiprocessor
SHAPES = (  # two warpgroups have 128 rows of dk/dv at width 128, one has 64
    Launch(64, 128, 8, 2), Launch(32, 128, 8, 3), Launch(128, 128, 8, 2), Launch(64, 64, 8, 3), Launch(128, 64, 8, 2),
    Launch(64, 64, 4, 2), Launch(32, 64, 4, 3),
)  # fmt: skip


@triton.jit
def load_tile(x, head, start, end, stride, local, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr):
    """Return rows of a head from `start` on, ``[N, HEAD_DIM]``; through pointers the last one again behind `end`."""
    if LOAD == 0:
        return tl.load(tile_at(x, start, stride, tl.minimum(local, end - 1 - start), HEAD_DIM))
    elif LOAD == 1:
        return x.load([start, 0])
    else:
        return x.load([start, head, 0]).reshape(local.shape[0], HEAD_DIM)


@triton.jit
def load_run(first, last, used, start, rows, BLOCK: tl.constexpr):
    """Return the run of a block of rows, and the interval that all of them attend to: neither end ever falls."""
    final = tl.minimum(start + BLOCK, rows) - 1
    return (
        tl.load(first + start), tl.minimum(tl.load(last + final), tl.load(used)),
        tl.load(first + final), tl.load(last + start),
    )  # fmt: skip


@triton.jit
def attend(
    acc, m_i, l_i, q_rows, k, v, kv_head, stride_kt, stride_vt, scale, low, high, begin, end, all_first, all_last,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Add the keys ``[begin, end)``; a query attends to those from `low` to `high`, counted from `begin`."""
    offs = tl.arange(0, BLOCK_N)
    for offset in tl.range(0, end - begin, BLOCK_N, warp_specialize=SPECIALIZE):
        at = begin + offset
        k_rows = load_tile(k, kv_head, at, end, stride_kt, offs, HEAD_DIM, LOAD)
        v_rows = load_tile(v, kv_head, at, end, stride_vt, offs, HEAD_DIM, LOAD)
        score = tl.dot(q_rows, k_rows.T)
        if SPECIALIZE:
            score = tl.where((offs[None, :] >= low[:, None]) & (offs[None, :] < high[:, None]), score, -float("inf"))
            low -= BLOCK_N
            high -= BLOCK_N
        elif (at < all_first) | (at + BLOCK_N > all_last):
            count = tl.maximum(high - low, 0).to(tl.uint32)
            near = low - offset
            score = tl.where((offs[None, :] - near[:, None]).to(tl.uint32) < count[:, None], score, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(score, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(score * scale - (base * scale)[:, None])
        decay = tl.exp2((m_i - base) * scale)
        l_i = l_i * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * decay[:, None])
        m_i = m_new
    return acc, m_i, l_i


@triton.jit(do_not_specialize=["queries", "heads", "heads_per_kv_head"])
def fwd_variant(
    q, k, v, out, lse, first, last, used, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    scale, natural_scale, queries, heads, heads_per_kv_head,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of BLOCK_M queries of one head."""
    head = tl.program_id(1)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    begin, end, all_first, all_last = load_run(first, last, used, start, queries, BLOCK_M)
    low = tl.load(first + row, mask=row < queries, other=0) - begin
    high = tl.load(last + row, mask=row < queries, other=0) - begin
    attends = low < high
    q += head.to(tl.int64) * stride_qh
    if SPECIALIZE:
        q_rows = tl.make_tensor_descriptor(q, [queries, HEAD_DIM], [stride_qt, 1], [BLOCK_M, HEAD_DIM]).load([start, 0])
    else:
        at_q = tile_at(q, start, stride_qt, tl.arange(0, BLOCK_M), HEAD_DIM)
        q_rows = tl.load(at_q, mask=(row < queries)[:, None], other=0.0)
    kv_head = head // heads_per_kv_head
    if LOAD != 2:
        k += kv_head.to(tl.int64) * stride_kh
        v += kv_head.to(tl.int64) * stride_vh
    if LOAD == 1:
        k = tl.make_tensor_descriptor(k, [end, HEAD_DIM], [stride_kt, 1], [BLOCK_N, HEAD_DIM])
        v = tl.make_tensor_descriptor(v, [end, HEAD_DIM], [stride_vt, 1], [BLOCK_N, HEAD_DIM])
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    if SPECIALIZE:
        acc, m_i, l_i = attend(
            acc, m_i, l_i, q_rows, k, v, kv_head, stride_kt, stride_vt, scale, low, high,
            begin, end, all_first, all_last, BLOCK_N, HEAD_DIM, LOAD, SPECIALIZE,
        )  # fmt: skip
    else:
        while begin < end:
            acc, m_i, l_i = attend(
                acc, m_i, l_i, q_rows, k, v, kv_head, stride_kt, stride_vt, scale, low, high,
                begin, end, all_first, all_last, BLOCK_N, HEAD_DIM, LOAD, SPECIALIZE,
            )  # fmt: skip
            begin = end
    acc = tl.where(attends[:, None], acc / tl.where(l_i == 0, 1.0, l_i)[:, None], 0.0)
    at_row = row.to(tl.int64) * heads + head
    at_out = out + at_row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=(row < queries)[:, None])
    lse_rows = tl.where(attends, m_i * natural_scale + tl.log(l_i), -float("inf"))
    tl.store(lse + at_row, lse_rows, mask=row < queries)


@triton.jit
def add_gradients(
    dk, dv, k_rows, v_rows, q, grad_out, lse, delta, head, stride_qt, stride_gt, factor, low, high,
    begin, end, all_first, all_last,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Add the queries ``[begin, end)``; those from `low` to `high`, counted from `begin`, attend to a key."""
    offs = tl.arange(0, BLOCK_M)
    COPIES: tl.constexpr = 1 if SPECIALIZE else max(256 // BLOCK_M, 1)  # a specialized loop loads no 128 elements
    for offset in tl.range(0, end - begin, BLOCK_M, warp_specialize=SPECIALIZE):
        at = begin + offset
        local_query = tl.minimum(offs, end - 1 - at)
        q_rows = load_tile(q, head, at, end, stride_qt, offs, HEAD_DIM, LOAD)
        grad = load_tile(grad_out, head, at, end, stride_gt, offs, HEAD_DIM, LOAD)
        score = tl.dot(k_rows, q_rows.T)
        p = weights(score, factor, load_copies(lse + at + local_query, COPIES)[None, :], False)
        if SPECIALIZE:
            p = tl.where((offs[None, :] >= low[:, None]) & (offs[None, :] < high[:, None]), p, 0.0)
            low -= BLOCK_M
            high -= BLOCK_M
        elif (at < all_first) | (at + BLOCK_M > all_last):
            other = offset + offs
            p = tl.where((other[None, :] >= low[:, None]) & (other[None, :] < high[:, None]), p, 0.0)
        dp = tl.dot(v_rows, grad.T)
        ds = p * (dp - load_copies(delta + at + local_query, COPIES)[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv)
        dk = tl.dot(ds.to(q_rows.dtype), q_rows, dk)
    return dk, dv


@triton.jit(do_not_specialize=["queries", "keys", "num_kv_heads", "heads_per_kv_head"])
def bwd_dkdv_variant(
    q, k, v, grad_out, sums, first, last, used, grad_k, grad_v,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    scale, factor, queries, keys, num_kv_heads, heads_per_kv_head,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Write `grad_k` and `grad_v` of BLOCK_N keys of one head, which one query head reads."""
    head = tl.program_id(1)
    start = tl.program_id(0) * BLOCK_N
    local = tl.arange(0, BLOCK_N)
    row = start + local
    begin, end, all_first, all_last = load_run(first, last, used, start, keys, BLOCK_N)
    low = tl.load(first + row, mask=row < keys, other=0) - begin
    high = tl.load(last + row, mask=row < keys, other=0) - begin
    k += head.to(tl.int64) * stride_kh
    v += head.to(tl.int64) * stride_vh
    if SPECIALIZE:
        k_rows = tl.make_tensor_descriptor(k, [keys, HEAD_DIM], [stride_kt, 1], [BLOCK_N, HEAD_DIM]).load([start, 0])
        v_rows = tl.make_tensor_descriptor(v, [keys, HEAD_DIM], [stride_vt, 1], [BLOCK_N, HEAD_DIM]).load([start, 0])
    else:
        k_rows = tl.load(tile_at(k, start, stride_kt, local, HEAD_DIM), mask=(row < keys)[:, None], other=0.0)
        v_rows = tl.load(tile_at(v, start, stride_vt, local, HEAD_DIM), mask=(row < keys)[:, None], other=0.0)
    lse = sums + head.to(tl.int64) * queries
    delta = lse + num_kv_heads.to(tl.int64) * queries
    if LOAD != 2:
        q += head.to(tl.int64) * stride_qh
        grad_out += head.to(tl.int64) * stride_gh
    if LOAD == 1:
        q = tl.make_tensor_descriptor(q, [end, HEAD_DIM], [stride_qt, 1], [BLOCK_M, HEAD_DIM])
        grad_out = tl.make_tensor_descriptor(grad_out, [end, HEAD_DIM], [stride_gt, 1], [BLOCK_M, HEAD_DIM])
    dk = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    if SPECIALIZE:
        dk, dv = add_gradients(
            dk, dv, k_rows, v_rows, q, grad_out, lse, delta, head, stride_qt, stride_gt, factor, low, high,
            begin, end, all_first, all_last, BLOCK_M, HEAD_DIM, LOAD, SPECIALIZE,
        )  # fmt: skip
    else:
        while begin < end:
            dk, dv = add_gradients(
                dk, dv, k_rows, v_rows, q, grad_out, lse, delta, head, stride_qt, stride_gt, factor, low, high,
                begin, end, all_first, all_last, BLOCK_M, HEAD_DIM, LOAD, SPECIALIZE,
            )  # fmt: skip
            begin = end
    at_row = (row.to(tl.int64) * num_kv_heads + head)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(grad_v + at_row, dv.to(grad_v.dtype.element_ty), mask=(row < keys)[:, None])
    tl.store(grad_k + at_row, (dk * scale).to(grad_k.dtype.element_ty), mask=(row < keys)[:, None])


def launch_of(kernel: Any, rows: int, step: int, warps: int, stages: int) -> Launch:
    """Return the launch of a variant that owns `rows`, which are keys in dk/dv, and streams `step` others."""
    return Launch(rows, step, warps, stages) if kernel is fwd_variant else Launch(step, rows, warps, stages)


def sizes_of(kernel: Any, launch: Launch) -> tuple[int, int]:
    """Return how many queries a program owns and how many keys it streams, in dk/dv the reverse."""
    return (launch.block_m, launch.block_n) if kernel is fwd_variant else (launch.block_n, launch.block_m)


def compile_variant(kernel: Any, width: int, launch: Launch, load: int, specialize: bool, arch: int) -> Any:
    """Compile a variant in bf16."""
    constants = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "HEAD_DIM": width}
    constants |= {"LOAD": load, "SPECIALIZE": specialize}
    streamed = ("k", "v") if kernel is fwd_variant else ("q", "grad_out")
    signature, aligned = {}, {}
    for index, name in enumerate(p.name for p in kernel.params):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("first", "last", "used"):
            signature[name] = "*i32"
        elif name in ("lse", "sums"):
            signature[name] = "*fp32"
        elif name in ("q", "k", "v", "out") or name.startswith("grad_"):
            described = load == 2 and name in streamed
            signature[name] = f"tensordesc<bf16[{sizes_of(kernel, launch)[1]}, 1, {width}]>" if described else "*bf16"
        else:
            signature[name] = "fp32" if name.endswith(("scale", "factor")) else "i32"
        if signature[name][0] == "*" or name.startswith("stride"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    )


def describe(name: str, width: int, launch: Launch, binary: Any) -> list[str]:
    """Return the columns of a binary for sm_90a: what it takes, its main loop, microseconds on an H100."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(binary.asm["cubin"])
        ptx.write_text(binary.asm["ptx"])
        assemble = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", ptx, "-o", Path(folder) / "again.cubin"]
        usage, sass, said = (
            subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
            for command in (
                [tools / "cuobjdump", "-res-usage", cubin],
                [tools / "cuobjdump", "-sass", cubin],
                assemble,
            )
        )
    (code,) = functions_of(sass).values()
    instructions = parse_function(code)
    registers, stack = (int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    threads = int(re.findall(r"\.reqntid (\d+)", binary.asm["ptx"])[0])
    warps = launch.num_warps if threads == launch.num_warps * 32 else threads // 32 - 4  # the producer has four more
    kernel = attention.TritonKernel(
        name, instructions, min(registers * threads // (warps * 32), 255), binary.metadata.shared, warps,
        launch.block_m, launch.block_n, launch.num_stages,
    )  # fmt: skip
    loop = attention.main_loops(kernel)[0]
    body = attention.Body.of([instructions[n] for n in sorted(attention.unconditional(instructions, loop))])
    opcodes = Counter(i.opcode for i in instructions)
    _, documents, _, kv_heads, _ = next(case for case in CASES if case[2] == width)
    times = []
    for hidden in (attention.OVERLAP["warpgroups"], IN_TURN):
        with mock.patch.dict(attention.OVERLAP, warpgroups=hidden):
            found = attention.estimate(kernel, documents, HEADS, kv_heads, width, gpus.GPUS[0])
            times.append(f"{found['seconds'] * 1e6:.0f}")
    return [
        f"{threads}", f"{registers}", f"{stack}", f"{binary.metadata.shared >> 10}",
        " ".join(dict.fromkeys(re.findall(r"\((C75\d\d)\)", said))), f"{sum(body.issued.values())}", f"{body.waits}",
        f"{opcodes['LDGSTS']} / {opcodes['UTMALDG']} / {opcodes['USETMAXREG']}", *times,
    ]  # fmt: skip


def row(label: str, name: str, width: int, launch: Launch, load: int | None = None, specialize: bool = False) -> None:
    """Print a row of the table, of the kernel as it is or of a variant, or that the compiler fails."""
    owned, streamed = sizes_of(VARIANTS[name], launch)
    sizes = f"{owned}x{streamed}, {launch.num_warps}, {launch.num_stages}"
    try:
        binary = (
            compiled(name, width, torch.bfloat16, launch, (9, 0))
            if load is None
            else compile_variant(VARIANTS[name], width, launch, load, specialize, 90)
        )
        columns = describe(name, width, launch, binary)
    except Exception as error:  # MLIR or ptxas fails, or the kernel does not fit on a multiprocessor
        columns = [f"{type(error).__name__}: {error}".splitlines()[0]]
    print(f"| {' | '.join([f'{name} {width}', label, sizes, *columns])} |", flush=True)


def specialized(kernel: Any, load: int, arch: int) -> str:
    """Return whether the compiler of an architecture specializes the warps of a variant."""
    try:
        binary = compile_variant(kernel, 64, launch_of(kernel, 128, 64, 4, 2), load, True, arch)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "yes" if "ttg.warp_specialize(" in binary.asm["ttgir"] else "no"


VARIANTS = {"fwd": fwd_variant, "bwd_dkdv": bwd_dkdv_variant}


def main() -> None:
    """Print the table for Hopper, then which kinds of loads let warps be specialized on Hopper and Blackwell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=tuple(VARIANTS), action="append", help="both unless given")
    options = parser.parse_args()
    print(f"Triton {triton.__version__}\n")
    print(
        "| kernel | variant | tiles, warps, stages | threads | registers | stack | KB | ptxas | instructions | waits "
        "| LDGSTS / UTMALDG / USETMAXREG | us | us in turn |"
    )
    print(f"|{'---|' * 13}")
    for name in options.kernel or VARIANTS:
        for width in (128, 64):
            own = launch_options(name, width, torch.bfloat16, (9, 0))
            row("as it is", name, width, own)
            for load, label in enumerate(LOADS):
                row(label, name, width, own, load)
            _, streamed = sizes_of(VARIANTS[name], own)
            for step in (streamed, streamed // 2)[: width // 64]:
                launch = launch_of(VARIANTS[name], 128, step, 4, 2)  # a consumer has 64 rows
                row("specialized", name, width, launch, 1, True)
        for launch in SHAPES if name == "bwd_dkdv" else ():
            row("as it is", name, 128, launch)
        print()
        for arch in (90, 100):
            for load, label in enumerate(LOADS):
                print(f"{name}, sm_{arch}, {label}: specialized: {specialized(VARIANTS[name], load, arch)}", flush=True)
        print()


if __name__ == "__main__":
    main()
