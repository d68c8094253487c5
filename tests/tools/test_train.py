"""Data, training and evaluation on files, and the n-gram baseline."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import blt_kernels as bk
from blt_kernels import _files
from blt_kernels.cli import flops
from blt_kernels.ids import BOS, EOS
from blt_kernels.models import ByteLM, load_model
from blt_kernels.nn import TransformerLayer, next_byte_targets
from blt_kernels.testing import SCRIPTS
from blt_kernels.train import data, loop, optimizer
from blt_kernels.train import log as train_log
from blt_kernels.train import state as train_state
from blt_kernels.train.build import build_model
from blt_kernels.train.config import EvalConfig, TrainConfig
from blt_kernels.train.evaluate import evaluate, measure
from blt_kernels.train.ngram import NgramModel
from blt_kernels.train.parallel import Ranks, clip_gradients

ALONE = Ranks(torch.device("cpu"))
TINY = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64, "window": 16}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return thirty small files with a pattern to learn, and things that must be left out."""
    root = tmp_path / "corpus"
    (root / "deep" / "__pycache__").mkdir(parents=True)
    for i in range(30):
        (root / "deep" / f"{i}.txt").write_text(f"file {i}: " + f"the quick brown fox {i}; " * (5 + i))
    (root / "same.txt").write_bytes((root / "deep" / "3.txt").read_bytes())
    (root / "binary.bin").write_bytes(b"\0\1\2")
    (root / "empty.txt").write_bytes(b"")
    (root / "deep" / "__pycache__" / "x.txt").write_text("cached")
    return root


def config(corpus: Path, out: Path, **changes: object) -> TrainConfig:
    options = {"steps": 12, "batch_bytes": 256, "context": 64, "warmup": 2, "overrides": TINY, "heldout": 0.2}
    options |= {"model": "entropy", "paths": [corpus], "out": out, "eval_every": 5, "tensorboard": False}
    return TrainConfig(**{**options, **changes})


# --- data -------------------------------------------------------------------------------------------------------------


def test_sources_are_files_with_something_to_learn(corpus: Path) -> None:
    sources = data.find_sources([corpus])
    assert {source.path.name for source in sources} == {f"{i}.txt" for i in range(30)}
    assert data.find_sources([corpus], ["1?.txt"])[0].path.name.startswith("1")
    assert data.find_sources([corpus / "binary.bin"])[0].size == 3  # a file that is named is taken
    assert data.find_sources([corpus / "deep", corpus / "same.txt"]) == sources
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.find_sources([corpus / "nowhere"])
    with pytest.raises(ValueError, match="no files to read"):
        data.find_sources([corpus], ["*.rs"])


def test_the_split_is_disjoint_complete_and_a_matter_of_content(corpus: Path) -> None:
    sources = data.find_sources([corpus])
    train_side, held = data.split_sources(sources, 0.3, seed=1)
    assert not {s.digest for s in train_side} & {s.digest for s in held}
    assert sorted(s.digest for s in train_side + held) == [s.digest for s in sources]
    assert 2 <= len(held) <= 18
    (corpus / "deep").rename(corpus / "moved")
    moved = data.split_sources(data.find_sources([corpus / "moved"]), 0.3, seed=1)[1]
    assert [s.digest for s in moved] == [s.digest for s in held]
    assert data.split_sources(sources, 0.3, seed=2)[1] != held
    assert data.split_sources(sources, 0.0, seed=1)[1] == data.split_sources(sources, 1.0, seed=1)[0] == []


def document(source: data.Source) -> list[int]:
    return [BOS, *(byte + 4 for byte in source.path.read_bytes()), EOS]


def test_an_epoch_holds_every_piece_once_in_shuffled_order(corpus: Path) -> None:
    sources = data.find_sources([corpus])
    batches = data.PackedBatches(sources, batch_bytes=100, context=40, seed=3)
    expected = []
    for source in sources:
        ids = document(source)
        expected += [ids[start : start + 40] for start in range(0, len(ids) - 1, 39)]
    epochs = []
    for epoch in range(2):
        stream: list[int] = []
        for step in range(batches.batches_per_epoch):
            tokens, rows = batches.batch(epoch * batches.batches_per_epoch + step)
            assert tokens.dtype == rows.dtype == torch.int32
            assert len(tokens) == rows[-1] == 100
            assert rows[0] == 0
            assert (rows.diff() > 0).all()
            stream += tokens.tolist()
        epochs.append(stream)
        order = batches._order
        assert stream == [i for piece in order for i in expected[piece]][: len(stream)]
        assert sorted(order) == list(range(len(expected)))
    assert epochs[0] != epochs[1]
    assert len(epochs[0]) > sum(map(len, expected)) - 100


def test_batches_are_a_function_of_seed_and_step(corpus: Path) -> None:
    sources = data.find_sources([corpus])
    one, two = (data.PackedBatches(sources, 100, 40, seed=0) for _ in range(2))
    late = two.batch(150)
    for step in (0, 1, 150):
        batch = one.batch(step)
    assert all(a.equal(b) for a, b in zip(batch, late, strict=True))
    assert not data.PackedBatches(sources, 100, 40, seed=1).batch(150)[0].equal(late[0])
    whole = data.PackedBatches(sources[:1], 1 << 20, 1 << 20, seed=0)
    assert whole.batch(5)[0].tolist() == document(sources[0])


