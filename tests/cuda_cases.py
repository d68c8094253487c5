"""Run every case of `cases` once on a GPU, forward and backward: for compute-sanitizer, and to compare two builds.

``python tests/cuda_cases.py [FILE] [--bytes N ...]`` prints each case before it runs, and writes all results to FILE.
"""

from __future__ import annotations

import argparse

import torch
from cases import CASES
from op_calls import make, run, tensors_of

from blt_kernels import _extension


def main() -> None:
    """Run the cases on bytes enough for several blocks, and on none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--bytes", type=int, nargs="+", default=[0, 300])
    arguments = parser.parse_args()
    results = {}
    for case in CASES:
        for dtype in set(case.dtypes) - {torch.float64, torch.float16}:  # these two run the same code as the others
            for num_bytes in arguments.bytes:
                print(f"case {case.name} {dtype} {num_bytes}", flush=True)
                out, grads = run(case, case.function, make(case, "cuda", num_bytes, 21, dtype))
                results[f"{case.name} {dtype} {num_bytes}"] = [x.cpu() for x in (*tensors_of(out), *grads)]
    torch.cuda.synchronize()
    if arguments.file:
        torch.save(results, arguments.file)
    print(f"{len(results)} runs by {_extension.load_cuda().compiler}")


if __name__ == "__main__":
    main()
