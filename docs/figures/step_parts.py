"""The parts of a BLT that run for each byte of a text, which is read one by one.

Patcher, encoder and decoder run for every byte, the global transformer only for a byte that ends a patch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from blt_kernels.models import BLT, BLTConfig, ByteLM
from figures._cells import canvas, cell, characters, label

TEXT = "import sys, os"
PARTS = ("patcher", "encoder", "global", "decoder")
NAMES = 2.6  # cells that the names of the parts take


def draw(colors: Colors) -> Figure:
    """Draw a row for each part, which `ByteState.passes` counts, below the bytes in patches."""
    patcher = ByteLM.bundled()
    torch.manual_seed(0)
    model = BLT(replace(BLTConfig.small(), patcher=patcher.config, threshold=patcher.config.threshold))
    assert model.patcher is not None
    model.patcher.load_state_dict(patcher.state_dict())
    ids = bk.to_ids(TEXT)
    layout = model.patch(ids)
    state, ran = model.new_state(), []
    for i in range(len(ids)):
        before = Counter(state.passes)
        model.extend(ids[i : i + 1], state=state)
        ran.append(state.passes - before)
    figure, axes = canvas(NAMES + len(TEXT), 1.4 + len(PARTS))
    characters(axes, NAMES, 0, TEXT, layout.patch_ids.tolist(), colors)
    fills = (colors.patches[3], colors.patches[0], colors.patches[1], colors.patches[0])
    for row, (part, fill) in enumerate(zip(PARTS, fills, strict=True)):
        y = 1.4 + row
        label(axes, NAMES - 0.3, y + 0.5, part, colors, align="right")
        for i, parts in enumerate(ran):
            cell(axes, NAMES + i, y, "", colors, fill if parts[part] else "none")
    return figure
