"""Patches of pieces, computed in training or stored ahead of it: bitwise the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blt_kernels.cli.patch.rules import Rules, Scheme
from blt_kernels.cli.patch.save import patching_model
from blt_kernels.layout import PatchLayout
from blt_kernels.models import BLT, BLTConfig, ByteLM, load_model
from blt_kernels.models.config import SCHEMES
from blt_kernels.train import data, loop, row_patches, save_patches
from blt_kernels.train.build import build_model
from blt_kernels.train.config import TrainConfig
from blt_kernels.train.parallel import Ranks
from blt_kernels.train.row_patches import RowPatches
from blt_kernels.train.stored_patches import StoredPatches, provenance

ALONE = Ranks(torch.device("cpu"))
LOCAL = {"dim": 16, "num_layers": 1, "num_heads": 1, "ffn_dim": 16, "window": 16}
MODEL: dict[str, Any] = {
    "encoder": LOCAL,
    "global_transformer": {"dim": 32, "num_layers": 1, "num_heads": 1, "ffn_dim": 16},
    "decoder": LOCAL,
    "ngram_vocab": 16,
}
CONTEXT = 50
RULES: dict[str, dict[str, Any]] = {
    "threshold": {},
    "monotonic": {"monotonic": True, "threshold": 0.3},
    "threshold_add": {"threshold_add": 0.2},
    "max_patch_length": {"max_patch_length": 4},
    "whole_characters": {"whole_characters": True},
    "reset_at_newlines": {"reset_at_newlines": True},
    "space": {"patching": "space"},
    "static": {"patching": "static", "patch_size": 3},
    "byte": {"patching": "byte"},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return files of several pieces, of one, and of less."""
    root = tmp_path / "corpus"
    root.mkdir()
    generator = np.random.default_rng(0)
    for i in range(14):
        words = generator.choice(["quick", "brown", "fox", "jumps", "höher", "als\n", "1234"], 3 + 4 * i)
        (root / f"{i}.txt").write_text(f"{i}: " + " ".join(words))
    (root / "x.txt").write_text("x")
    return root


@pytest.fixture
def patcher(tmp_path: Path) -> Path:
    """Return an entropy model whose threshold is the median of its entropies."""
    path = tmp_path / "patcher.safetensors"
    torch.manual_seed(1)
    model = ByteLM.from_values({**LOCAL, "window": 8})
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    entropy, _ = model.patch(torch.randint(4, 260, (2000,)))
    model.config = replace(model.config, threshold=float(entropy.detach().median()))
    model.save(path)
    return path


def config(corpus: Path, out: Path, patcher: Path | None, **changes: Any) -> TrainConfig:
    overrides = {**MODEL, **changes.pop("rule", {})}
    options = {"steps": 8, "batch_bytes": 170, "context": CONTEXT, "heldout": 0.2, "warmup": 2, "eval_every": 4}
    options |= {"log_every": 1, "tensorboard": False, "overrides": overrides, "paths": [corpus], "out": out}
    return TrainConfig("blt", patcher=patcher, **{**options, **changes})


def blt(patcher: Path | None, **rule: Any) -> BLT:
    """Return the model of `config`."""
    torch.manual_seed(0)
    return build_model(config(Path(), Path(), patcher, rule=rule))


def store(corpus: Path, folder: Path, model: BLT, **options: Any) -> StoredPatches:
    save_patches.save(folder, data.find_sources([corpus]), model, CONTEXT, **options)
    return StoredPatches(folder)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_found_in_their_pieces(corpus: Path) -> None:
    """Wherever a batch ends, at every context: the smallest one, and one of whole files."""
    sources = data.find_sources([corpus])
    for context, batch_bytes in ((2, 3), (3, 7), (50, 60), (50, 41), (1000, 100)):
        batches = data.PackedBatches(sources, batch_bytes, context, seed=0)
        number = {source.digest: i for i, source in enumerate(sources)}
        pieces = {(batches.source[i], batches.start[i], batches.length[i]) for i in range(len(batches.length))}
        assert data.num_ids(sources, context) == batches.length.sum()
        for step in range(batches.batches_per_epoch):
            for row in batches.rows(step):
                piece = data.piece_of(row, context)
                assert piece.start <= row.start
                assert row.start + row.length <= piece.start + piece.length
                assert (number[piece.source.digest], piece.start, piece.length) in pieces