def rows_of(batch: tuple[torch.Tensor, torch.Tensor]) -> list[list[int]]:
    tokens, rows = batch
    return [tokens[a:b].tolist() for a, b in pairwise(rows)]


def test_parts_of_a_batch_share_its_rows(corpus: Path) -> None:
    batches = data.PackedBatches(data.find_sources([corpus]), 1000, 100, seed=0)
    for step in (0, 5):
        whole = batches.batch(step)
        assert batches.predicted(step) == int((next_byte_targets(*whole) >= 0).sum())
        for parts in (2, 3, 40):
            shares = [batches.batch(step, part, parts) for part in range(parts)]
            assert sorted(row for share in shares for row in rows_of(share)) == sorted(rows_of(whole))
            sizes = [len(tokens) for tokens, _ in shares]
            assert max(sizes) - min(sizes) <= 100  # they differ by at most one row
    assert 0 in sizes  # 40 parts share fewer rows
    assert data.share([3, 9, 4, 2], 2) == [[1], [0, 2, 3]]


def test_heldout_batches_predict_every_byte_once(corpus: Path) -> None:
    sources = data.find_sources([corpus])
    pairs = 0
    for tokens, rows in data.heldout_batches(sources, 100, 40):
        assert len(tokens) <= 100
        pairs += int((rows.diff() - 1).sum())
    assert pairs == sum(source.size + 1 for source in sources)


def test_a_file_that_shrinks_is_named(corpus: Path) -> None:
    source = data.find_sources([corpus])[0]
    source.path.write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{source.path}.*has become shorter"):
        data.read_ids(source, 0, source.size + 2)


# --- the n-gram baseline ----------------------------------------------------------------------------------------------


def test_ngram_probabilities_sum_to_one(corpus: Path) -> None:
    model = NgramModel.train(data.find_sources([corpus]))
    seen = [sum((byte + 4) * 260 ** (3 - j) for j, byte in enumerate(text)) for text in (b"the", b"fox")]
    unseen = [(7 * 260 + 8) * 260**2 + 9 * 260, (BOS * 260**2 + BOS * 260 + BOS) * 260]
    for context in seen + unseen:
        p = model.probability(context + 4 + np.arange(256))
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert p.min() > 0


def test_ngram_by_hand(tmp_path: Path) -> None:
    """The file "ab" gives P(a) after three BOS, by Witten-Bell at each order."""
    (tmp_path / "f").write_bytes(b"ab")
    model = NgramModel.train(data.find_sources([tmp_path]))
    order0 = (1 + 2 / 256) / 4  # there were two bytes, both different, one of them a
    order1 = (1 + order0) / 2  # BOS was followed by one byte, once
    order2 = (1 + order1) / 2
    order3 = (1 + order2) / 2
    window = ((BOS * 260 + BOS) * 260 + BOS) * 260 + ord("a") + 4
    assert model.probability(np.array([window]))[0] == pytest.approx(order3)
    assert model.measure(data.find_sources([tmp_path])) == pytest.approx(-math.log2(order3), abs=0.5)


def test_ngram_blocks_do_not_show(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = data.find_sources([corpus])
    whole = NgramModel.train(sources[2:]).measure(sources[:2])
    monkeypatch.setattr("blt_kernels.train.ngram._BLOCK_BYTES", 7)
    assert NgramModel.train(sources[2:]).measure(sources[:2]) == pytest.approx(whole, rel=1e-12)
    assert 0.5 < whole < 8


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["entropy", "blt", "megabyte"])
def test_training_learns_and_leaves_everything_behind(model: str, corpus: Path, tmp_path: Path) -> None:
    local = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64, "window": 16}
    wide = {"dim": 48, "num_layers": 1, "num_heads": 2, "ffn_dim": 64}
    overrides = {
        "entropy": TINY,
        "blt": {"encoder": local, "global_transformer": wide, "decoder": local, "ngram_vocab": 64, "patching": "space"},
        "megabyte": {"global_transformer": wide, "local_transformer": local},
    }[model]
    options = config(corpus, tmp_path / "run", model=model, overrides=overrides, steps=25, learning_rate=1e-2)
    seen: list[loop.Progress] = []
    result = loop.train(options, seen.append)
    assert [progress.step for progress in seen] == list(range(1, 26))
    assert result.heldout_bits < seen[0].bits_per_byte - 3
    assert seen[-1].heldout_bits is not None
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "checkpoint",
        "heldout.txt",
        "lock",
        "log.jsonl",
        "loss.png",
        "model.safetensors",
    ]
    assert result.curve.read_bytes().startswith(b"\x89PNG")
    held = data.split_sources(data.find_sources([corpus]), 0.2, 0)[1]
    assert (tmp_path / "run" / "heldout.txt").read_text().splitlines() == [str(source.path) for source in held]
    lines = train_log.read_log(tmp_path / "run" / "log.jsonl")
    assert lines[-1] == {
        "step": 25,
        "heldout_bits_per_byte": result.heldout_bits,
        "heldout_bytes": sum(source.size for source in held),
        "final": True,
    }
    options = EvalConfig(result.model, [corpus], split="heldout", heldout=0.2, context=64, ngram=True)
    evaluation = evaluate(options)
    assert evaluation.bits_per_byte == pytest.approx(result.heldout_bits, rel=1e-5)
    assert (evaluation.num_bytes, evaluation.num_files) == (result.heldout_bytes, len(held))
    assert evaluation.ngram_bits_per_byte == pytest.approx(
        NgramModel.train(data.split_sources(data.find_sources([corpus]), 0.2, 0)[0]).measure(held)
    )
    strided = replace(options, strided=True)
    if model == "megabyte":
        bits = measure(load_model(result.model), held, options.batch_bytes, 64, strided=True)[0]
        assert evaluate(strided).bits_per_byte == pytest.approx(bits, rel=1e-6) != evaluation.bits_per_byte
    else:
        with pytest.raises(ValueError, match="strided: expected a MegaByte, got a"):
            evaluate(strided)


