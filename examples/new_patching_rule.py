"""A new patching rule in a few lines, under a BLT.

Run it by ``python examples/new_patching_rule.py``.
"""

# %% The rule: content-defined chunks, as programs cut files to find what they have in
# common. A patch ends where a hash of the last three bytes is 0, so the same words
# are cut in the same way wherever they stand, without any model.
import textwrap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import blt_kernels as bk
from blt_kernels.models import BLT, BLTConfig


def content_patch(ids: Tensor, cu_seqlens: Tensor, size: int = 5) -> bk.PatchLayout:
    """Return patches of about `size` bytes that the content defines.

    Parameters
    ----------
    ids : int32 or int64 ``[T]``
    cu_seqlens : int32 ``[B+1]``
    size : int
    """
    hashes = bk.ngram_hash(ids, cu_seqlens, ngram_sizes=(3,), vocab=size)  # [1, T]
    # The first patch of a row has one byte: BLT wants it so.
    return bk.boundary_patch(hashes[0] == 0, cu_seqlens, at="end", first=1)


# %% Rows of a batch are cut as if they were alone, and every row begins with a patch
# of one byte.
ids, cu_seqlens = bk.to_ids(
    ["for key in keys: print(key)", "def print_keys(keys): print(keys)"]
)
layout = content_patch(ids, cu_seqlens).compact()
offsets = layout.patch_offsets.tolist()
print("│".join(bk.to_bytes(ids[a:b]).decode() for a, b in pairwise(offsets)))
print(layout)

# %% A rule may look at the bytes up to the end of a patch and no further: else the
# patches tell the model bytes that it has to predict. This finds a rule that looks
# ahead: more bytes must not change what the bytes before them may read.
whole = content_patch(ids[: cu_seqlens[1]], cu_seqlens[:2]).decode_ids.tolist()
for length in range(1, len(whole)):
    prefix = content_patch(ids[:length], torch.tensor([0, length])).decode_ids.tolist()
    assert prefix == whole[:length], f"what follows byte {length} changes the patches"
print("the rule does not look ahead")

# %% A BLT takes any layout. It needs no patcher then.
torch.manual_seed(0)
model = BLT(replace(BLTConfig.small(), patcher=None))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text = Path(textwrap.__file__).read_bytes()  # a module of the standard library
for step in range(1, 9):
    ids, cu_seqlens = bk.to_ids([text[1024 * step + i :][:512] for i in (0, 512)])
    layout = content_patch(ids, cu_seqlens)
    loss = model.loss(ids, cu_seqlens, layout=layout)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (1, 8):
        size = len(ids) / int(layout.num_patches)
        print(f"step {step}: {loss:.2f} bits per byte, patches of {size:.2f} bytes")
