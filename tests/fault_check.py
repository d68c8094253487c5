"""Plants faults, one at a time, in a copy of the repository, and writes which check finds each of them.

    python tests/fault_check.py                      # all: half an hour of one core
    python tests/fault_check.py --only "a lane"      # those whose description contains this

The copy is build/faults; it has the launchers of `LAUNCHERS` only, so that its emulator is built in a minute. The pages
on contributing show the table, docs/contribute/faults.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "contribute" / "faults.csv"
COPY = ROOT / "build" / "faults"
LAUNCHERS = ("ema_scan", "ngram_hash_embed")  # these have kernels in the copy, the others run their references
OP = (
    "tests/ops/test_registration.py tests/ops/test_ema_scan.py tests/ops/test_meta.py tests/ops/test_ops.py"
    " -k 'ema_scan and not inductor'"
)
FILES = "tests/ops/test_registration.py -k ema_scan"
EMA, SORT, LAUNCHER = "csrc/cuda/ema_scan.cuh", "csrc/cuda/radix_sort.cuh", "csrc/cuda/ema_scan.cu"
TRITON = "blt_kernels/triton/block_causal_attention/tiles.py"
COLUMNS = ("kind", "fault", "file", "found_by", "message")
OPS, CPU = "blt_kernels/ops/ema_scan.py", "csrc/cpu/ema_scan.cpp"


@dataclass(frozen=True)
class Fault:
    """Describes one fault.

    Attributes
    ----------
    kind : the table it belongs to, "kernel" or "step"
    what : what is wrong, for the reader of the table
    file : the file that is changed
    old, new : a part of the file, and what takes its place; with no `old` the file is removed
    check : arguments of pytest, or the command of another check
    build : what has to be built, "emulator" or "module"
    """

    kind: str
    what: str
    file: str
    old: str
    new: str
    check: str = OP
    build: str = ""


FAULTS = (
    Fault("kernel", "lanes beyond the width leave before a shuffle of the whole warp", EMA,
          "  if (own.chunk >= shape.chunks) return;\n  const ChunkRows rows = chunk_rows(shape, own.chunk);\n"
          "  const u32 resets",
          "  if (own.chunk >= shape.chunks || !own.stores) return;\n"
          "  const ChunkRows rows = chunk_rows(shape, own.chunk);\n  const u32 resets", build="emulator"),
    Fault("kernel", "a lane reads the weight of one row too many", EMA,
          "const A of_lane = lane < rows.count ?", "const A of_lane = lane <= rows.count ?", build="emulator"),
    Fault("kernel", "threads count digits before all counts are cleared: no barrier", SORT,
          "    counts[threadIdx.x] = 0;\n    __syncthreads();\n", "    counts[threadIdx.x] = 0;\n",
          "tests/ops/test_ngram_hash_embed.py -k emulated", build="emulator"),
    Fault("kernel", "the launcher zeroes a tensor that the kernel writes whole", LAUNCHER,
          "  dispatch_device_float(rows.scalar_type(), \"x\", [&]<class T>(Tag<T>) {\n    using A = acc_t<T>;\n"
          "    const T *const grad",
          "  device.zero(grad_x);\n"
          "  dispatch_device_float(rows.scalar_type(), \"x\", [&]<class T>(Tag<T>) {\n    using A = acc_t<T>;\n"
          "    const T *const grad", build="emulator"),
    Fault("kernel", "sums are rounded to bf16 at every row", EMA,
          "sums[c] = weight * values[c] + (begins ? A(0) : (1 - weight) * sums[c]);",
          "sums[c] = to_float(from_float<T>(weight * values[c] + (begins ? A(0) : (1 - weight) * sums[c])));",
          build="emulator"),
    Fault("kernel", "a gradient is summed by floating-point atomics", EMA,
          "tensors.grad_p[static_cast<i64>(own.panel) * shape.documents.bytes + rows.begin + lane] = dot_of_lane;",
          "atomicAdd(&tensors.grad_p[rows.begin + lane], dot_of_lane);", build="emulator"),
    Fault("kernel", "an address is computed in 32 bits", EMA,
          "stream_rows<T, kVec, kEmaPrefetch>(x + static_cast<i64>(rows.begin) * stride + own.column, stride,",
          "stream_rows<T, kVec, kEmaPrefetch>(x + rows.begin * stride + own.column, stride,", build="emulator"),
    Fault("kernel", "an array of registers is indexed at run time", EMA,
          "if (lane == i) dot_of_lane = dot;", "if (lane == i) dot_of_lane = dot + g[i % kVec] - g[i % kVec];",
          "cuda_check.py ema_scan"),
    Fault("kernel", "rows are loaded number by number", "csrc/cuda/segment_fold.cuh",
          "  return bits_as<Operands<T, kVec>>(load_bits<kVec>(from));",
          "  AlignedVector<T, kVec> row;\n#pragma unroll\n"
          "  for (int c = 0; c < kVec; ++c) row[c] = *const_cast<const volatile T*>(from + c);\n"
          "  return bits_as<Operands<T, kVec>>(row);", "cuda_check.py ema_scan"),
    Fault("kernel", "one row is requested at a time instead of eight", EMA,
          "kEmaPrefetch = 8;", "kEmaPrefetch = 1;", "cuda_check.py ema_scan"),
    Fault("kernel", "the public function reads a value on the host", OPS,
          "    weights = p.to(accumulator(x))", "    weights = p.to(accumulator(x)).clamp(0, p.max().item())",
          "tests/kernels/test_capture.py -k ema_scan"),
    Fault("kernel", "a Triton kernel attends to one key too many", TRITON,
          ".to(tl.uint32) < count[:, None]", ".to(tl.uint32) <= count[:, None]",
          "tests/kernels/test_triton_attention.py"),
    Fault("kernel", "a Triton kernel loads columns beyond the width of a head", TRITON,
          "return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)",
          "return tl.load(pointers)", "tests/kernels/test_triton_attention.py"),
    Fault("step", "the op is not exported from the package", "blt_kernels/__init__.py",
          "from blt_kernels.ops.ema_scan import ema_scan as ema_scan\n", ""),
    Fault("step", "the reference takes its arguments in another order", "blt_kernels/reference/ema_scan.py",
          "def ema_scan_fwd_reference(x: Tensor, p: Tensor,", "def ema_scan_fwd_reference(p: Tensor, x: Tensor,"),
    Fault("step", "the fake allocates another dtype than the kernel", OPS,
          "lambda x, *_: x.new_empty(x.shape),", "lambda x, *_: x.new_empty(x.shape).float(),"),
    Fault("step", "the fake keeps strides that the kernel does not", OPS,
          "lambda x, *_: x.new_empty(x.shape),", "lambda x, *_: x.new_empty(x.shape[::-1]).t(),"),
    Fault("step", "the forward has no gradient", OPS,
          '_autograd.register_autograd("ema_scan_fwd", _backward, setup_context=_save)\n', ""),
    Fault("step", "the backward has no gradient", OPS,
          '_autograd.register_autograd("ema_scan_bwd", _second_backward, setup_context=_save_gradients)\n', ""),
    Fault("step", "the public function does not check a shape", OPS,
          '    _checks.check_shape("p", p, x.shape[:-1], "[T] of x" if x.dim() == 2 else "[B, S] of x")\n', ""),
    Fault("step", "the public function does not check a dtype", OPS,
          '    _checks.check_like("p", p, (1, 2), "x", x, dtype=False)\n', ""),
    Fault("step", "the docstring lacks a section", OPS, "    Raises\n    ------\n", "", FILES),
    Fault("step", "the operators do not check a shape", "csrc/common/args/ema_scan.h",
          '  check_shape(p, "p", {rows.size(0)});\n', "", build="emulator"),
    Fault("step", "the schema has an argument that the CPU kernel does not take", OPS,
          "SymInt num_documents) -> Tensor y", "SymInt num_documents, bool reverse=False) -> Tensor y"),
    Fault("step", "the CPU kernel of the backward is not registered", CPU,
          '  m.impl("ema_scan_bwd", BLT_KERNELS_BOX(&ema_scan_bwd_cpu));\n', "", build="module"),
    Fault("step", "the CUDA kernel of the backward is not registered", LAUNCHER,
          '  m.impl("ema_scan_bwd", BLT_KERNELS_BOX(&ema_scan_bwd_cuda));\n', "", build="emulator"),
    Fault("step", "there are no cases", "tests/cases/ema_scan.py", "", ""),
    Fault("step", "there are no tests of the op's own", "tests/ops/test_ema_scan.py", "", "", FILES),
    Fault("step", "there is no benchmark", "bench/bench_ema_scan.py", "", "", FILES),
    Fault("step", "there is no page", "docs/ops/ema_scan.md", "", "", FILES),
)  # fmt: skip


def make_copy() -> None:
    """Copy the tracked files, those of LAUNCHERS alone in csrc, and what was built."""
    tracked = subprocess.run(
        ("git", "ls-files", "--cached", "--others", "--exclude-standard"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in tracked:
        path = Path(name)
        kernels = path.parts[:2] in (("csrc", "cuda"), ("csrc", "cpu")) and path.suffix in (".cu", ".cpp")
        if not (ROOT / path).exists() or (kernels and path.stem not in LAUNCHERS and path.parts[2] != "support"):
            continue
        (COPY / path).parent.mkdir(parents=True, exist_ok=True)
        if not (COPY / path).exists() or (COPY / path).read_bytes() != (ROOT / path).read_bytes():
            shutil.copy(ROOT / path, COPY / path)
    for built in (ROOT / "blt_kernels").glob("*.so"):
        shutil.copy(built, COPY / "blt_kernels")


def run(command: list[str], built: str = "") -> tuple[int, str]:
    """Run a command in the copy; return its exit code and what it prints."""
    environment = os.environ | {"PYTHONPATH": str(COPY), "COLUMNS": "600", "OMP_NUM_THREADS": "1"}
    environment["BLT_KERNELS_EMULATOR"] = str(
        (COPY if "emulator" in built else ROOT) / "build/emulator/blt_emulator.so"
    )
    done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def build(what: str) -> str:
    """Build the emulator or the CPU module of the copy; return the error of a compiler, if there is one."""
    folder, target = f"build/{what}", {"emulator": "blt_emulator", "module": "all"}[what]
    options = ["-DBLT_KERNELS_ISAS=native", f"-DBLT_KERNELS_EMULATOR={'ON' if what == 'emulator' else 'OFF'}"]
    if not (COPY / folder / "build.ninja").exists():
        code, output = run(
            ["cmake", "-S", ".", "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *options]
        )
        assert code == 0, output
    code, output = run(["cmake", "--build", folder, "--target", target])
    if code == 0 and what == "module":
        code, output = run(["cmake", "--install", folder, "--prefix", "blt_kernels"])
    errors = re.findall(r"error: (.*)", output)
    assert code == 0 or errors, output
    return errors[0] if code else ""


def found_by(fault: Fault) -> tuple[str, str]:
    """Return the first check that fails, and its message; two empty strings if none does."""
    if fault.build:
        error = build(fault.build)
        if error:
            return "the compiler", error
    if fault.check.startswith("cuda_check.py"):
        code, output = run([sys.executable, *shlex.split(f"tests/{fault.check} --archs 90a")])
        faults = re.findall(r"sm_90a: (.*?)\s*$|^((?:slower|more): .* all: .*)$", output, re.M)
        assert not code or faults, output
        return ("make cuda-check", next(filter(None, faults[-1]))) if code else ("", "")
    code, output = run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", *shlex.split(fault.check)], fault.build
    )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*?\])?(?: - (.*))?$", output, re.M)
    if code and not failed:  # the package cannot be imported
        error = re.search(r"^E +blt_kernels\.\S*?(\w+Error: .*)$", output, re.M)
        assert error, output
        return "import blt_kernels", error[1].replace(f"{COPY}/", "")
    return (failed[1], failed[2] or "") if failed else ("", "")


def check(fault: Fault) -> tuple[str, str]:
    """Plant a fault, ask the check, and take the fault back."""
    path = COPY / fault.file
    before = path.read_text()
    try:
        if fault.old:
            assert before.count(fault.old) == 1, f"{fault.file}: {before.count(fault.old)} times {fault.old!r}"
            path.write_text(before.replace(fault.old, fault.new))
        else:
            path.unlink()
        return found_by(fault)
    finally:
        path.write_text(before)
        if fault.build == "module":
            make_copy()


def main() -> None:
    """Check the faults, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of a description")
    parser.add_argument("--kind", choices=("kernel", "step"), help="both if it is not given")
    arguments = parser.parse_args()
    make_copy()
    for fault in FAULTS:
        if arguments.only not in fault.what or arguments.kind not in (None, fault.kind):
            continue
        test, message = check(fault)
        print(f"{fault.what}\n    {test or 'NO CHECK'}: {message}", flush=True)
        rows = {row["fault"]: row for row in read()} | {
            fault.what: dict(zip(COLUMNS, (fault.kind, fault.what, fault.file, test, message), strict=True))
        }
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[f.what] for f in FAULTS if f.what in rows)


def read() -> list[dict[str, str]]:
    """Return the rows of the table."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