_CHILD = """
import sys, time
from pathlib import Path
from blt_kernels.train import loop
sys.path.insert(0, sys.argv[1])
from test_train import resumable
options = resumable(Path(sys.argv[2]), Path(sys.argv[3]))
loop.train(options, lambda now: (print(now.step, flush=True), time.sleep(0.02)))
"""


def resumable(corpus: Path, out: Path) -> TrainConfig:
    more = {"accumulate": 2, "checkpoint_activations": True}
    return config(corpus, out, steps=30, eval_every=7, checkpoint_every=4, **more)


def run_here(corpus: Path, out: Path) -> list[int]:
    steps: list[int] = []
    loop.train(resumable(corpus, out), lambda now: steps.append(now.step))
    return steps


def kill_after(step: int, corpus: Path, out: Path) -> list[int]:
    """Start the run in a process of its own and kill it after `step`; returns the steps it took."""
    command = [sys.executable, "-c", _CHILD, str(Path(__file__).parent), str(corpus), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    steps = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            steps.append(int(line))
            if steps[-1] == step:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    return steps


@pytest.mark.slow
def test_a_killed_run_goes_on_to_bitwise_the_same_weights(corpus: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert run_here(corpus, tmp_path / "whole") == list(range(1, 31))
    killed = tmp_path / "killed"
    assert kill_after(11, corpus, killed) == list(range(1, 12))
    with (killed / "log.jsonl").open("a") as log:
        log.write('{"step": 11, "bits_')  # a kill may cut a line short
    (killed / "checkpoint" / "99").mkdir()
    (killed / "checkpoint" / "99" / "__0_0.distcp").write_bytes(b"half a checkpoint")
    steps = run_here(corpus, killed)
    assert 8 <= steps[0] - 1 <= 11  # at most checkpoint_every = 4 steps are lost
    assert steps == list(range(steps[0], 31))
    one, two = (load_model(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "killed"))
    assert all(one[key].equal(two[key]) for key in one)
    logs = [train_log.read_log(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    timeless = [[{key: line[key] for key in line if "second" not in key} for line in log] for log in logs]
    assert timeless[0] == timeless[1]
    written = (killed / "checkpoint" / "30" / ".metadata").stat().st_mtime_ns
    assert run_here(corpus, killed) == []  # a finished run stays finished
    assert (killed / "checkpoint" / "30" / ".metadata").stat().st_mtime_ns == written


def test_a_run_goes_on_with_more_steps(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the data, and from there on the learning rate, of a run that had as many from the beginning."""
    options = config(corpus, tmp_path / "run", steps=6, checkpoint_every=2, log_every=1)
    loop.train(options)
    more = replace(options, steps=9)
    loop.train(more)
    extended = load_model(tmp_path / "run" / "model.safetensors").state_dict()
    log = train_log.read_log(tmp_path / "run" / "log.jsonl")

    rate = optimizer.learning_rate
    by_hand = [rate(options if step < 6 else more, step) for step in range(9)]
    assert by_hand[6] > by_hand[5] == pytest.approx(options.final_learning_rate)
    assert [line["learning_rate"] for line in log if "learning_rate" in line] == by_hand
    monkeypatch.setattr(loop, "learning_rate", lambda config, step: by_hand[step])
    loop.train(replace(more, out=tmp_path / "at once"))
    at_once = load_model(tmp_path / "at once" / "model.safetensors").state_dict()
    assert all(extended[key].equal(at_once[key]) for key in at_once)
    losses = [
        [line["bits_per_byte"] for line in lines if "bits_per_byte" in line]
        for lines in (log, train_log.read_log(tmp_path / "at once" / "log.jsonl"))
    ]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"steps: expected at least 9, as .* has, got 8"):
        loop.train(replace(options, steps=8))


def test_the_newest_checkpoints_stay_and_nothing_else_goes(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    notes = [
        folder / "notes" / "a.txt",
        folder / "best" / ".metadata",
        folder / "2" / "mine.txt",
        folder / "7" / "mine",
    ]
    for file in notes:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    (folder / "1").mkdir()
    (folder / "1" / "__0_0.distcp").write_bytes(b"half a checkpoint")
    (folder / "todo.txt").write_text("mine")
    others = {"notes", "best", "2", "7", "todo.txt"}
    run = loop._Run(config(corpus, tmp_path, checkpoint_every=2, keep=2), ALONE)
    for step, kept in ((0, {"0"}), (2, {"0", "2"}), (4, {"2", "4"}), (6, {"4", "6"})):
        while run.step < step:
            run.record(run.advance(), 1.0)
        assert {path.name for path in folder.iterdir()} == kept | others
        assert train_state.latest(folder).name == str(step)
    assert [path.name for path in (folder / "2").iterdir()] == ["mine.txt"]
    assert all(file.read_text() == "mine" for file in (*notes, folder / "todo.txt"))
    # The older of two is whole. Fewer are kept from now on.
    for file in (folder / "6").iterdir():
        file.unlink()
    run = loop._Run(config(corpus, tmp_path, checkpoint_every=2, keep=2), ALONE)
    assert run.step == 4
    while run.step < 6:
        run.record(run.advance(), 1.0)
    assert {path.name for path in folder.iterdir()} == {"4", "6"} | others
    assert loop._Run(config(corpus, tmp_path, checkpoint_every=2, keep=1), ALONE).step == 6
    assert {path.name for path in folder.iterdir()} == {"6"} | others


SMALL_BLT = {
    "encoder": TINY,
    "global_transformer": {"dim": 48, "num_layers": 2, "num_heads": 2, "ffn_dim": 64},
    "decoder": TINY,
    "ngram_vocab": 64,
    "patching": "space",
}


def advance(corpus: Path, out: Path, steps: int = 4, **changes: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return losses of the first steps of a BLT, and its weights after them."""
    options = {"model": "blt", "overrides": SMALL_BLT, "batch_bytes": 1000, "context": 300, "learning_rate": 1e-3}
    run = loop._Run(config(corpus, out, **{**options, **changes}), ALONE)
    return [run.advance() for _ in range(steps)], run.model.state_dict()


def test_patching_options_of_a_run(corpus: Path, tmp_path: Path) -> None:
    """`--set` reaches the patches and the saved model; BPE patching has no delimiters in files."""
    options = {"whole_characters": True, "reset_at_newlines": True, "patching": "entropy", "threshold": 1.0}
    run = loop._Run(config(corpus, tmp_path / "run", model="blt", overrides={**SMALL_BLT, **options}), ALONE)
    assert {key: getattr(run.model.config, key) for key in options} == options
    assert run.advance() > 0
    run.model.save(tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    assert again.config == run.model.config
    text = "".join(SCRIPTS.values())
    patches = bk.to_bytes(bk.to_ids(text), again.patch(text).patch_offsets)
    assert "".join(patch.decode() for patch in patches) == text
    with pytest.raises(ValueError, match="--set patching: expected a rule for the bytes of files, got 'bpe'"):
        build_model(config(corpus, tmp_path, model="blt", overrides={"patching": "bpe"}))
    run.model.config = replace(run.model.config, patching="bpe")
    run.model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint .*model.safetensors, patching: expected .* got 'bpe'"):
        evaluate(EvalConfig(tmp_path / "model.safetensors", [corpus]))
    with pytest.raises(ValueError, match=r"measure: config.patching: expected .* got 'bpe'"):
        flops.measure(replace(run.model.config, patcher=None), 4.5, 100, [corpus])


@pytest.mark.parametrize("accumulate", [2, 3, 30])
def test_micro_batches_add_up_to_the_batch(accumulate: int, corpus: Path, tmp_path: Path) -> None:
    """Rows have up to 300 bytes: their parts are uneven, and some of the 30 are empty."""
    expected, weights = advance(corpus, tmp_path / "one")
    got, others = advance(corpus, tmp_path / "many", accumulate=accumulate)
    assert got == pytest.approx(expected, rel=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4)  # Adam magnifies rounding


def test_recomputed_layers_give_bitwise_the_same(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, weights = advance(corpus, tmp_path / "kept")
    calls = []
    layer = TransformerLayer._layer
    monkeypatch.setattr(TransformerLayer, "_layer", lambda *inputs: (calls.append(1), layer(*inputs))[1])
    got, others = advance(corpus, tmp_path / "again", checkpoint_activations=True)
    assert got == expected
    assert all(others[name].equal(value) for name, value in weights.items())
    assert len(calls) == 2 * 4 * 4  # each of 4 steps calls it twice in each of 4 layers


@pytest.mark.slow
def test_compiled_layers_take_any_length(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once, without graph breaks; the micro-batches have other lengths at every step."""
    from torch._dynamo.utils import counters

    options: dict[str, object] = {
        "model": "entropy",
        "overrides": TINY,
        "accumulate": 2,
        "checkpoint_activations": True,
    }
    expected, _ = advance(corpus, tmp_path / "eager", **options)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True))
    torch._dynamo.reset()
    counters.clear()
    got, _ = advance(corpus, tmp_path / "compiled", compile=True, **options)
    assert got == pytest.approx(expected, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_gradients_are_clipped_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = torch.nn.ParameterList(torch.zeros(size) for size in (3, 40, 5))
    for limit in (1e3, 0.1):
        for parameter in parameters[:2]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        expected = [parameter.grad.clone() for parameter in parameters[:2]]
        clip_gradients(parameters, limit)
        norm = torch.cat(expected).norm()
        for parameter, grad in zip(parameters, expected, strict=False):
            torch.testing.assert_close(parameter.grad, grad * min(1.0, limit / (norm + 1e-6)))


def test_tensorboard_events(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    run = loop._Run(config(corpus, out, tensorboard=True, log_every=1, checkpoint_every=2), ALONE)
    for _ in range(3):  # step 3 is lost, since the checkpoint is of step 2
        run.record(run.advance(), 1.0)
    assert run.log is not None
    run.log.close()
    loop.train(config(corpus, out, tensorboard=True, log_every=1, checkpoint_every=2))
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    lines = train_log.read_log(out / "log.jsonl")
    for name in ("bits_per_byte", "learning_rate", "heldout_bits_per_byte"):
        logged = [(line["step"], line[name]) for line in lines if name in line and "final" not in line]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
    (final,) = events.Scalars("final/heldout_bits_per_byte")
    assert final.value == pytest.approx(lines[-1]["heldout_bits_per_byte"], rel=1e-6)


def test_tensorboard_that_is_missing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt_kernels.train.log.find_spec", lambda name: None)
    loop.train(config(corpus, tmp_path / "run", steps=1, tensorboard=None))
    assert not (tmp_path / "run" / "tensorboard").exists()
    with pytest.raises(ImportError, match=r"pip install 'blt-kernels\[train\]'"):
        loop.train(config(corpus, tmp_path / "run", steps=1, tensorboard=True))


def test_checkpoints_come_by_time_too(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop._Run(config(corpus, tmp_path, checkpoint_every=1000, checkpoint_seconds=5.0), ALONE)
    now = time.monotonic()
    for elapsed, saved in ((0, 0), (4, 0), (6, 3), (8, 3), (12, 5)):
        monkeypatch.setattr(time, "monotonic", lambda elapsed=elapsed: now + elapsed)
        run.record(run.advance(), 1.0)
        assert train_state.read_values(train_state.latest(tmp_path / "checkpoint"))["step"] == saved
        assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [str(saved)]


def test_a_run_with_other_options_is_refused(corpus: Path, tmp_path: Path) -> None:
    loop.train(config(corpus, tmp_path / "run", steps=2))
    with pytest.raises(ValueError, match=r"holds a run with other options \(learning_rate=0.003, warmup=2\)"):
        loop.train(config(corpus, tmp_path / "run", steps=3, learning_rate=1e-2, warmup=1))
    with pytest.raises(ValueError, match=r"steps: expected at least 2, as .*/run has, got 1"):
        loop.train(config(corpus, tmp_path / "run", steps=1))
    (corpus / "more.txt").write_text("more")
    with pytest.raises(ValueError, match=r"other options \(files\)"):
        loop.train(config(corpus, tmp_path / "run", steps=2))
    with pytest.raises(ValueError, match="expected the fields of ByteLMConfig, got depth as well"):
        loop.train(config(corpus, tmp_path / "other", overrides={"depth": 3}))
    with pytest.raises(ValueError, match="are held out at 1"):
        loop.train(config(corpus, tmp_path / "other", heldout=1.0))


def test_names_of_files_may_be_any_bytes(corpus: Path, tmp_path: Path) -> None:
    (corpus / os.fsdecode(b"h\xf6her.txt")).write_text("a name in Latin-1")
    sources = data.find_sources([corpus])
    seed = next(i for i in range(99) if any("her" in s.path.name for s in data.split_sources(sources, 0.2, i)[1]))
    loop.train(config(corpus, tmp_path / "run", steps=1, seed=seed))
    held = data.split_sources(sources, 0.2, seed)[1]
    names = (tmp_path / "run" / "heldout.txt").read_bytes()
    assert names.splitlines() == [os.fsencode(source.path) for source in held]


def test_checkpoints_that_cannot_be_written(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run is told before it computes what it could not keep."""
    loop.train(config(corpus, tmp_path, steps=2))
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("checkpoint"))
    steps: list[int] = []
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/checkpoint'"):
        loop.train(config(corpus, tmp_path, steps=3), lambda now: steps.append(now.step))
    assert not steps


def test_a_log_without_its_checkpoint_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 7}\n')
    with pytest.raises(ValueError, match="holds the log of a run but no checkpoint"):
        loop.train(config(corpus, tmp_path))
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 7}\n'


def test_a_run_inside_of_its_corpus(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own directory, with all that it writes, is not among the files that it goes on with."""
    (corpus / "runs" / "entropy").mkdir(parents=True)
    (corpus / "runs" / "notes.txt").write_text("of the corpus")
    (corpus / "runs" / "entropy" / "notes.txt").write_text("of the run")
    monkeypatch.chdir(corpus)
    options = config(Path(), Path("runs/entropy"), steps=1, overrides=TINY)
    for steps in (1, 2):
        loop.train(replace(options, steps=steps))
    run = loop._Run(replace(options, steps=2), ALONE)
    names = {source.path.name for source in run.train_sources + run.heldout_sources}
    assert len(run.train_sources + run.heldout_sources) == 31
    assert "notes.txt" in names
    assert run.step == 2
    # A folder of a run may be a corpus.
    assert loop._Run(config(corpus, tmp_path), ALONE).step == 0
    with pytest.raises(ValueError, match=r"^out: expected another directory than the paths to train on, got \."):
        loop.train(config(Path(), Path()))


def test_two_runs_in_one_directory(corpus: Path, tmp_path: Path) -> None:
    """The second one is refused and the first one goes on; the lock ends with a run, however that ends."""
    options = config(corpus, tmp_path / "run", steps=3, checkpoint_every=1)

    def second(now: loop.Progress) -> None:
        with pytest.raises(ValueError, match=r"^out: another process is writing to .*/run: wait for it"):
            loop.train(options)

    loop.train(options, second)
    assert train_state.latest(tmp_path / "run" / "checkpoint").name == "3"
    with pytest.raises(ZeroDivisionError):
        loop.train(replace(options, steps=5), lambda now: 1 // 0)
    loop.train(replace(options, steps=5))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> Callable[[int, int], None]:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", fail(errno.EOPNOTSUPP))
    with _files.locked(tmp_path / "new", "out"):
        assert (tmp_path / "new").is_dir()
    monkeypatch.setattr(fcntl, "flock", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), _files.locked(tmp_path / "new", "out"):
        pass


def test_the_patcher_may_be_a_directory(tmp_path: Path) -> None:
    bundled = ByteLM.bundled()
    bundled.save_pretrained(tmp_path)
    model = build_model(TrainConfig("blt", [], tmp_path, patcher=tmp_path))
    assert model.config.threshold == bundled.config.threshold
    assert all(torch.equal(a, b) for a, b in zip(model.patcher.parameters(), bundled.parameters(), strict=True))


BEGINNINGS = {
    "entropy": TINY,
    "blt": {"encoder": TINY, "global_transformer": {**TINY, "dim": 48}, "decoder": TINY, "ngram_vocab": 64},
    "megabyte": {"global_transformer": {**TINY, "dim": 48}, "local_transformer": TINY, "patch_size": 3},
}


@pytest.mark.parametrize("model", BEGINNINGS)
def test_a_run_begins_as_a_model(model: str, corpus: Path, tmp_path: Path) -> None:
    """It has the model's configuration and weights in fp32; the file stays as it is. A BLT brings its entropy model."""
    own, overrides = tmp_path / "own.safetensors", BEGINNINGS[model]
    begin = build_model(config(corpus, tmp_path, model=model, overrides=overrides))
    if model == "blt":
        begin.config = replace(begin.config, threshold=1.25, monotonic=True)
        with torch.no_grad():
            begin.patcher.lm_head.weight.mul_(0.5)
    begin.save(own, torch.bfloat16)
    stored = own.read_bytes()
    options = config(corpus, tmp_path / "run", model=model, overrides={}, init=own, steps=2, learning_rate=1e-2)
    run = loop._Run(options, ALONE)
    assert run.model.config == begin.config
    for name, value in begin.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value.bfloat16().float())
    loop.train(options)
    assert own.read_bytes() == stored
    trained = load_model(tmp_path / "run" / "model.safetensors")
    if model != "entropy":  # its threshold is chosen anew
        assert trained.config == begin.config
    for name, value in trained.state_dict().items():
        kept = torch.equal(value, begin.state_dict()[name].bfloat16().float())
        assert kept == name.startswith("patcher."), name
    # Options may repeat what the file has, but not contradict it, and the file has to be of the same model.
    repeated = replace(options, overrides=json.loads(json.dumps(overrides)))
    assert build_model(repeated).config == begin.config
    wide = {**TINY, "num_layers": 2}
    name, changes = {
        "entropy": ("num_layers", {"num_layers": 2}),
        "blt": ("decoder", {"decoder": wide}),
        "megabyte": ("local_transformer", {"local_transformer": wide}),
    }[model]
    with pytest.raises(ValueError, match=f"--set {name}: expected .*, as in .*own.safetensors, got "):
        build_model(replace(options, overrides={**overrides, **changes}))
    with pytest.raises(ValueError, match=r"preset 'paper': \w+: expected .*, as in .*own.safetensors, got "):
        build_model(replace(options, preset="paper"))
    other = "entropy" if model != "entropy" else "blt"
    with pytest.raises(
        ValueError, match=f"init: expected a .*, since model is '{other}', got a {type(begin).__name__} in "
    ):
        build_model(replace(options, model=other))


def test_files_of_options_that_change_are_named(corpus: Path, tmp_path: Path) -> None:
    """A run goes on as the model that it began as, or not at all."""

    def save(path: Path, model: str, seed: int = 0, **values: object) -> Path:
        torch.manual_seed(seed)
        overrides = {"blt": {**SMALL_BLT, "patching": "entropy"}, "entropy": TINY}[model]
        build_model(config(corpus, tmp_path, model=model, overrides={**overrides, **values})).save(path)
        return path

    def changed(options: TrainConfig, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            loop._Run(options, ALONE)

    patcher = save(tmp_path / "patcher.safetensors", "entropy", threshold=5.5)
    overrides = {**SMALL_BLT, "patching": "entropy"}
    few = {"model": "blt", "steps": 1, "heldout": 0.0}
    with_patcher = config(corpus, tmp_path / "run", overrides=overrides, patcher=patcher, **few)
    loop._Run(with_patcher, ALONE)
    began = r"safetensors has changed since the run in .*/run began \("
    save(patcher, "entropy", threshold=4.5)
    changed(with_patcher, "^patcher: .*" + began + "patcher.threshold: expected 5.5, got 4.5; threshold: ")
    save(patcher, "entropy", threshold=5.5, rope_theta=100.0)
    changed(with_patcher, "^patcher: .*" + began + "patcher.rope_theta: expected 10000.0, got 100.0")
    save(patcher, "entropy", seed=1, threshold=5.5)
    changed(with_patcher, "^patcher: .*" + began + "other weights")
    save(patcher, "entropy", threshold=5.5)
    loop._Run(with_patcher, ALONE)

    init = save(tmp_path / "init.safetensors", "blt")
    with_init = config(corpus, tmp_path / "begun" / "run", overrides={}, init=init, **few)
    loop._Run(with_init, ALONE)
    save(init, "blt", monotonic=True)
    changed(with_init, "^init: .*" + began + "monotonic: expected False, got True")
    save(init, "blt", encoder={**TINY, "rope_theta": 100.0})
    changed(with_init, "^init: .*" + began + "encoder.rope_theta: expected 500000.0, got 100.0")
    save(init, "blt")
    loop._Run(with_init, ALONE)


def test_a_run_begins_as_a_checkpoint_of_transformers(tmp_path: Path) -> None:
    """It keeps the patcher, or takes another one and its threshold; a patcher alone begins an entropy model."""
    fresh = build_model(TrainConfig("blt", [], tmp_path, overrides=SMALL_CHECKPOINT))
    fresh.config = replace(fresh.config, threshold=1.25)
    fresh.save_pretrained(tmp_path / "blt")
    fresh.patcher.save_pretrained(tmp_path / "entropy")
    begin = build_model(TrainConfig("blt", [], tmp_path, init=tmp_path / "blt"))
    assert begin.config == load_model(tmp_path / "blt").config
    assert begin.config.threshold == 1.25
    assert all(torch.equal(value, begin.state_dict()[name]) for name, value in fresh.state_dict().items())
    assert not any(parameter.requires_grad for parameter in begin.patcher.parameters())
    assert type(build_model(TrainConfig("entropy", [], tmp_path, init=tmp_path / "entropy"))) is ByteLM

    other = ByteLM.from_values({**TINY, "threshold": 0.75})
    other.save(tmp_path / "other.safetensors")
    options = TrainConfig("blt", [], tmp_path, init=tmp_path / "blt", patcher=tmp_path / "other.safetensors")
    begin = build_model(options)
    assert (begin.config.threshold, begin.config.patcher) == (0.75, other.config)
    assert torch.equal(begin.patcher.lm_head.weight, other.lm_head.weight)
    assert not any(parameter.requires_grad for parameter in begin.patcher.parameters())
    assert build_model(replace(options, overrides={"threshold": 2.0})).config.threshold == 2.0
    with pytest.raises(ValueError, match=r"--set threshold: expected 1.25, as in .*, got 2.0"):
        build_model(replace(options, patcher=None, overrides={"threshold": 2.0}))

    fresh.patcher = None
    fresh.config = replace(fresh.config, patcher=None)
    fresh.save(tmp_path / "without.safetensors")
    options = replace(options, init=tmp_path / "without.safetensors")
    assert build_model(options).config.patcher == other.config
    with pytest.raises(ValueError, match=r"patcher: expected an entropy model, since there is none in .*, got None"):
        build_model(replace(options, patcher=None))
    with pytest.raises(ValueError, match="patcher: expected None, since patching is 'space', got "):
        build_model(replace(options, init=None, overrides={"patching": "space"}))
    with pytest.raises(ValueError, match="init_global: expected None beside init, got "):
        replace(options, init_global=tmp_path)
    with pytest.raises(ValueError, match="patcher: expected None, since model is 'entropy', got "):
        replace(options, model="entropy")


SMALL_CHECKPOINT = {
    "encoder": {**TINY, "norm_eps": 1e-5},
    "global_transformer": {"dim": 48, "num_layers": 1, "num_heads": 2, "ffn_dim": 64},
    "decoder": TINY,
    "ngram_vocab": 64,
    "pool_every_layer": True,
    "cross_attn_grouped_heads": True,
}


def test_the_learning_rate_warms_up_and_falls_to_its_end() -> None:
    options = TrainConfig("entropy", [], Path(), steps=100, warmup=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [optimizer.learning_rate(options, step) for step in range(100)]
    assert rates[:11] == pytest.approx([*np.arange(0.1, 1.05, 0.1), 1.0])
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1)


def test_measuring_does_not_count_eos(corpus: Path) -> None:
    sources = data.find_sources([corpus])
    model = ByteLM.from_values(TINY)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    bits, size = measure(model, sources, 256, 64)
    assert bits == pytest.approx(math.log2(260), rel=1e-6)
    assert size == sum(source.size for source in sources)


@pytest.mark.parametrize("heldout", [0.5, 0.0])
def test_the_threshold_makes_patches_of_the_size_asked_for(tmp_path: Path, heldout: float) -> None:
    """They are measured on held-out files, or on those of the training if there are none."""
    generator = np.random.default_rng(0)
    for i in range(12):  # the bytes are random, so that no entropy comes twice
        (tmp_path / f"{i}.bin").write_bytes(generator.integers(97, 123, 300, dtype=np.uint8).tobytes())
    options = config(tmp_path, tmp_path / "run", include=["*.bin"], heldout=heldout, patch_size=3.0, save_bf16=True)
    result = loop.train(options)
    model = ByteLM.load(result.model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    trained, held = data.split_sources(data.find_sources([tmp_path], ["*.bin"]), heldout, 0)
    model = model.float()
    if held:
        # It is saved as it was measured.
        assert measure(model, held, 256, 64)[0] == pytest.approx(result.heldout_bits, rel=1e-6)
    patches = num_bytes = 0
    for tokens, rows in data.heldout_batches(held or trained, 256, 2048):
        patches += int(model.patch(tokens, rows)[1].num_patches)
        num_bytes += len(tokens)
    assert patches == round(num_bytes / 3.0)


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected"):
        TrainConfig("gpt", [], tmp_path)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        TrainConfig("entropy", [], tmp_path, steps=0)
    with pytest.raises(ValueError, match="accumulate: expected at least 1, got 0"):
        TrainConfig("entropy", [], tmp_path, accumulate=0)
    with pytest.raises(ValueError, match="parallel: expected one of 'ddp', 'fsdp', got 'dp'"):
        TrainConfig("entropy", [], tmp_path, parallel="dp")
    with pytest.raises(ValueError, match="ngram: expected split='heldout'"):
        EvalConfig(tmp_path, [], ngram=True)
    with pytest.raises(ValueError, match="split: expected"):
        EvalConfig(tmp_path, [], split="test")


def test_logs_are_json_lines(corpus: Path, tmp_path: Path) -> None:
    loop.train(config(corpus, tmp_path / "run", log_every=3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 5, 6, 9, 10, 12, 12]
    assert set(lines[1]) == {"step", "bits_per_byte", "learning_rate", "bytes_per_second", "seconds"}


def test_the_commands(corpus: Path, tmp_path: Path) -> None:
    """`train` and `eval` from the command line, with the options that the model card names."""
    from typer.testing import CliRunner

    from blt_kernels.cli import app

    out = tmp_path / "run"
    small = [f"--set={key}={value}" for key, value in TINY.items()]
    options = ["--heldout", "0.2", "--include", "*.txt", "--context", "64"]
    steps = ["--steps", "6", "--batch-bytes", "256", "--eval-every", "3", "--bf16", "--out", str(out)]
    runner = CliRunner()
    trained = runner.invoke(app, ["train", "entropy", str(corpus), *options, *steps, *small])
    assert trained.exit_code == 0, trained.output
    assert "step 6/6: " in trained.output
    assert "bytes/s, held out " in trained.output
    assert load_model(out / "model.safetensors").config.dim == 32
    measured = runner.invoke(
        app, ["eval", str(out / "model.safetensors"), str(corpus), *options, "--split", "heldout", "--ngram", "--json"]
    )
    assert measured.exit_code == 0, measured.output
    result = json.loads(measured.output)
    assert 0 < result["ngram_bits_per_byte"] < 8 < result["bits_per_byte"] + 4
    assert f"over {result['num_bytes']:,} bytes" in trained.output
    begin = ["train", "entropy", str(corpus), *options, f"--init={out / 'model.safetensors'}", "--no-tensorboard"]
    begin += ["--steps=3", "--checkpoint-every=1", "--keep=2", f"--out={tmp_path / 'second'}"]
    assert runner.invoke(app, begin).exit_code == 0
    assert {path.name for path in (tmp_path / "second" / "checkpoint").iterdir()} == {"2", "3"}
    contradiction = runner.invoke(app, [*begin, "--set=dim=64"])
    assert contradiction.exit_code == 1
    assert "blt-kernels train: --set dim: expected 32, as in " in contradiction.output
    wrong = runner.invoke(app, ["train", "entropy", str(corpus), "--set", "dim"])
    assert wrong.exit_code == 2
    assert "expected KEY=JSON, got 'dim'" in wrong.output
