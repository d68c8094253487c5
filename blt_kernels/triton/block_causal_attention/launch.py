"""Tables give the sizes of tiles, the warps and the stages that kernels of block_causal_attention are launched with.

`bench/search_attention.py` searches this space on a GPU and prints tables in this form. Nothing is tuned at run time,
so a step never waits for a search, and results do not depend on what else ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_DIMS = (32, 64, 128, 256)
"""Head widths that kernels are made for. Those between are padded to the next, in registers only."""


@dataclass(frozen=True)
class Launch:
    """The options that one kernel is launched with.

    Attributes
    ----------
    block_m, block_n
        Queries and keys of a tile. A program of ``bwd_dkdv`` owns `block_n` keys and streams queries past them; one of
        the other kernels owns `block_m` queries and streams keys.
    num_warps, num_stages
        Warps of a program, and tiles in flight.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Maps (kernel, bytes of an element) to a launch for each of HEAD_DIMS.
_Table = dict[tuple[str, int], tuple[Launch, ...]]

# No launch has been measured: all are starting points, chosen by registers, shared memory and instruction counts of the
# compiled kernels. `bench/search_attention.py` searches; a line that it has confirmed says 'measured' and on what.
_CONSERVATIVE: _Table = {  # every GPU that is not named below: fits into the 99 KB of shared memory of a consumer GPU
    # starting points
    ("fwd", 2): (Launch(128, 64, 4, 3), Launch(128, 64, 8, 3), Launch(128, 32, 8, 2), Launch(64, 32, 8, 2)),
    ("bwd_dkdv", 2): (Launch(64, 64, 4, 2), Launch(32, 64, 4, 2), Launch(64, 64, 8, 2), Launch(32, 32, 8, 1)),
    ("bwd_dq", 2): (Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 16, 8, 2)),
    ("decode", 2): (Launch(32, 64, 4, 3), Launch(32, 64, 4, 3), Launch(32, 64, 4, 2), Launch(32, 32, 4, 2)),
    ("fwd", 4): (Launch(64, 32, 8, 2), Launch(32, 32, 4, 2), Launch(32, 16, 8, 2), Launch(32, 16, 8, 1)),
    ("bwd_dkdv", 4): (Launch(16, 32, 4, 2), Launch(16, 32, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 8, 1)),
    ("bwd_dq", 4): (Launch(32, 32, 4, 2), Launch(32, 16, 4, 2), Launch(32, 16, 8, 2), Launch(16, 16, 8, 1)),
    ("decode", 4): (Launch(16, 64, 4, 2), Launch(16, 32, 4, 2), Launch(16, 16, 4, 2), Launch(16, 16, 4, 1)),
}
# With two stages Triton waits for the copies that it has just started, so there are three wherever these fit.
_HOPPER: _Table = _CONSERVATIVE | {
    # starting points
    ("fwd", 2): (Launch(128, 128, 8, 3), Launch(128, 64, 4, 3), Launch(128, 128, 8, 3), Launch(64, 32, 8, 3)),
    ("bwd_dkdv", 2): (Launch(64, 128, 8, 3), Launch(64, 128, 8, 3), Launch(64, 128, 8, 3), Launch(32, 32, 8, 2)),
    ("bwd_dq", 2): (Launch(128, 64, 4, 2), Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(64, 64, 8, 2)),
    ("decode", 2): (Launch(32, 64, 4, 3), Launch(32, 64, 4, 3), Launch(32, 64, 4, 3), Launch(32, 32, 4, 2)),
}
_HOPPER_PADDED = {  # where masks of padded head widths take registers: starting points
    ("fwd", 2, 64): Launch(128, 128, 8, 3),
    ("fwd", 2, 128): Launch(128, 64, 8, 3),
}

_MIN_SPLIT_KEYS = 256  # fewest keys that are worth a program of their own
MAX_SPLITS = 64
_DECODE_QUERIES = 16  # queries of a document whose keys are split, and which share them with the heads that read them
_MAX_TILES = 4


def architecture(x: torch.Tensor) -> tuple[int, int]:
    """Return the compute capability of the GPU of `x`; that of Hopper on the CPU, where the interpreter runs."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def padded_head_dim(head_dim: int) -> int:
    """Return the head width that a kernel is made for; raise ValueError beyond 256."""
    for padded in HEAD_DIMS:
        if head_dim <= padded:
            return padded
    raise ValueError(f"head_dim: expected at most {HEAD_DIMS[-1]}, got {head_dim}")


def launch_options(kernel: str, head_dim: int, dtype: torch.dtype, arch: tuple[int, int]) -> Launch:
    """Return how to launch a kernel.

    Parameters
    ----------
    kernel
        One of `KERNELS`.
    head_dim
        E, 1 to 256.
    dtype
        fp32, bf16 or fp16.
    arch
        Compute capability, as ``torch.cuda.get_device_capability()`` returns it.

    Examples
    --------
    >>> launch_options("fwd", 96, torch.bfloat16, (9, 0))
    Launch(block_m=128, block_n=64, num_warps=8, num_stages=3)
    """
    padded = padded_head_dim(head_dim)
    hopper = arch[0] == 9
    if hopper and head_dim < padded and (kernel, dtype.itemsize, padded) in _HOPPER_PADDED:
        return _HOPPER_PADDED[kernel, dtype.itemsize, padded]
    return (_HOPPER if hopper else _CONSERVATIVE)[kernel, dtype.itemsize][HEAD_DIMS.index(padded)]


def decode_splits(num_kv_heads: int, num_keys: int, documents: int, processors: int) -> int:
    """Return into how many parts the keys of a document are split, so that all of the GPU has work.

    `num_keys` is the room of all caches: how much of it is used only the device knows, and the parts share that
    equally.
    """
    programs = max(documents * num_kv_heads, 1)
    by_length = max(num_keys // max(documents, 1) // _MIN_SPLIT_KEYS, 1)
    return max(1, min(2 * processors // programs, by_length, MAX_SPLITS))


def max_decode_queries(num_queries: int, documents: int, splits: int) -> int:
    """Return up to how many queries a document is decoded; the forward kernel computes those with more.

    All are decoded where there are few queries in total, so that forward need not run: 16, or two a document, unless
    the keys are split, since what parts write takes memory for that many queries of each document.
    """
    all_decode = num_queries <= _DECODE_QUERIES or (splits == 1 and num_queries <= 2 * documents)
    return num_queries if all_decode else _DECODE_QUERIES


def decode_tiles(num_queries: int, documents: int, max_queries: int, heads_per_kv_head: int, block_m: int) -> int:
    """Return how many programs share the queries of a document times the heads that read a key head.

    There are enough for documents of average length; the programs of longer ones take several tiles of `block_m`.
    """
    average = min(max_queries, -(-num_queries // max(documents, 1)))
    return max(1, min(-(-average * heads_per_kv_head // block_m), _MAX_TILES))
