"""How the kernels of block_causal_attention are launched: sizes of tiles, warps and stages, from tables.

`bench/search_attention.py` searches this space on a GPU and prints tables in this form. Nothing is tuned at run time,
so a step never waits for a search, and results do not depend on what else ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

KERNELS = ("fwd", "bwd_dkdv", "bwd_dq", "decode")
WIDTHS = (32, 64, 128, 256)
"""Head widths that kernels are made for. Those between are padded to the next, in registers only."""
SHORT_WINDOW = 1024
"""Windows up to this get smaller tiles, where the edges of a window are most of what a tile of queries meets."""


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched.

    Attributes
    ----------
    rows
        Rows that a program owns: queries, or keys in ``bwd_dkdv``.
    step
        Rows of the other side that it takes at a time.
    warps, stages
        Warps of a program, and tiles in flight.
    """

    rows: int
    step: int
    warps: int
    stages: int


_Table = dict[tuple[str, int], tuple[Launch, ...]]  # (kernel, size of an element): one for each of WIDTHS

# Ampere and whatever is not named below. All of them fit into the 99 KB of shared memory that a consumer GPU has.
_AMPERE: _Table = {
    ("fwd", 2): (Launch(128, 64, 4, 3), Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 32, 8, 2)),
    ("bwd_dkdv", 2): (Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(64, 64, 8, 2), Launch(32, 32, 8, 1)),
    ("bwd_dq", 2): (Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 32, 8, 2)),
    ("decode", 2): (Launch(16, 64, 4, 3), Launch(16, 64, 4, 3), Launch(16, 64, 4, 2), Launch(16, 32, 4, 2)),
    ("fwd", 4): (Launch(64, 32, 8, 2), Launch(32, 32, 4, 2), Launch(32, 16, 4, 2), Launch(16, 16, 4, 1)),
    ("bwd_dkdv", 4): (Launch(32, 16, 4, 2), Launch(32, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 8, 1)),
    ("bwd_dq", 4): (Launch(32, 32, 4, 2), Launch(32, 16, 4, 2), Launch(32, 16, 8, 1), Launch(16, 16, 8, 1)),
    ("decode", 4): (Launch(16, 64, 4, 2), Launch(16, 32, 4, 2), Launch(16, 16, 4, 2), Launch(16, 16, 4, 1)),
}
# With two stages Triton waits for the copies that it has just started, so there are three wherever these fit.
_HOPPER: _Table = _AMPERE | {
    ("fwd", 2): (Launch(128, 128, 8, 3), Launch(128, 128, 8, 3), Launch(128, 128, 8, 3), Launch(64, 32, 8, 3)),
    ("bwd_dkdv", 2): (Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(32, 32, 8, 2)),
    ("bwd_dq", 2): (Launch(128, 64, 4, 2), Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(64, 32, 8, 3)),
}
_BLACKWELL: _Table = _AMPERE | {
    ("fwd", 2): (Launch(128, 128, 8, 2), Launch(128, 128, 8, 2), Launch(128, 64, 8, 3), Launch(64, 64, 8, 2)),
    ("bwd_dkdv", 2): (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 64, 8, 2), Launch(32, 32, 8, 2)),
    ("bwd_dq", 2): (Launch(128, 64, 4, 2), Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 64, 8, 1)),
}
_TABLES = {9: _HOPPER, 10: _BLACKWELL}  # by the major number of the compute capability
_SHORT = {  # what short windows change, by (kernel, size of an element, width, major number)
    ("fwd", 2, 32, 9): Launch(128, 64, 4, 3),
    ("fwd", 2, 64, 9): Launch(128, 64, 4, 3),
}
_PADDED = {  # the same for head widths that are padded: masks take registers
    ("fwd", 2, 128, 9): Launch(128, 64, 8, 3),
    ("bwd_dkdv", 2, 128, 9): Launch(128, 32, 8, 2),
}

_SPLIT_KEYS = 256  # fewest keys that are worth a program of their own
MAX_SPLITS = 64


def architecture(x: torch.Tensor) -> tuple[int, int]:
    """Return the compute capability of the GPU of `x`; that of Hopper on the CPU, where the interpreter runs."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def padded_width(head_width: int) -> int:
    """Return the width that a kernel is made for; raise ValueError beyond 256."""
    for width in WIDTHS:
        if head_width <= width:
            return width
    raise ValueError(f"head_width: expected at most {WIDTHS[-1]}, got {head_width}")


def launch_options(
    kernel: str, head_width: int, dtype: torch.dtype, window: int | None, arch: tuple[int, int]
) -> Launch:
    """Return how to launch a kernel.

    Parameters
    ----------
    kernel
        One of `KERNELS`.
    head_width
        E, 1 to 256.
    dtype
        fp32, bf16 or fp16.
    window
        Keys that a query sees, or None.
    arch
        Compute capability, as ``torch.cuda.get_device_capability()`` returns it.

    Examples
    --------
    >>> launch_options("fwd", 96, torch.bfloat16, None, (9, 0))
    Launch(rows=128, step=64, warps=8, stages=3)
    """
    width = padded_width(head_width)
    index = WIDTHS.index(width)
    launch = _TABLES.get(arch[0], _AMPERE)[kernel, dtype.itemsize][index]
    key = kernel, dtype.itemsize, width, arch[0]
    if head_width < width and key in _PADDED:
        return _PADDED[key]
    return _SHORT.get(key, launch) if window is not None and window <= SHORT_WINDOW else launch


def configurations(arch: tuple[int, int]) -> Iterator[tuple[str, int, torch.dtype, Launch]]:
    """Yield every (kernel, padded width, dtype, launch) that `launch_options` can return; fp16 is launched as bf16."""
    for kernel in KERNELS:
        for width in WIDTHS:
            for dtype in (torch.bfloat16, torch.float32):
                cases = ((n, window) for n in (width, width - 1) for window in (None, SHORT_WINDOW))
                seen = dict.fromkeys(launch_options(kernel, n, dtype, window, arch) for n, window in cases)
                for launch in seen:
                    yield kernel, width, dtype, launch


def decode_splits(queries: int, groups: int, keys: int, documents: int, processors: int) -> int:
    """Return into how many parts the keys of a query are split, so that all of the GPU has work.

    `keys` is the room of all caches: how much of it is used only the device knows, and the parts share that equally.
    """
    programs = max(queries * groups, 1)
    longest = max(keys // max(documents, 1) // _SPLIT_KEYS, 1)
    return max(1, min(2 * processors // programs, longest, MAX_SPLITS))


def tiles_visited(first: torch.Tensor, last: torch.Tensor, rows: int, step: int) -> tuple[int, int]:
    """Count the tiles that a kernel takes for one head, and the fewest that could hold what is seen.

    Parameters
    ----------
    first, last : int ``[T]``
        Every row sees ``[first, last)`` of the other side.
    rows, step
        Of a launch.

    Returns
    -------
    visited, fewest
        `fewest` is the number of tiles that what a block of rows sees would fill if it lay side by side.
    """
    visited = fewest = 0
    for block in range(0, first.shape[0], rows):
        runs: list[list[int]] = []
        for begin, end in zip(first[block : block + rows].tolist(), last[block : block + rows].tolist(), strict=True):
            if begin >= end:
                continue
            if runs and begin <= runs[-1][1]:
                runs[-1][1] = max(end, runs[-1][1])
            else:
                runs.append([begin, end])
        visited += sum(-(-(end - begin) // step) for begin, end in runs)
        fewest += -(-sum(end - begin for begin, end in runs) // step)
    return visited, fewest
