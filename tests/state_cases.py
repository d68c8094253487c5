"""Models, rows of ids and a check for the states of `blt_kernels.models`: each step is compared with one forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from inputs import robust_rule
from model_cases import LOCAL, SMALL_BLT, SMALL_MEGABYTE, build
from torch import Tensor

from blt_kernels import PatchLayout
from blt_kernels.ids import BPE, EOS, to_ids
from blt_kernels.models import BLT
from blt_kernels.models.base import ByteModel
from blt_kernels.models.blt_state import BLTState
from blt_kernels.testing import SCRIPTS, invalid_utf8, offsets_of

TOLERANCE = 1e-12  # logits in fp64 agree to it

_RULES: dict[str, dict[str, Any]] = {
    "entropy": {},
    "threshold_add": {"threshold_add": 0.0},
    "monotonic": {"monotonic": True},
    "space": {"patching": "space"},
    "static": {"patching": "static", "patch_size": 5},
    "byte": {"patching": "byte"},
    "bpe": {"patching": "bpe"},
}
_LENGTHS: dict[str, dict[str, Any]] = {
    "": {},
    ", max_patch_length": {"max_patch_length": 3},
    ", whole_characters": {"whole_characters": True},
    ", whole_characters and max_patch_length": {"whole_characters": True, "max_patch_length": 2},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "documents": {"split_documents": True},
    "global across documents": {"split_documents": True, "global_across_documents": True},
    "documents that another id ends": {"split_documents": True, "eos_id": BPE},
    "newlines": {"reset_at_newlines": True},
    "patcher of documents": {"patcher": dataclasses.replace(SMALL_BLT.patcher, split_documents=True)},
    "no local windows": {"encoder": dataclasses.replace(LOCAL, window=None), "patcher": None, "patching": "space"},
    "two local windows": {"encoder": dataclasses.replace(LOCAL, window=3)},
    "global window": {"global_transformer": dataclasses.replace(SMALL_BLT.global_transformer, window=3)},
    "global window, documents": {
        "global_transformer": dataclasses.replace(SMALL_BLT.global_transformer, window=3),
        "split_documents": True,
    },
    "global heads": {"global_transformer": dataclasses.replace(SMALL_BLT.global_transformer, num_kv_heads=1)},
    "pooled at every layer": {"cross_attn_all_layers_encoder": True, "pool_every_layer": True},
    "one query": {"queries_per_patch": 1},
    "n-grams": {"ngram_sizes": (2, 11), "num_functions": 2},
}
# A case has a model of `model_cases.CONFIGS`, and changes of its configuration.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "byte_lm": ("byte_lm", {}),
    "byte_lm: documents": ("byte_lm", {"split_documents": True}),
    "byte_lm: newlines": ("byte_lm", {"reset_at_newlines": True}),
    "byte_lm: documents and newlines": ("byte_lm", {"split_documents": True, "reset_at_newlines": True}),
    "byte_lm: no window": ("byte_lm", {"window": None}),
    "byte_lm: window of one": ("byte_lm", {"window": 1}),
    **{f"blt: {rule}{length}": ("blt", {**_RULES[rule], **_LENGTHS[length]}) for rule in _RULES for length in _LENGTHS},
    **{f"blt: {name}": ("blt", changes) for name, changes in _OPTIONS.items()},
    **{
        name: (name, {})
        for name in (
            "blt_all_encoder_layers",
            "blt_first_decoder_layer",
            "blt_grouped_heads",
            "blt_cross_windows",
            "blt_grouped_cross",
        )
    },
    "blt_cross_windows: documents": ("blt_cross_windows", {"split_documents": True}),
    "blt_cross_windows: monotonic, cut": ("blt_cross_windows", {"monotonic": True, "max_patch_length": 3}),
    "megabyte": ("megabyte", {}),
    "megabyte_extended": ("megabyte_extended", {}),
    "megabyte: patches of one": ("megabyte", {"patch_size": 1, "cross_patch": 1, "conv_sizes": (2,)}),
    "megabyte: cross_patch": ("megabyte", {"cross_patch": 4}),
    "megabyte: convolutions": ("megabyte", {"conv_sizes": (3, 6)}),
    "megabyte: global window": (
        "megabyte",
        {"global_transformer": dataclasses.replace(SMALL_MEGABYTE.global_transformer, window=3)},
    ),
}

# There is one of each model, and a BLT with all that reaches back: windows, documents, rises of entropies, lengths.
FEW = ["byte_lm: documents and newlines", "blt: threshold_add, whole_characters and max_patch_length"]
FEW += ["blt_cross_windows: documents", "blt: global window, documents", "megabyte_extended"]


def text(*parts: str | bytes | int) -> Tensor:
    """Return ids of text, of bytes, and special ids."""
    ids = [torch.tensor([part]) if isinstance(part, int) else to_ids(part) for part in parts]
    return torch.cat([torch.empty(0, dtype=torch.int64), *ids])


def rows_of_text() -> list[Tensor]:
    """Return rows in many scripts, with invalid UTF-8, newlines, documents and delimiters; an empty and a short row."""
    scripts = "".join(line[:5] for line in SCRIPTS.values())
    return [
        text(scripts, EOS, "as\n", EOS, EOS, "two\n\nlines, ", BPE, "a token", BPE, b"\xe4\xbd", EOS, "end"),
        text(),
        text(b"\xc3"),
        text(EOS, invalid_utf8(40), "\n", b"\xf0\x9f\x98"),
        text("The quick brown fox ", BPE, "jumps", BPE, " over", EOS, "the lazy dog and 42 others\n", EOS),
    ]


@cache
def model_of(case: str, ops: str = "fused", dtype: torch.dtype = torch.float64) -> ByteModel:
    """Return the model of a case. Its thresholds cut `rows_of_text` into short and long patches."""
    name, changes = CASES[case]
    model = build(name, ops, dtype, **changes).eval()
    if isinstance(model, BLT) and model.patcher is not None:
        rule = {key: changes[key] for key in ("threshold_add", "monotonic") if key in changes}
        truth = build(name, **changes).patcher  # every dtype gets the thresholds of fp64
        ids, rows = packed(rows_of_text())
        entropy, _ = truth.patch(ids, rows, reset_at_newlines=model.config.reset_at_newlines or None)
        model.config = dataclasses.replace(model.config, **robust_rule(entropy.detach(), rule) | _added(entropy, rule))
    return model


def _added(entropy: Tensor, rule: dict[str, Any]) -> dict[str, float]:
    """Return a threshold of the entropies themselves that lets a third of them pass, where rises are needed too."""
    if "threshold_add" not in rule:
        return {}
    values = entropy.detach().double().sort().values
    at = len(values) // 3
    return {"threshold": float(values[at : at + 2].mean())}


def packed(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows end to end and their offsets."""
    return torch.cat([text(), *rows]), offsets_of([len(row) for row in rows])


