"""The launch search: at most 12 candidates for each of the kernels of block_causal_attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import search_attention
import torch
from timing import OURS, Row, failed_row

from gpu_stages import Case
from gpu_stages.target import Target

SECONDS_PER_KERNEL = 11.0


def search_cases(target: Target) -> list[Case]:
    cases = [Case(f"search {kernel}", partial(search, kernel=kernel)) for kernel in search_attention.KERNELS]
    return [case for case in cases if target.wants(case.name)]


def search(target: Target, kernel: str) -> Iterator[Row]:
    """Yield a row for each candidate; the launch of the table comes first."""
    if target.rehearsal:  # nothing is launched where no GPU is
        for launch in search_attention.candidates(kernel, 128, torch.bfloat16):
            yield failed_row(f"search {kernel}", str(launch), "bfloat16", OURS, "ok: not timed in a rehearsal")
        return
    for found in search_attention.search(target, kernel, SECONDS_PER_KERNEL):
        launch = "block_m {block_m} block_n {block_n} warps {num_warps} stages {num_stages}".format(**found)
        shape = f"{launch}, width {found['width']}, window {found['window']}"
        name, dtype = f"search {kernel}", str(found["dtype"]).removeprefix("torch.")
        if found["milliseconds"] is None:
            yield failed_row(name, shape, dtype, OURS, found["error"] or "no time")
        else:
            status = "ok, in the table" if found["in_table"] else "ok"
            nan = float("nan")
            yield Row(name, shape, dtype, 1, OURS, found["milliseconds"], None, nan, nan, None, None, 1, status)
