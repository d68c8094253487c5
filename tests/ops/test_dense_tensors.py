"""Sparse and nested tensors, and those in layouts of mkldnn, are refused by the name of their argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES
from op_calls import make, raw_calls
from op_case import OpCase
from torch import Tensor

import blt_kernels as bk
from blt_kernels.layout import PatchLayout

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "nested rows": lambda x: torch.nested.nested_tensor(list(x)),
    "csr": lambda x: x.to_sparse_csr(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "mkldnn": lambda x: x.to_mkldnn(),
}
# One case of each function is enough.
FUNCTIONS = list({case.function: case for case in reversed(CASES)}.values())


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested and CSR tensors are in beta
        yield


def foreign(x: object) -> dict[str, Tensor]:
    """Return `x` as every kind of tensor that torch can make of it."""
    made = {}
    for kind, function in KINDS.items() if isinstance(x, Tensor) else ():
        try:
            made[kind] = function(x)  # type: ignore[arg-type]
        except (RuntimeError, NotImplementedError, IndexError):
            continue
    return made


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.name)
def test_tensors_that_are_not_dense_are_named(case: OpCase, autocast: bool) -> None:
    arguments = make(case, "cpu", 9, 1)
    for name, value in arguments.items():
        for x in foreign(value).values():
            message = rf"^{name}\b.*(expected a dense tensor|dimensions|dtype)"
            with torch.autocast("cpu", enabled=autocast), pytest.raises((TypeError, ValueError), match=message):
                case.function(**{**arguments, name: x})


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.name)
def test_operators_refuse_them(case: OpCase) -> None:
    for operator, arguments in raw_calls(case, make(case, "cpu", 9 if case.op != "few_row_linear" else 4, 1)):
        for position, value in enumerate(arguments):
            # torch itself refuses nested tensors of operators that have no derivative.
            name = operator._schema.arguments[position].name
            message = rf"{name}: expected a dense tensor, got (a |one )|AutogradNestedTensor"
            for x in foreign(value).values():
                with pytest.raises((TypeError, NotImplementedError), match=message):
                    operator(*arguments[:position], x, *arguments[position + 1 :])


def test_offsets_on_meta() -> None:
    offsets = torch.sparse_coo_tensor(size=(3,), device="meta", dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^cu_seqlens: expected a dense tensor, got one of layout"):
        bk.space_patch(torch.zeros(8, dtype=torch.int64, device="meta"), offsets)


def test_text() -> None:
    text = torch.tensor([7, 8], dtype=torch.uint8)
    for kind in ("sparse", "nested"):
        with pytest.raises(TypeError, match=r"^data: expected a dense tensor, got (a nested one|one of layout)"):
            bk.to_ids(KINDS[kind](text))


def test_tables_and_layouts_of_them() -> None:
    tokens, tables = torch.arange(9) + 4, [torch.ones(5, 2), torch.ones(5, 2)]
    with pytest.raises(TypeError, match=r"tables(\[1\])?: expected a dense tensor"):
        bk.ngram_hash_embed(tokens, [tables[0], tables[1].to_sparse()], ngram_sizes=(1, 2))
    cuts, lengths = torch.zeros(9, dtype=torch.bool), torch.ones(1, 9, dtype=torch.int64)
    for name, call in {
        "lengths": lambda: PatchLayout.from_lengths(lengths.to_sparse()),
        "patch_ids": lambda: PatchLayout.from_ids(lengths.to_sparse(), lengths, 2),
        "cuts": lambda: PatchLayout.from_cuts(cuts.to_sparse(), torch.tensor([0, 9])),
        "cu_seqlens": lambda: PatchLayout.from_cuts(cuts, torch.tensor([0, 9]).to_sparse()),
        "ids": lambda: bk.to_bytes(tokens.to_sparse()),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: expected a dense tensor, got one of layout torch.sparse_coo"):
            call()
