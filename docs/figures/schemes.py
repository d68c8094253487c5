"""The same text cut by eight rules, one row each, with the number of patches."""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from blt_kernels.models import ByteLM
from figures._cells import canvas, characters, label

TEXT = "to patch, or not"


def draw(colors: Colors) -> Figure:
    """Draw one row for each way to cut TEXT."""
    model = ByteLM.bundled()
    ids, cu_seqlens = bk.to_ids([TEXT])
    entropy, layout = model.patch(ids, cu_seqlens)
    entropy = entropy.detach()
    threshold = model.config.threshold
    layouts = {
        "entropy_patch": layout,
        "entropy_patch, max_patch_length=3": bk.patch_starts(entropy, threshold=threshold, max_patch_length=3),
        "topk_patch(entropy, 3)": bk.topk_patch(entropy, 3),
        "space_patch": bk.space_patch(ids),
        "delimiter_patch, comma": bk.delimiter_patch(ids, ord(",") + 4),
        "static_patch, 4": bk.static_patch(cu_seqlens, 4),
        "static_patch, 4, first=4": bk.static_patch(cu_seqlens, 4, first=4),
        "byte_patch": bk.byte_patch(cu_seqlens),
    }
    figure, axes = canvas(len(TEXT), 2 * len(layouts), 0.34)
    for row, (name, found) in enumerate(layouts.items()):
        y = 2 * row
        label(axes, 0, y + 0.45, name, colors, align="left", mono=True, size=9)
        label(axes, len(TEXT), y + 0.45, int(found.num_patches), colors, align="right", size=9)
        characters(axes, 0, y + 0.85, TEXT, found.patch_ids.tolist(), colors)
    return figure