def same_layout(one: PatchLayout, two: PatchLayout) -> None:
    for field in fields(PatchLayout):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), field.name


@pytest.mark.parametrize("name", RULES)
def test_rows_have_the_patches_of_their_pieces(name: str, corpus: Path, patcher: Path) -> None:
    """A whole piece has the patches that the model gives it alone; a part of one those that lie in it."""
    model = blt(patcher if "patching" not in RULES[name] else None, **RULES[name])
    computed = RowPatches(model, CONTEXT)
    ahead = RowPatches(model, CONTEXT, stored=store(corpus, corpus.parent / "patches", model))
    batches, parts = data.PackedBatches(data.find_sources([corpus]), 170, CONTEXT, seed=0), 0
    for step in range(batches.batches_per_epoch - 3, batches.batches_per_epoch + 3):
        rows = batches.rows(step)
        layout = computed.layout(rows)
        _, offsets = data.read_rows(rows)
        starts_after = layout.decode_ids == layout.patch_ids
        same_layout(layout, PatchLayout.from_cuts(starts_after, offsets).compact())
        same_layout(layout, ahead.layout(rows))
        for row, a, b in zip(rows, offsets, offsets[1:], strict=False):
            piece = data.piece_of(row, CONTEXT)
            alone = model.patch(*data.read_rows([piece]))
            same_layout(ahead.layout([piece]), alone)
            expected = (alone.decode_ids == alone.patch_ids)[row.start - piece.start :][: row.length].clone()
            expected[0] = True
            assert torch.equal(starts_after[a:b], expected)
            parts += row.length < piece.length
    assert parts > 6
    assert computed.layout([]).num_bytes == ahead.layout([]).num_bytes == 0


def test_a_batch_does_not_move_boundaries(corpus: Path, patcher: Path) -> None:
    """Even where every threshold lies at an entropy: the model gets a piece alone, in whatever batch it comes."""
    rows = next(data.heldout_rows(data.find_sources([corpus]), 1 << 20, CONTEXT))
    model = blt(patcher)
    entropy = [model.patcher.patch(*data.read_rows([row]))[0] for row in rows]
    for row, own in zip(rows[::7], entropy[::7], strict=True):
        for threshold in own[1::8].tolist():
            model.config = replace(model.config, threshold=threshold)
            (alone,) = row_patches.cut_pieces(model, [row], bf16=False)
            assert np.array_equal(alone[1:], (own > threshold)[1:].numpy())
            both = RowPatches(model, CONTEXT).layout([rows[3], row, rows[1]])
            a, b = both.cu_seqlens[1:3]
            assert np.array_equal((both.decode_ids == both.patch_ids)[a:b].numpy(), alone)


def test_pieces_of_a_call(corpus: Path) -> None:
    """The CPU computes each piece alone; other devices compute as many as fit."""
    (rows,) = data.heldout_rows(data.find_sources([corpus]), 1 << 20, CONTEXT)
    assert list(data.group_rows(rows, 1)) == [[row] for row in rows]
    calls = list(data.group_rows(rows, 120))
    assert [row for call in calls for row in call] == rows
    sizes = [sum(row.length for row in call) for call in calls]
    assert max(sizes) <= 120 < min(a + b[0].length for a, b in zip(sizes, calls[1:], strict=False))
    assert list(data.group_rows([], 120)) == []


