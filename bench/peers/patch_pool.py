"""patch_pool and patch_unpool are compared with these peers.

Some want rows: x ``[B, S, D]``, ids ``[B, S]`` that count from 0 in every row, results padded to the most patches of a
row. The others want packed bytes: x ``[T, D]``, patch offsets ``[C+1]`` and ids ``[T]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scatter_reduce(x: Tensor, ids: Tensor, patches: int, reduce: Sequence[str]) -> Tensor:
    """Reduce as facebookresearch/blt and transformers do, one call a reduction: ``[B, patches, len(reduce) * D]``."""
    index = ids.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    pooled = []
    for name in reduce:
        out = torch.zeros(x.shape[0], patches, x.shape[-1], dtype=x.dtype, device=x.device)
        kind = {"max": "amax", "min": "amin"}.get(name, name)
        pooled.append(out.scatter_reduce(1, index, x, kind, include_self=False))
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1)


def segment_reduce(x: Tensor, offsets: Tensor, reduce: Sequence[str], ids: Tensor | None = None) -> Tensor:
    """Reduce contiguous segments as torch does, one call a reduction: ``[C, len(reduce) * D]``.

    Given ids, torch's scattered addition computes means, which is faster.
    """
    pooled = []
    for name in reduce:
        if name == "mean" and ids is not None:
            lengths = offsets.diff()[:, None]
            pooled.append(x.new_zeros(lengths.shape[0], x.shape[1]).index_add(0, ids, x) / lengths)
        else:
            pooled.append(torch.segment_reduce(x, name, offsets=offsets, axis=0, unsafe=True))
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1)


def gather(y: Tensor, ids: Tensor) -> Tensor:
    """Give bytes the vectors of patches as facebookresearch/blt does: y ``[B, P, D]`` to ``[B, S, D]``."""
    return torch.gather(y, 1, ids.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
