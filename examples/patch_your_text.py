"""Cut your own text into patches, draw them and count them.

Run it by ``python examples/patch_your_text.py [FILE]``.
"""

# %% The text: the file that is named, or else a module of the standard library.
import math
import sys
import textwrap
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch

import blt_kernels as bk
from blt_kernels.models import ByteLM

file = Path(sys.argv[1] if len(sys.argv) > 1 else textwrap.__file__)
data = file.read_bytes()[:16384]
ids = bk.to_ids(data)  # int32 [T]: byte + 4
print(f"{file.name}, {len(data)} bytes")


# %% A patch is a range of bytes. The drawing has a bar between patches.
def draw(layout: bk.PatchLayout, count: int = 400) -> str:
    """Return the first bytes of the text in patches."""
    offsets = layout.patch_offsets[: int(layout.num_patches) + 1].tolist()
    patches = [
        data[a:b].decode(errors="replace") for a, b in pairwise(offsets) if a < count
    ]
    return "│".join(patch.replace("\n", "⏎\n") for patch in patches)


# %% By entropy: a patch starts after a byte behind which the next byte is hard to
# predict.
model = ByteLM.bundled()  # 1.8 M parameters, trained on the standard library
entropy, layout = model.patch(ids)  # fp32 [T] in nats, and the patches
print(f"\nAfter an entropy above {model.config.threshold:.3f} nats:\n")
print(f"{draw(layout)}\n\nThe model spends {model.loss(ids):.2f} bits on a byte.")

# %% How long the patches are.
lengths = Counter(layout.patch_lengths[: int(layout.num_patches)].tolist())
print("\nbytes  patches")
for length in range(1, 13):
    sizes = [length] if length < 12 else [size for size in lengths if size >= 12]
    count = sum(lengths[size] for size in sizes)
    name = f"{length}" if length < 12 else "12 and more"
    print(f"{name:>11} {count:>5} {'█' * math.ceil(count / 50)}")

# %% The same text by other rules.
rules = {
    "entropy above 1 nat": bk.patch_starts(entropy, threshold=1.0),
    "entropy above 2 nats": bk.patch_starts(entropy, threshold=2.0),
    "at most 8 bytes": bk.patch_starts(entropy, threshold=2.0, max_patch_length=8),
    "spaces": bk.space_patch(ids),
    "lines": bk.delimiter_patch(ids, id=bk.to_ids("\n").item()),
    "every 4 bytes": bk.static_patch(torch.tensor([0, len(ids)]), size=4),
}
print()
for name, layout in rules.items():
    patches = int(layout.num_patches)
    print(f"{name:<20} {patches:>6} patches of {len(ids) / patches:5.2f} bytes")
