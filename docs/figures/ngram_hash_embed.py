"""The 3-grams that end at each byte of the documents "the" and "cat": before a document's start they have id 0."""

from __future__ import annotations

import torch
from extensions.figures import Colors
from matplotlib.figure import Figure

import blt_kernels as bk
from figures._cells import arrow, canvas, cell, characters, fill_of, label

TEXTS = ("the", "cat")
SIZE, VOCAB = 3, 1009


def draw(colors: Colors) -> Figure:
    """Draw the window of every byte and its row, which `ngram_hash` computes."""
    ids, cu_seqlens = bk.to_ids(list(TEXTS))
    rows = bk.ngram_hash(ids, cu_seqlens, ngram_sizes=(SIZE,), vocab=VOCAB)[0].tolist()
    text = "".join(TEXTS)
    figure, axes = canvas(len(text) + 11.4, 1.2 * len(text) + 1.6, 0.34)
    documents = [i for i, part in enumerate(TEXTS) for _ in part]
    characters(axes, 2, 0, text, documents, colors)
    ends = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff()).tolist()
    for i, (row, start) in enumerate(zip(rows, ends, strict=True)):
        y = 1.5 + 1.2 * i
        for place in range(i - SIZE + 1, i + 1):
            inside = place >= start
            fill = fill_of(colors, documents[i]) if inside else "none"
            cell(axes, 2 + place, y, text[place] if inside else "0", colors, fill, mono=True)
        arrow(axes, (2 + i + 1.3, y + 0.5), (10.2, y + 0.5), colors.faint)
        label(axes, 10.5, y + 0.5, f"row {row} of the table", colors, align="left")
    return figure
