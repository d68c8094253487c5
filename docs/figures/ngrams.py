"""The n-grams of 3, 4 and 5 bytes that end at one byte, and the rows of three tables that their hashes select."""

from __future__ import annotations

from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from figures._cells import arrow, canvas, cell, characters, fill_of, label

TEXT = "byte kernels"
POSITION = 10
SIZES = (3, 4, 5)
VOCAB = 500002


def draw(colors: Colors) -> Figure:
    """Draw windows and rows; `ngram_hash` computes the rows."""
    rows = bk.ngram_hash(bk.to_ids(TEXT), ngram_sizes=SIZES, vocab=VOCAB)[:, POSITION].tolist()
    figure, axes = canvas(len(TEXT) + 7, 6.9, 0.36)
    characters(axes, 0.1, 0, TEXT, [-1] * len(TEXT), colors)
    for k, (size, row) in enumerate(zip((1, *SIZES), (None, *rows), strict=True)):
        y, begin = 1.4 + 1.4 * k, POSITION + 1 - size
        fill = fill_of(colors, k)
        for i in range(size):
            character = TEXT[begin + i]
            cell(axes, 0.1 + begin + i, y, "␣" if character == " " else character, colors, fill, mono=True)
        arrow(axes, (POSITION + 1.3, y + 0.5), (POSITION + 2.9, y + 0.5), colors.text)
        what = "byte table, its row" if row is None else f"table {k - 1}, row {row}"
        label(axes, POSITION + 3.2, y + 0.5, what, colors, align="left", size=10)
    return figure
