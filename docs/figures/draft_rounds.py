"""The bundled entropy model writes with drafts of the prompt; the bytes of one pass have one colour.

Most passes write one byte; those whose draft was accepted write several.
"""

from __future__ import annotations

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from blt_kernels.models import ByteLM
from blt_kernels.models.generate import Generation
from figures._cells import canvas, cell, fill_of, label

PROMPT = "for key, value in self.items():\n            self.assertEqual(key, value)\n        for key, value in "
BYTES, COLUMNS = 48, 16
SHOWN = {" ": "␣", "\n": "⏎"}


def draw(colors: Colors) -> Figure:
    """Draw the bytes in lines, with the number of passes below."""
    generation = Generation(ByteLM.bundled(), PROMPT, max_new_bytes=BYTES, draft="prompt")
    rounds = [bk.to_bytes(torch.tensor(new)).decode() for (new,) in generation]
    text = [(character, i) for i, new in enumerate(rounds) for character in new]
    lines = -(-len(text) // COLUMNS)
    figure, axes = canvas(COLUMNS, lines * 1.25 + 0.9)
    for i, (character, of_round) in enumerate(text):
        x, y = i % COLUMNS, i // COLUMNS * 1.25
        cell(axes, x, y, SHOWN.get(character, character), colors, fill_of(colors, of_round), mono=True)
    label(axes, COLUMNS / 2, lines * 1.25 + 0.4, f"{len(text)} bytes in {len(rounds)} passes", colors)
    return figure
