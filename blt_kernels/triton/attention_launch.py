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

# No row has been measured: all are starting points, chosen by registers, shared memory and instruction counts of the
# compiled kernels. `bench/search_attention.py` searches; a row that it has confirmed says 'measured' and on what.
_CONSERVATIVE: _Table = {  # every GPU that is not named below: fits into the 99 KB of shared memory of a consumer GPU
    # starting points
    ("fwd", 2): (Launch(128, 64, 4, 3), Launch(128, 64, 8, 3), Launch(128, 32, 8, 2), Launch(64, 32, 8, 2)),
    ("bwd_dkdv", 2): (Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(64, 64, 8, 2), Launch(32, 32, 8, 1)),
    ("bwd_dq", 2): (Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 16, 8, 2)),
    ("decode", 2): (Launch(32, 64, 4, 3), Launch(32, 64, 4, 3), Launch(32, 64, 4, 2), Launch(32, 32, 4, 2)),
    ("fwd", 4): (Launch(64, 32, 8, 2), Launch(32, 32, 4, 2), Launch(32, 16, 8, 2), Launch(32, 16, 8, 1)),
    ("bwd_dkdv", 4): (Launch(32, 16, 4, 2), Launch(32, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 8, 1)),
    ("bwd_dq", 4): (Launch(32, 32, 4, 2), Launch(32, 16, 4, 2), Launch(32, 16, 8, 2), Launch(16, 16, 8, 1)),
    ("decode", 4): (Launch(16, 64, 4, 2), Launch(16, 32, 4, 2), Launch(16, 16, 4, 2), Launch(16, 16, 4, 1)),
}
# With two stages Triton waits for the copies that it has just started, so there are three wherever these fit.
_HOPPER: _Table = _CONSERVATIVE | {
    # starting points
    ("fwd", 2): (Launch(128, 128, 8, 3), Launch(128, 64, 4, 3), Launch(128, 128, 8, 3), Launch(64, 32, 8, 3)),
    ("bwd_dkdv", 2): (Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(32, 32, 8, 2)),
    ("bwd_dq", 2): (Launch(128, 64, 4, 2), Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(64, 64, 8, 2)),
    ("decode", 2): (Launch(32, 64, 4, 3), Launch(32, 64, 4, 3), Launch(32, 64, 4, 3), Launch(32, 32, 4, 2)),
}
_HOPPER_PADDED = {  # where masks of padded head widths take registers: starting points
    ("fwd", 2, 64): Launch(128, 128, 8, 3),
    ("fwd", 2, 128): Launch(128, 64, 8, 3),
}

_SPLIT_KEYS = 256  # fewest keys that are worth a program of their own
MAX_SPLITS = 64
_FEW = 16  # queries of a document whose keys are split, and which share them with the heads that read them
_MAX_TILES = 4


def architecture(x: torch.Tensor) -> tuple[int, int]:
    """Return the compute capability of the GPU of `x`; that of Hopper on the CPU, where the interpreter runs."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def padded_width(head_width: int) -> int:
    """Return the width that a kernel is made for; raise ValueError beyond 256."""
    for width in WIDTHS:
        if head_width <= width:
            return width
    raise ValueError(f"head_width: expected at most {WIDTHS[-1]}, got {head_width}")


def launch_options(kernel: str, head_width: int, dtype: torch.dtype, arch: tuple[int, int]) -> Launch:
    """Return how to launch a kernel.

    Parameters
    ----------
    kernel
        One of `KERNELS`.
    head_width
        E, 1 to 256.
    dtype
        fp32, bf16 or fp16.
    arch
        Compute capability, as ``torch.cuda.get_device_capability()`` returns it.

    Examples
    --------
    >>> launch_options("fwd", 96, torch.bfloat16, (9, 0))
    Launch(rows=128, step=64, warps=8, stages=3)
    """
    width = padded_width(head_width)
    hopper = arch[0] == 9
    if hopper and head_width < width and (kernel, dtype.itemsize, width) in _HOPPER_PADDED:
        return _HOPPER_PADDED[kernel, dtype.itemsize, width]
    return (_HOPPER if hopper else _CONSERVATIVE)[kernel, dtype.itemsize][WIDTHS.index(width)]


def configurations(arch: tuple[int, int]) -> Iterator[tuple[str, int, torch.dtype, Launch]]:
    """Yield every (kernel, padded width, dtype, launch) that `launch_options` can return; fp16 is launched as bf16."""
    for kernel in KERNELS:
        for width in WIDTHS:
            for dtype in (torch.bfloat16, torch.float32):
                for launch in dict.fromkeys(launch_options(kernel, n, dtype, arch) for n in (width, width - 1)):
                    yield kernel, width, dtype, launch


def decode_splits(groups: int, keys: int, documents: int, processors: int) -> int:
    """Return into how many parts the keys of a document are split, so that all of the GPU has work.

    `keys` is the room of all caches: how much of it is used only the device knows, and the parts share that equally.
    """
    programs = max(documents * groups, 1)
    longest = max(keys // max(documents, 1) // _SPLIT_KEYS, 1)
    return max(1, min(2 * processors // programs, longest, MAX_SPLITS))


def decode_few(queries: int, documents: int, splits: int) -> int:
    """Return up to how many queries a document is decoded; the forward kernel computes those with more.

    All are where there are few queries in total, so that forward need not run: 16, or two a document, unless the keys
    are split, since what parts write takes memory for that many queries of each document.
    """
    all_few = queries <= _FEW or (splits == 1 and queries <= 2 * documents)
    return queries if all_few else _FEW


def decode_tiles(queries: int, documents: int, few: int, group: int, rows: int) -> int:
    """Return how many programs share the rows of a document: its queries times the `group` heads of a key head.

    Enough for documents of average length; the programs of longer ones take several tiles of `rows`.
    """
    average = min(few, -(-queries // max(documents, 1)))
    return max(1, min(-(-average * group // rows), _MAX_TILES))


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
