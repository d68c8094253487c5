"""The launch search of bench/search_attention.py, without a GPU: what it times, and how."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parents[2] / "bench"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a module of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_candidates_are_timed_by_graphs_of_all_copies(bench: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that fit in the L2 cache get copies; every graph has several calls, on the copies in turn."""
    search, target = bench("search_attention"), bench("gpu_stages.target")
    called: list[tuple[int, int]] = []

    class Recorder(target.Rehearsal):
        def l2_bytes(self) -> int:
            return 50 << 20

        def seconds_a_call(self, functions: Sequence[Callable[[], Any]], calls: int = 20) -> tuple[Callable, str]:
            def sample() -> float:
                target._call_in_turn(functions, calls)
                return 2e-3

            return sample, "by graphs"

    def prepare(kernel: str, *_arguments: Any) -> Callable[..., tuple[Tensor, ...]]:
        copy = _arguments[-1]

        def run(launch: Any) -> tuple[Tensor, ...]:
            called.append((copy, launch.block_m))
            return (torch.ones(1),)

        return run

    monkeypatch.setattr(search, "prepare", prepare)
    monkeypatch.setattr(search, "binaries", lambda _kernel: [])
    for width, copies in ((32, 2), (128, 1)):  # they take 67 MB and 269 MB
        called.clear()
        rows = list(search.search(Recorder(), "decode", 60.0, width=width))
        assert {row["milliseconds"] for row in rows} == {2.0}
        assert sum(row["in_table"] for row in rows) == 1
        counts = [sum(copy == n for copy, _ in called) for n in range(4)]
        graphs = 20 * search.SAMPLES * len(rows)
        assert counts == [graphs // copies + len(rows), *[graphs // copies] * (copies - 1), *[0] * (4 - copies)]
