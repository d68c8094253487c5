"""bench/generation_drafts.py reads a run that still goes on, and counts what drafts cost. No time is asserted."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

from blt_kernels.cli import bench as tool
from blt_kernels.models import BLT, BLTConfig, ByteLMConfig
from blt_kernels.nn import TransformerConfig
from blt_kernels.train import parallel, state


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(tool.SOURCE))
    return importlib.import_module("generation_drafts")


def tiny() -> BLT:
    torch.manual_seed(0)
    layers = TransformerConfig(32, 1, 2, window=16)
    patcher = ByteLMConfig(dim=16, num_layers=1, num_heads=2, window=16)
    return BLT(BLTConfig(layers, layers, layers, patcher, ngram_vocab=50, threshold=5.0)).eval()


def test_a_run_that_goes_on(drafts: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = tiny(), tmp_path / "text"
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        drafts.load(tmp_path)
    optimizer = torch.optim.SGD(model.parameters())
    values = {"options": {"steps": 9}, "config": asdict(model.config), "step": 7, "seconds": 1.0, "heldout_bits": None}
    with parallel.start("cpu") as ranks:
        state.save(tmp_path / "checkpoint", 7, model, optimizer, values, ranks, 1)
    loaded = drafts.load(tmp_path)
    assert "step 7" in capsys.readouterr().out
    ids = torch.arange(4, 40)
    assert torch.equal(loaded(ids), model(ids))
    file.write_bytes(bytes(range(100)))
    (tmp_path / "heldout.txt").write_text(f"{file}\n" * 3)
    assert list(drafts.held_out(tmp_path, 2, 25)) == [bytes(range(50, 75))] * 2
    assert not list(drafts.held_out(tmp_path, 2, 26))  # the file is too short


def test_tables(drafts: ModuleType) -> None:
    found = drafts.measure(tiny(), [b"abc", b"de"], temperature=0.0, max_new_bytes=12, draft_bytes=4)
    assert {draft: len(own) for draft, own in found.items()} == dict.fromkeys(drafts.DRAFTS, 2)
    assert all(own.bytes == 12 for own in found["decoder"])
    plain = found[None]
    lines = drafts.costs(found)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| none", "| patcher", "| decoder", "| prompt"]
    encoder, drafted = lines[2].split(" | ")[3], lines[2].split(" | ")[7]
    assert (encoder, drafted) == (f"{sum(own.passes['encoder'] for own in plain) / 24:.2f}", "0.00")
    rounds = found["decoder"][0].rounds + found["decoder"][1].rounds
    lines = drafts.acceptance(found)
    longest = max(drafted for own in found.values() for x in own for drafted, _ in x.rounds)
    assert lines[0].count("|") == longest + 2
    cells = [cell.strip() for cell in lines[3].split("|")[2:-1]]
    assert lines[3].startswith("| decoder")
    for length, cell in enumerate(cells, start=1):
        times = sum(n for (drafted, _), n in rounds.items() if drafted == length)
        assert cell == "" if not times else cell.endswith(f" of {times}")
