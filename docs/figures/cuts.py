"""One line of text in patches of four bytes, at spaces, and by entropy: the last are long where text is predictable."""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from blt_kernels.models import ByteLM
from figures._cells import canvas, characters, label

TEXT = "return self.norm(x)"


def draw(colors: Colors) -> Figure:
    """Draw TEXT cut by three ops."""
    ids, cu_seqlens = bk.to_ids([TEXT])
    layouts = {
        "every 4 bytes": bk.static_patch(cu_seqlens, 4, first=4),
        "at spaces": bk.space_patch(ids),
        "by entropy": ByteLM.bundled().patch(ids, cu_seqlens)[1],
    }
    figure, axes = canvas(len(TEXT), 6.6, 0.32)
    for row, (name, layout) in enumerate(layouts.items()):
        patches = int(layout.num_patches)
        label(axes, 0, 2.2 * row + 0.45, f"{name}: {patches} patches", colors, align="left", size=9)
        characters(axes, 0, 2.2 * row + 1, TEXT, layout.patch_ids.tolist(), colors, size=9)
    return figure
