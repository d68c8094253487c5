"""FLOPs that a byte costs in the released 1B model, by parts, for patches of 4.5, 6 and 8 bytes.

The encoder and the decoder cost the same for any patch size; the cost of the global transformer falls with it.
"""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.figure import Figure

from blt_kernels.flops import Rows, count_flops
from blt_kernels.models import BLTConfig

CONTEXT = 16384
SHOWN = {  # parts of `count_flops` under the name of the picture
    "global transformer": ("global",),
    "decoder": ("decoder", "decoder cross"),
    "encoder": ("encoder", "encoder cross"),
    "projections, output": ("projections", "output"),
}


def draw(colors: Colors) -> Figure:
    """Draw a bar for each patch size."""
    figure = Figure(figsize=(5.3, 2.1), layout="constrained")
    axes = figure.subplots()
    sizes = (8.0, 6.0, 4.5)
    left = [0.0] * len(sizes)
    counted = [count_flops(BLTConfig(), Rows.even(CONTEXT, size)).per_byte(CONTEXT).parts for size in sizes]
    fills = (colors.patches[1], colors.patches[0], colors.patches[2], colors.patches[3])
    for (name, parts), fill in zip(SHOWN.items(), fills, strict=True):
        values = [sum(of[part].forward for part in parts) / 1e6 for of in counted]
        axes.barh(
            [f"{size:g} bytes" for size in sizes], values, left=left, color=fill, label=name, edgecolor=colors.faint
        )
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlabel("millions of FLOPs a byte, forward")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, labelcolor=colors.text)
    return figure
