"""The scripts in examples/ run, each in a process and a folder of its own, without the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ARGUMENTS = {"train_and_generate": ["12"]}  # steps of the 150 that it takes by default
PRINTED = {
    "new_patching_rule": "the rule does not look ahead",
    "patch_your_text": "patches of  4.00 bytes",
    "test_patch_softmax": "5 passed",
    "train_and_generate": "the same text: True",
    "transformers_blt": "BltModel.forward: 6 calls",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *ARGUMENTS.get(path.stem, [])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert PRINTED[path.stem] in done.stdout
    assert not [file for file in tmp_path.iterdir() if file.name[0] != "."]


def test_the_page_shows_every_example() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    shown = {path.name for path in EXAMPLES if f"../examples/{path.name}" in page}
    assert shown == {path.name for path in EXAMPLES}