def test_a_piece_that_a_batch_cuts_is_computed_once(
    corpus: Path, patcher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[data.Row] = []
    cut = row_patches.cut_pieces
    monkeypatch.setattr(
        row_patches, "cut_pieces", lambda model, pieces, bf16: (computed.extend(pieces), cut(model, pieces, bf16))[1]
    )
    patches = RowPatches(blt(patcher), CONTEXT)
    batches, lone = data.PackedBatches(data.find_sources([corpus]), 70, CONTEXT, seed=0), 0
    for step in range(batches.batches_per_epoch):
        for part in range(2):
            rows = batches.rows(step, part, 2)
            patches.layout(rows)
            lone += sum(row.length == 1 for row in rows)  # their text does not show which piece they end
    assert len(computed) <= len(batches.length) + lone
    assert len(set(computed)) >= len(batches.length) - 2


def test_every_field_of_the_configuration_is_of_the_rule_or_not() -> None:
    """A new field that moves boundaries must be added to `patch_rule`; any other to this list."""
    of_the_rule = {name for scheme in SCHEMES for name in BLTConfig(patching=scheme).patch_rule}
    others = {"encoder", "global_transformer", "decoder", "patcher", "vocab_size", "queries_per_patch", "ngram_sizes"}
    others |= {"ngram_vocab", "num_functions", "cross_attn_heads", "split_documents", "pool_every_layer"}
    others |= {"cross_attn_all_layers_encoder", "cross_attn_all_layers_decoder", "cross_attn_grouped_heads"}
    others |= {"cross_attn_window_encoder", "cross_attn_window_decoder", "global_across_documents", "eos_id"}
    known = {field.name for field in fields(BLTConfig)}
    assert of_the_rule | others == known
    assert not of_the_rule & others


# --- training ---------------------------------------------------------------------------------------------------------


def trained(options: TrainConfig) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """Return losses of the steps, the held-out loss and the weights."""
    run = loop._Run(options, ALONE)
    losses = [run.advance() for _ in range(options.steps)]
    bits, _ = run._measure(run.heldout_sources)
    return losses, bits, run.model.state_dict()


@pytest.mark.parametrize("name", ["threshold", "threshold_add", "whole_characters", "static"])
def test_training_with_stored_patches_is_bitwise_the_same(
    name: str, corpus: Path, patcher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = patcher if "patching" not in RULES[name] else None
    options = config(corpus, tmp_path / "computed", own, rule=RULES[name], steps=4)
    expected = trained(options)
    store(corpus, tmp_path / "patches", blt(own, **RULES[name]))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("patches were computed")

    monkeypatch.setattr(BLT, "patch", never)
    monkeypatch.setattr(ByteLM, "forward", never)
    losses, bits, weights = trained(replace(options, out=tmp_path / "stored", patches=tmp_path / "patches"))
    assert (losses, bits) == expected[:2]
    assert all(torch.equal(weights[key], value) for key, value in expected[2].items())


def test_bf16_and_micro_batches_too(corpus: Path, patcher: Path, tmp_path: Path) -> None:
    store(corpus, tmp_path / "patches", blt(patcher), bf16=True)
    options = config(corpus, tmp_path / "computed", patcher, bf16=True, accumulate=2, steps=4)
    expected = trained(options)
    losses, bits, weights = trained(replace(options, out=tmp_path / "stored", patches=tmp_path / "patches"))
    assert (losses, bits) == expected[:2]
    assert all(torch.equal(weights[key], value) for key, value in expected[2].items())


def test_a_run_may_change_to_stored_patches_and_back(corpus: Path, patcher: Path, tmp_path: Path) -> None:
    store(corpus, tmp_path / "patches", blt(patcher))
    whole = loop.train(config(corpus, tmp_path / "whole", patcher, steps=6))
    for step, folder in ((2, tmp_path / "patches"), (4, None), (6, tmp_path / "patches")):
        options = config(corpus, tmp_path / "parts", patcher, patches=folder, checkpoint_every=1, steps=6)
        parts = loop._Run(options, ALONE)
        while parts.step < step:
            parts.record(parts.advance(), 1.0)
        result = parts.finish() if step == 6 else None
    one, two = (load_model(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert result.heldout_bits == whole.heldout_bits


def test_what_does_not_match_is_refused_by_name(corpus: Path, patcher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "patches"
    store(corpus, folder, blt(patcher))

    def refused(match: str, *, own: Path = patcher, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            loop.train(config(corpus, tmp_path / "run", own, patches=folder, steps=1, **changes))
        assert not (tmp_path / "run" / "checkpoint").exists()

    refused(r"\(context: expected 40, got 50\)", context=40)
    refused(r"\(bf16: expected True, got False\)", bf16=True)
    refused(r"\(threshold: expected 1.5, got ", rule={"threshold": 1.5})
    refused(r"\(monotonic: expected True, got False\)", rule={"monotonic": True})
    refused(
        r"patching: expected space, got entropy.*threshold: expected None, got ", rule={"patching": "space"}, own=None
    )
    other = ByteLM.load(patcher)
    with torch.no_grad():
        other.norm.weight[3] += 1e-6
    other.save(tmp_path / "other.safetensors")
    refused(r"\(entropy model: expected \w{64}, got \w{64}\)", own=tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="patches: expected None, since model is 'entropy', got "):
        TrainConfig("entropy", [], tmp_path, patches=folder)
    (corpus / "3.txt").write_text("changed")
    refused("has none of .*/3.txt, as the file is now")
    (corpus / "new.txt").write_text("new")
    refused("has none of .* and 1 more, as the file is now")


def test_a_folder_that_is_not_complete_or_damaged_is_refused(corpus: Path, patcher: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "patches", blt(patcher)
    with pytest.raises(FileNotFoundError, match=r"patches: no index.json in .*: blt-kernels patch --save .* makes it"):
        StoredPatches(folder)
    with pytest.raises(StopIteration):
        store(corpus, folder, model, report=stop_after(0))
    with pytest.raises(ValueError, match=r"is not complete: start blt-kernels patch --save .* again"):
        StoredPatches(folder)
    stored = store(corpus, folder, model)
    assert isinstance(stored.bits, np.memmap)
    assert (
        stored.bits.nbytes
        == (folder / "patches.bits").stat().st_size
        < data.num_ids(data.find_sources([corpus]), CONTEXT) / 6
    )
    content = (folder / "patches.bits").read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 128])):
        (folder / "patches.bits").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"patches.bits is damaged: it is not what index.json describes"):
            StoredPatches(folder)
    (folder / "patches.bits").write_bytes(content)
    whole = json.loads((folder / "index.json").read_text())
    files = whole["files"]
    longest = max(range(len(files)), key=lambda i: files[i]["size"])
    for size, error in (
        (files[longest]["size"] + 16, r"index.json is damaged: files of these sizes have [\d,]+ bytes of patches"),
        ((1 << 48) - 1, r"index.json is damaged: files of these sizes have [\d,]+ or more bytes of patches"),
        (files[longest]["size"] ^ 1, r"index.json is damaged: the size of .*\.txt: expected \d+, got \d+"),
    ):
        changed = [{**file, "size": size if i == longest else file["size"]} for i, file in enumerate(files)]
        (folder / "index.json").write_text(json.dumps({**whole, "files": changed}))
        with pytest.raises(ValueError, match=error):
            StoredPatches(folder).check(whole["made_with"], data.find_sources([corpus]))
        with pytest.raises(ValueError, match=r"holds patches of something else \(files\)"):
            store(corpus, folder, model)
    others = [{**whole, "files": []}, {**whole, "files": [files[0], files[0]]}]
    others += [{**whole, "files": [{**files[0], "size": 1 << 70}]}, {**whole, "made_with": {"context": 1 << 70}}]
    others += [{**whole, "format": 2}, {**whole, "made_with": {}}, {**whole, "made_with": {"context": 1}}]
    others += [{**whole, "files": [{}]}, {**whole, "files": [{"size": "1"}]}, {**whole, "files": [{"size": 1}]}]
    for index in ("", "[]", '{"format": 1}', *map(json.dumps, others)):
        (folder / "index.json").write_text(index)
        with pytest.raises(ValueError, match=r"index.json is no index of stored patches of format 1"):
            StoredPatches(folder)


# --- saving -----------------------------------------------------------------------------------------------------------


def stop_after(reports: int) -> Any:
    left = iter(range(reports))
    return lambda ids: next(left)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_saving_goes_on_where_it_was_stopped(
    corpus: Path, patcher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_patches, "_BLOCK_IDS", 4 * CONTEXT)
    model = blt(patcher)
    store(corpus, tmp_path / "whole", model)
    cut, computed = save_patches.cut_pieces, []
    monkeypatch.setattr(save_patches, "cut_pieces", lambda *args: (computed.append(args[1]), cut(*args))[1])
    for stops in range(4):
        with pytest.raises(StopIteration):
            store(corpus, tmp_path / "parts", model, report=stop_after(2))
        assert len(computed) == 2 * (stops + 1)
    reports: list[int] = []
    store(corpus, tmp_path / "parts", model, report=reports.append)
    assert sum(reports) == data.num_ids(data.find_sources([corpus]), CONTEXT)
    assert len({row for rows in computed for row in rows}) == sum(map(len, computed))  # nothing was computed twice
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    store(corpus, tmp_path / "parts", model, report=reports.append)
    assert reports[-1] == sum(reports[:-1])
    # A mark says nothing where the patches are gone.
    with pytest.raises(StopIteration):
        store(corpus, tmp_path / "lost", model, report=stop_after(2))
    (tmp_path / "lost" / "patches.bits").unlink()
    store(corpus, tmp_path / "lost", model)
    assert contents(tmp_path / "lost") == contents(tmp_path / "whole")
    # Marks that are gone when all is done are not missed.
    store(
        corpus, tmp_path / "unmarked", model, report=lambda _: (tmp_path / "unmarked" / "done").unlink(missing_ok=True)
    )
    assert contents(tmp_path / "unmarked") == contents(tmp_path / "whole")


def test_patches_that_are_lost_or_damaged_are_made_anew(corpus: Path, patcher: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "patches", blt(patcher)
    store(corpus, folder, model)
    whole, bits = contents(folder), folder / "patches.bits"
    for content in (None, b"", whole["patches.bits"][:-1], whole["patches.bits"][:-1] + b"\x55"):
        bits.unlink() if content is None else bits.write_bytes(content)
        (folder / "done").write_bytes(b"\1" * 100)  # these are marks of the first time
        reports: list[int] = []
        store(corpus, folder, model, report=reports.append)
        assert reports[0] == 0 < sum(reports)
        assert contents(folder) == whole


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_file_that_changes_while_its_patches_are_stored(
    moment: str, corpus: Path, patcher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same size. What is stored is of the very bytes with the digest that is stored."""
    monkeypatch.setattr(save_patches, "_BLOCK_IDS", 4 * CONTEXT)
    folder, model, sources = tmp_path / "patches", blt(patcher), data.find_sources([corpus])
    path = sources[-1].path
    content = path.read_bytes()

    def change(ids: int = 0) -> None:
        path.write_bytes(content[:-1] + b"\0")

    if moment == "before":
        change()
    with pytest.raises(ValueError, match=f"^{path}: the file has changed while patches were stored"):
        save_patches.save(folder, sources, model, CONTEXT, report=change)
    with pytest.raises((ValueError, FileNotFoundError), match=r"no index.json in|is not complete"):
        StoredPatches(folder)
    path.write_bytes(content)
    store(corpus, folder, model)
    store(corpus, tmp_path / "whole", model)
    assert contents(folder) == contents(tmp_path / "whole")


def test_two_processes_in_one_folder(corpus: Path, patcher: Path, tmp_path: Path) -> None:
    """The second one is refused and the first one goes on."""

    def second(ids: int) -> None:
        with pytest.raises(ValueError, match=r"^save: another process is writing to .*/patches: wait for it"):
            store(corpus, tmp_path / "patches", blt(patcher))

    store(corpus, tmp_path / "patches", blt(patcher), report=second)


def test_a_folder_of_something_else_is_not_overwritten(corpus: Path, patcher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "patches"
    store(corpus, folder, blt(patcher))
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds patches of something else \(max_patch_length=None\)"):
        store(corpus, folder, blt(patcher, max_patch_length=4))
    (corpus / "new.txt").write_text("new")
    with pytest.raises(ValueError, match=r"holds patches of something else \(files\)"):
        store(corpus, folder, blt(patcher))
    assert contents(folder) == before


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_stored_patches import save_slowly
if __name__ == "__main__":
    save_slowly(*map(Path, sys.argv[2:]))
"""


def save_slowly(corpus: Path, patcher: Path, folder: Path) -> None:
    save_patches._BLOCK_IDS = 4 * CONTEXT
    store(corpus, folder, blt(patcher), processes=2, report=lambda ids: (print(ids, flush=True), time.sleep(0.05)))


@pytest.mark.slow
def test_killed_on_two_processes_and_finished_on_one(
    corpus: Path, patcher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_patches, "_BLOCK_IDS", 4 * CONTEXT)
    store(corpus, tmp_path / "whole", blt(patcher))
    script = tmp_path / "child.py"
    script.write_text(_CHILD)
    command = [sys.executable, script, Path(__file__).parent, corpus, patcher, tmp_path / "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert [int(process.stdout.readline()) > 0 for _ in range(4)] == [False, True, True, True]
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # it ends when the workers, which hold it too, have ended
    marks = (tmp_path / "killed" / "done").read_bytes()
    assert 3 <= marks.count(1) <= 4
    store(corpus, tmp_path / "killed", blt(patcher))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_an_error_of_a_process_is_told(corpus: Path, patcher: Path, tmp_path: Path) -> None:
    sources = data.find_sources([corpus])
    sources[0].path.write_bytes(b"")
    with pytest.raises(ValueError, match="has become shorter"):
        save_patches.save(tmp_path / "patches", sources, blt(patcher), CONTEXT, processes=1)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_model_of_the_command_patches_as_the_trained_one(patcher: Path) -> None:
    for rules, rule in (
        (Rules(), {}),
        (
            Rules(threshold=1.5, threshold_add=0.2, max_patch_length=9),
            {"threshold": 1.5, "threshold_add": 0.2, "max_patch_length": 9},
        ),
        (Rules(Scheme.space), {"patching": "space"}),
        (Rules(Scheme.static), {"patching": "static"}),
        (Rules(Scheme.static, patch_size=7), {"patching": "static", "patch_size": 7}),
        (Rules(Scheme.byte, whole_characters=True), {"patching": "byte", "whole_characters": True}),
        (Rules(reset_at_newlines=True), {"reset_at_newlines": True}),
    ):
        path = patcher if "patching" not in rule else None
        assert provenance(patching_model(rules, path), 50, True) == provenance(blt(path, **rule), 50, True)
    model = blt(patcher, threshold=1.25)
    model.save(patcher.parent / "blt.safetensors")  # the patcher in it will do
    assert provenance(patching_model(Rules(), patcher.parent / "blt.safetensors"), 50, False) == provenance(
        model, 50, False
    )
    blt(None, patching="space").save(patcher.parent / "space.safetensors")
    with pytest.raises(
        ValueError, match=r"model: expected a BLT with a patcher, got one without in .*space.safetensor"
    ):
        patching_model(Rules(), patcher.parent / "space.safetensors")
    with pytest.raises(ValueError, match="--scheme topk: expected one of entropy, space, static, byte, since --save"):
        patching_model(Rules(Scheme.topk), None)
    with pytest.raises(ValueError, match=r"--target-size 4.0: expected --threshold beside --save"):
        patching_model(Rules(target_size=4.0), None)
    with pytest.raises(ValueError, match=r"--model .*: expected --scheme entropy"):
        patching_model(Rules(Scheme.space), patcher)


def test_patch_save_then_train(corpus: Path, patcher: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from blt_kernels.cli import app

    runner, folder = CliRunner(), tmp_path / "patches"
    shared = ["--include", "*.txt", "--context", "50"]
    saving = ["patch", "--save", str(folder), str(corpus), "--model", str(patcher), *shared]
    saved = runner.invoke(app, saving)
    assert saved.exit_code == 0, saved.output
    assert f"patches: {folder}" in saved.output.replace("\n", "")
    assert " in 15 files, " in saved.output
    assert "15 files, all of them stored before" in runner.invoke(app, saving).output
    settings = [f"--set={key}={json.dumps(value)}" for key, value in MODEL.items()]
    options = ["--steps=2", "--batch-bytes=170", f"--out={tmp_path / 'run'}", "--no-tensorboard", *settings, *shared]
    trained = runner.invoke(app, ["train", "blt", str(corpus), f"--patcher={patcher}", f"--patches={folder}", *options])
    assert trained.exit_code == 0, trained.output
    for arguments, error in (
        ([*saving, "--json"], "patch: --json: expected none beside --save"),
        ([*saving, "--max-show", "3"], "patch: --max-show: expected none beside --save"),
        ([*saving, "--context", "1"], "patch: --context: expected at least 2, got 1"),
        (
            ["patch", "--save", str(corpus), str(corpus), *shared],
            f"patch: --save {corpus}: expected a folder outside of {corpus}",
        ),
        (
            ["patch", "--save", str(corpus / "new"), str(corpus / "1.txt"), f"{corpus}/../corpus", *shared],
            f"patch: --save {corpus / 'new'}: expected a folder outside of {corpus}/../corpus",
        ),
        ([*saving, "--processes", "0"], "patch: --processes 0: expected at least 1"),
        ([*saving, "--threshold", "1"], "(threshold="),
        (["patch", str(corpus / "1.txt"), "--processes", "2"], "patch: --processes: expected --save beside it"),
        (
            ["train", "blt", str(corpus), *options, f"--out={tmp_path / 'new'}", f"--patches={tmp_path}"],
            "no index.json in",
        ),
    ):
        wrong = runner.invoke(app, arguments)
        assert wrong.exit_code == 1
        assert error in wrong.output.replace("\n", " ")
        assert len(wrong.output.splitlines()) == 1
