"""The command ``blt-kernels generate``, and the generation at the end of ``demo``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from blt_kernels.cli import app, demo
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig
from blt_kernels.models.sampling import Sampling
from blt_kernels.nn import TransformerConfig

LAYERS = TransformerConfig(16, 1, 1, ffn_dim=16, window=16)
PATCHER = ByteLMConfig(dim=16, num_layers=1, num_heads=1, ffn_dim=16, window=16, threshold=5.4)


@pytest.fixture(scope="module")
def blt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "blt.safetensors"
    BLT(BLTConfig(LAYERS, LAYERS, LAYERS, PATCHER, ngram_vocab=16, threshold=5.4)).save(path)
    return path


def invoke(*args: str, data: bytes = b"") -> bytes:
    result = CliRunner().invoke(app, ["generate", *args], input=data, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout_bytes


def test_the_bundled_model_writes_behind_standard_input() -> None:
    expected = ByteLM.bundled().generate(b"def \xff", max_new_bytes=20)
    assert invoke("--prompt", "-", "--max-new-bytes=20", data=b"def \xff") == expected.bytes[0]


@pytest.mark.parametrize(("count", "has_speed"), [(1, False), (2, True)])
def test_the_speed_is_that_behind_the_prompt(count: int, has_speed: bool) -> None:
    result = CliRunner().invoke(app, ["generate", f"--max-new-bytes={count}"], catch_exceptions=False)
    assert ("bytes/s" in result.stderr) == has_speed


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX shell")
@pytest.mark.parametrize(
    ("closed", "status", "told"),
    [("<&-", 1, b"--prompt -: expected an open standard input"), (">&-", 0, b"2 bytes"), (">&- 2>&-", 0, b"")],
)
def test_closed_streams(closed: str, status: int, told: bytes) -> None:
    command = f'"{sys.executable}" -m blt_kernels generate --prompt - --max-new-bytes=2 {closed}'
    result = subprocess.run(["sh", "-c", command], input=b"", capture_output=True, check=False)
    assert result.returncode == status
    assert told in result.stderr
    assert b"Traceback" not in result.stderr


def test_an_interruption_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, calls = Sampling.draw, iter(range(3))

    def interrupted(*args: Any) -> list[int]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(Sampling, "draw", interrupted)
    result = CliRunner().invoke(app, ["generate", "--json"], catch_exceptions=False)
    (row,) = json.loads(result.stdout)["rows"]
    assert (result.exit_code, len(row["ids"]), row["reason"]) == (130, 3, "interruption")


def test_prompts_are_text_or_files(blt: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xe4\xff")
    options = ["--model", str(blt), "--prompt", "text", "--prompt", str(tmp_path / "prompt"), "--max-new-bytes=9"]
    expected = BLT.load(blt).generate(["text", b"\xe4\xff"], max_new_bytes=9)
    assert [row["ids"] for row in json.loads(invoke(*options, "--json"))["rows"]] == expected.ids
    assert b"text" in invoke(*options)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_weights_are_stored_in_fewer_bits(blt: Path, weights: str) -> None:
    options = ["--model", str(blt), "--prompt", "text", "--max-new-bytes=9", "--weights", weights, "--json"]
    found = json.loads(invoke(*options))
    assert found["rows"][0]["ids"] == BLT.load(blt).quantized(weights).generate("text", max_new_bytes=9).ids[0]
    assert 0 < found["statistics"]["weight_error"] < 0.01


@pytest.mark.parametrize("draft", ["decoder", "patcher", "prompt", "model"])
def test_drafts_write_the_same(blt: Path, tmp_path: Path, draft: str) -> None:
    if draft == "model":
        ByteLM(PATCHER).save(tmp_path / "lm.safetensors")
        draft = str(tmp_path / "lm.safetensors")
    options = ["--model", str(blt), "--prompt", "abc", "--max-new-bytes=12"]
    assert invoke(*options, "--draft", draft) == invoke(*options)
    statistics = json.loads(invoke(*options, "--draft", draft, "--json"))["statistics"]
    assert statistics["bytes"] == 12
    assert sum(count * drafted for drafted, _, count in statistics["rounds"]) == statistics["drafted"]


def test_every_option_is_passed_on(blt: Path) -> None:
    options = {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.001,
        "seed": 3,
        "draft": "patcher",
        "draft_bytes": 2,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    out = invoke("--model", str(blt), "--prompt=x", "--max-new-bytes=40", "--stop=e", "--stop=a", *flags)
    expected = BLT.load(blt).generate("x", max_new_bytes=40, stop=("e", "a"), **options)  # type: ignore[arg-type]
    assert out == expected.bytes[0]
    assert out != BLT.load(blt).generate("x", max_new_bytes=40).bytes[0]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--top-p=2"], "--top-p: expected a value above 0, up to 1, got 2.0"),
        (["--max-new-bytes=-1"], "--max-new-bytes: expected a value >= 0, got -1"),
        (["--draft=nowhere"], "--draft: No such file or directory: nowhere"),
        (["--draft=decoder"], "--draft: expected one of 'prompt', got 'decoder'"),
        (["--model=nowhere"], "--model: No such file or directory: nowhere"),
        (["--device=tpu"], "--device: expected"),
    ],
)
def test_errors_are_one_line(args: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", *args])
    assert result.exit_code == 1
    assert result.output.startswith(f"blt-kernels generate: {error}")
    assert result.output.count("\n") == 1


@pytest.mark.slow
def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m blt_kernels generate --max-new-bytes 4000 | head -c 3"
    result = subprocess.run(command, shell=True, capture_output=True, timeout=300)
    assert len(result.stdout) == 3
    assert b"Traceback" not in result.stderr


def test_demo_generates_with_and_without_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.generate(ByteLM.bundled(), b"import os\nimport sys\n", demo.console(demo.Color.never))
    assert "accepted: the same bytes." in " ".join(capsys.readouterr().out.split())