@torch.no_grad()
def patch_starts(model: BLT, rows: Sequence[Tensor]) -> list[list[int]]:
    """Return where `BLT.patch` starts the patches of each row, that of the byte to come included."""
    return _starts(model.patch(*packed(rows)), rows)


def _starts(layout: PatchLayout, rows: Sequence[Tensor]) -> list[list[int]]:
    starts, patches, cu = layout.patch_offsets.tolist(), layout.cu_patches.tolist(), layout.cu_seqlens.tolist()
    closes = (layout.decode_ids == layout.patch_ids).tolist()
    return [
        [start - cu[r] for start in starts[patches[r] : patches[r + 1]]]
        + ([len(row)] if not len(row) or closes[cu[r + 1] - 1] else [])
        for r, row in enumerate(rows)
    ]


class Checked:
    """Holds a state and plain rows of ids. Whatever is done to both, the state agrees with one forward over the rows.

    Parameters
    ----------
    model : ByteModel
    rows : int
    undo : int
    dtype : torch.dtype
        Of the ids.
    """

    def __init__(self, model: ByteModel, rows: int, undo: int = 4, dtype: torch.dtype = torch.int64) -> None:
        self.model, self.dtype = model, dtype
        self.rows = [text()] * rows
        self.state = model.new_state(rows, undo=undo)
        self.check()

    def extend(self, new: Sequence[Tensor]) -> Tensor:
        ids, offsets = packed(new)
        logits = self.model.extend(ids.to(self.dtype), offsets, state=self.state)
        self.rows = [torch.cat(both) for both in zip(self.rows, new, strict=True)]
        layout = self.check()
        patches = {} if layout is None else {"layout": layout}
        with torch.no_grad():
            expected = self.model(*packed(self.rows), **patches).split([len(row) for row in self.rows])
        expected = torch.cat([logits[:0], *(all_[len(all_) - len(n) :] for all_, n in zip(expected, new, strict=True))])
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
        return logits

    def truncate(self, lengths: Sequence[int]) -> None:
        self.state.truncate(lengths)
        self.rows = [row[:n] for row, n in zip(self.rows, lengths, strict=True)]
        self.check()

    def select(self, rows: Sequence[int]) -> None:
        self.state.select(rows)
        self.rows = [text() if r < 0 else self.rows[r] for r in rows]
        self.check()

    @torch.no_grad()
    def check(self) -> PatchLayout | None:
        """Compare rows, lengths and patches. Return the patches that a BLT gives the rows."""
        assert self.state.rows == len(self.rows)
        assert self.state.lengths == [len(row) for row in self.rows]
        for r, row in enumerate(self.rows):
            assert torch.equal(self.state.row_ids(r), row)
        if not isinstance(self.state, BLTState):
            return None
        layout = self.model.patch(*packed(self.rows))
        assert self.state.patch_starts == _starts(layout, self.rows)
        return layout
