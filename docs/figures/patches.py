"""A line of text in patches: its bytes in boxes, one colour a patch, over the entropy of each next byte."""

from __future__ import annotations

import matplotlib.pyplot as plt
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from blt_kernels.models import ByteLM

TEXT = "The patches of a byte-latent model are longer where text is easy to predict."
THRESHOLD = 1.335


def draw(colors: Colors) -> Figure:
    """Draw the bytes of TEXT, cut by the bundled entropy model."""
    ids, cu_seqlens = bk.to_ids([TEXT])
    entropy, layout = ByteLM.bundled().patch(ids, cu_seqlens)
    figure, axes = plt.subplots(figsize=(10, 2))
    starts = entropy.detach().numpy()
    axes.bar(range(len(TEXT)), starts, color=colors.accent, width=0.8)
    patch = layout.patch_ids.tolist()
    for i, character in enumerate(TEXT):
        fill = colors.patches[patch[i] % len(colors.patches)]
        axes.text(i, -0.6, character, ha="center", va="center", family="monospace", bbox={"fc": fill, "ec": "none"})
    axes.set_ylabel("entropy of the next byte, nats")
    return figure
