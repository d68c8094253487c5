"""Ids outside the alphabet, and what lies beyond the last document: it may hold anything, and has no influence.

Sizes: tests/test_limits.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_models import build, documents
from torch import Tensor

import blt_kernels as bk
from blt_kernels.models import MegaByte
from blt_kernels.nn import EOS, next_byte_bits, next_byte_targets

GARBAGE_IDS = (-100, 260, -1, 2**40, -(2**63), 2**63 - 1, EOS)
"""What ids beyond the last row are filled with."""


def with_tail(tokens: Tensor, ids: tuple[int, ...] = GARBAGE_IDS) -> Tensor:
    return torch.cat([tokens, torch.tensor(ids, dtype=tokens.dtype)])


# --- ids outside the alphabet -----------------------------------------------------------------------------------------


def calls(model: Any) -> dict[str, Any]:
    functions = {"forward": model, "loss": model.loss}
    if isinstance(model, MegaByte):
        functions["strided"] = lambda *arguments: model(*arguments, strided=True)
    else:
        functions["patch"] = model.patch
    return functions


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("name", ["byte_lm", "blt", "blt_space", "blt_static", "megabyte", "megabyte_extended"])
@pytest.mark.parametrize(
    ("wrong", "dtype"), [(260, torch.int32), (-1, torch.int64), (-100, torch.int32), (2**40, torch.int64)]
)
def test_an_id_outside_the_alphabet_is_named(name: str, ops: str, wrong: int, dtype: torch.dtype) -> None:
    model = build(name, ops, torch.float32)
    tokens, rows = documents()
    tokens = tokens.to(dtype)
    tokens[5] = wrong
    message = f"tokens: expected ids from 0 to 259, the alphabet of the model, got {wrong}$"
    for what, call in calls(model).items():
        with pytest.raises(ValueError, match=message):
            call(tokens, rows)
        with pytest.raises(ValueError, match=message):
            call(tokens)
        assert what
    padded = tokens[:60].view(3, 20)
    for call in calls(model).values():
        with pytest.raises(ValueError, match=rf"got {wrong}\. Every id of padded tokens is in a document"):
            call(padded)


def test_a_given_layout_does_not_skip_the_check() -> None:
    tokens, rows = documents()
    model = build("blt", "reference")
    layout = model.patch(tokens, rows)
    tokens[3] = 300
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 259, the alphabet of the model, got 300"):
        model(tokens, rows, layout=layout)


def test_ngram_hash_embed_says_that_padded_ids_are_in_documents() -> None:
    tokens = torch.tensor([[5, 6], [7, -100]])
    with pytest.raises(ValueError, match=r"rows of byte_table, got -100\. Every id of padded tokens is in a document"):
        bk.ngram_hash_embed(tokens, torch.zeros(6 * 7, 4), torch.zeros(260, 4))
    with pytest.raises(ValueError, match="byte_table: expected at least one row"):
        bk.ngram_hash_embed(tokens, torch.zeros(6 * 7, 4), torch.zeros(0, 4))


@pytest.mark.parametrize("name", ["byte_lm", "blt", "megabyte_extended"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_models_read_no_table_at_an_unknown_id(name: str) -> None:
    """Where values are not looked at, such an id has no embedding and is not predicted; on a GPU it is the same."""
    model = build(name, dtype=torch.float32)
    tokens, rows = documents((9, 12))
    tokens[[4, 8, 15]] = torch.tensor([260, -100, 2**40])
    torch._dynamo.reset()
    loss = torch.compile(model.loss, backend="eager")(tokens, rows)
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_targets_outside_the_alphabet_are_not_predicted() -> None:
    targets = next_byte_targets(torch.tensor([5, 260, -3, 7, 6]), torch.tensor([0, 5]), 260)
    assert targets.tolist() == [-100, -100, 7, 6, -100]
    assert next_byte_bits(torch.zeros(5, 260), targets).item() == pytest.approx(torch.tensor(260.0).log2().item())
