"""A short, fixed part of what `fuzz.ops` runs for long: extreme arguments are refused by name, or give right values."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import use
from fuzz import op_targets, ops, workers


@pytest.mark.parametrize(
    "numbers",
    [range(700), pytest.param(range(10_000, 12_000), marks=pytest.mark.slow)],
    ids=["few", "more"],
)
def test_extreme_arguments(numbers: range) -> None:
    counts, finds = ops.fuzz(numbers)
    assert not finds, "\n".join(finds)
    assert sum(counts.values()) == len(numbers)
    outcomes = {outcome for _, outcome in counts}
    assert outcomes >= {"refused", "right", "ran"}


@pytest.mark.slow
def test_extreme_arguments_on_the_emulator() -> None:
    """Kernels for a GPU reach no memory outside of their tensors, whatever the arguments are."""
    with use("emulated"):
        _, finds = ops.fuzz(range(20_000, 20_300))
    assert not finds, "\n".join(finds)


def test_deaths_of_children_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs behind one that ends its child go on in another."""
    monkeypatch.setattr(workers, "SECONDS", 0.5)

    def job(number: int) -> Iterator[dict[str, Any]]:
        yield {"call": f"call {number}"}
        if number == 1:
            ctypes.string_at(0)
        if number == 2:
            time.sleep(60)
        if number == 3:
            bytearray(1 << 40)
        yield {"outcome": "right"}

    told = list(workers.run(job, range(5)))
    assert [x["call"] for x in told] == [f"call {number}" for number in range(5)]
    assert [x.get("outcome") for x in told] == ["right", None, None, None, "right"]
    assert [x.get("died") for x in told[1:4]] == ["ended by signal 11", "ran for more than 0.5 s", "left with 1"]


def test_what_is_a_find() -> None:
    """Errors that name no argument, wrong values, and changed arguments are finds."""

    def wrong(x: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "nameless":
            raise ValueError("expected something else")
        if kind == "writes":
            x += 1
        return x + 1 if kind == "value" else x.clone()

    target = op_targets.Target("wrong", "", wrong, lambda *_: {}, lambda x, kind: x.clone())
    for kind, outcome in {"right": "right", "nameless": "found", "writes": "found", "value": "found"}.items():
        call = ops.Call(target, {"x": torch.ones(3), "kind": kind}, {"x": "ones"}, "plain", torch.float32)
        assert ops.judge(call)[0] == outcome, kind
