"""Damaged and hostile files: every loader refuses them in a clear error, without harm, or works with them.

`tests/fuzz` has the loaders, the mutations and what counts as harm; ``make fuzz`` runs many more cases.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fuzz.children import Case, Files, judge, run
from fuzz.file_mutations import mutated_json
from fuzz.loaders import LOADERS, RefusedError, command
from fuzz.pickle_mutations import CANARY, hostile_pickles, nested_call
from hypothesis import given
from hypothesis import strategies as st
from tiers import slow_unless

from blt_kernels._files import parse_json
from blt_kernels._pickles import check_pickle, check_torch_file

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def files() -> Iterator[Files]:
    made = Files()
    yield made
    made.remove()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_finds(files: Files, loader: str, seeds: range) -> None:
    assert judge(files, Case(loader, ())).kind == "accepted"  # and it imports what the children need
    outcomes = list(run(files, [Case(loader, ()), *(Case.drawn(loader, seed) for seed in seeds)]))
    assert outcomes[0][1].kind == "accepted"
    assert not [(str(case), outcome) for case, outcome in outcomes if outcome.is_find]
    assert len(outcomes) == len(seeds) + 1


@pytest.mark.parametrize("loader", slow_unless(LOADERS, LOADERS.keys() - {"resumed training", "train --set", "log"}))
def test_mutated_files_do_no_harm(files: Files, loader: str) -> None:
    no_finds(files, loader, range(4))


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_more_mutated_files_do_no_harm(files: Files, loader: str) -> None:
    no_finds(files, loader, range(4, 30))


def refused(files: Files, tmp_path: Path, loader: str, change: Callable[[Path], object]) -> str:
    """Return the message of the error for changed files."""
    folder = tmp_path / "case"
    shutil.copytree(files.folder(loader), folder, symlinks=True)
    change(folder)
    with pytest.raises((ValueError, OSError)) as error:
        LOADERS[loader].load(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 4000
    assert not (tmp_path / CANARY).exists()
    return str(error.value).replace(str(folder), "CASE")


def edited(file: str, **changes: object) -> Callable[[Path], None]:
    """Return a function that changes values of a JSON file; names with a point lead into objects."""

    def change(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        for name, value in changes.items():
            *places, last = name.split("__")
            inner = values
            for place in places:
                inner = inner[place]
            inner[last] = value
        (folder / file).write_text(json.dumps(values))

    return change


def piped(file: str) -> Callable[[Path], None]:
    """Return a function that puts a pipe, to which nobody writes, in the place of a file."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return change


def stretched(file: str, size: int = 1 << 40) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, size)


def written(file: str, content: bytes) -> Callable[[Path], int]:
    return lambda folder: (folder / file).write_bytes(content)


def config_of(file: str, **changes: object) -> Callable[[Path], None]:
    """Return a function that changes the configuration in the metadata of a safetensors file."""

    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        config = json.loads(header["__metadata__"]["config"])
        header["__metadata__"]["config"] = json.dumps({**config, **changes})
        raw = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])

    return change


def pickled(content: bytes) -> bytes:
    """Return an archive of torch with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return out.getvalue()


def repacked(method: int, extra: int = 0) -> Callable[[Path], None]:
    """Return a function that writes the archive of weights anew, and a member of zeros with it."""

    def change(folder: Path) -> None:
        file, out = folder / "consolidated.pth", io.BytesIO()
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w", method) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
            new.writestr("consolidated/data/99", bytes(extra))
        file.write_bytes(out.getvalue())

    return change


def outside(folder: Path) -> None:
    """Make an index that leads to a file outside of its folder."""
    shutil.copy(folder / "model-0.safetensors", folder.parent / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-0.safetensors", "../other.safetensors"))


def without_step(folder: Path) -> None:
    """Remove the number of steps of one weight from the metadata of a checkpoint."""
    file = folder / "run" / "checkpoint" / "2" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    del metadata.state_dict_metadata["optimizer.embed_tokens.weight.step"]
    file.write_bytes(pickle.dumps(metadata))


def linked(file: str) -> Callable[[Path], None]:
    """Return a function that puts a file that cannot be read at its start in the place of another."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to("/proc/self/mem")

    return change


def call(name: str, argument: object) -> bytes:
    module, _, what = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{what}\n".encode() + pickle.dumps((argument,), 2)[2:-1] + b"R."


NESTED = b"))\x86q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))  # 2^60 members
DEEP = b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"
LEGACY_HEAD = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
STORAGE = (
    b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu\x8a\x06\0\0\0\0\0\x01tQ"  # 2^40 elements
)
LISTED = b"\x80\x02}q\x00(" + STORAGE + b"K\x00u."
KEYS = b"\x80\x02}" + NESTED + b"K\x00s."
FOUND: list[tuple[str, Callable[[Path], object], str]] = [
    # These waited for a writer.
    ("ByteLM", piped("model.safetensors"), "CASE/model.safetensors: expected a regular file"),
    ("checkpoint", piped("checkpoint/2/values.json"), "expected a regular file"),
    ("checkpoint", piped("checkpoint/2/.metadata"), "expected a regular file"),
    ("checkpoint", piped("checkpoint/2/__0_0.distcp"), "expected a regular file"),
    ("stored patches", piped("stored/index.json"), "no index of stored patches"),
    ("patch --save", piped("stored/patches.bits"), "expected a regular file"),
    ("log", piped("log.jsonl"), "expected a regular file"),
    # These took all memory, or read a terabyte.
    ("transformers", stretched("config.json"), "CASE/config.json: expected at most 33,554,432 bytes"),
    ("log", stretched("log.jsonl"), r"expected at most [\d,]+ bytes"),
    ("tokenizer", stretched("tokenizer.json"), r"expected at most [\d,]+ bytes"),
    ("stored patches", stretched("stored/patches.bits"), "patches.bits is damaged"),
    ("ByteLM", config_of("model.safetensors", num_layers=10**9), "expected weights of 1,000,000,000 layers, got"),
    ("transformers", edited("config.json", global_config__num_hidden_layers=10**9), "expected weights of 1,0.* layers"),
    ("train --init-global", edited("config.json", intermediate_size=1 << 40), "does not fit the global transformer"),
    ("train --init-global", edited("config.json", num_hidden_layers=10**9), "expected weights of 1,0.* layers"),
    ("bytelatent, .pth", repacked(zipfile.ZIP_DEFLATED, 1 << 22), "a compressed archive, and torch writes none"),
    ("bytelatent, .pth", written("consolidated.pth", pickled(call("builtins.bytearray", 1 << 36))), "bytearray"),
    ("bytelatent, .pth", written("consolidated.pth", pickled(call("torch.FloatTensor", 1 << 40))), "FloatTensor"),
    ("bytelatent, .pth", written("consolidated.pth", pickled(LISTED)), "storage '0' has 0 bytes"),
    ("bytelatent, .pth", written("consolidated.pth", LEGACY_HEAD + b"\x80\x02" + STORAGE + b"."), "storages of 4,"),
    ("bytelatent, .pth", written("consolidated.pth", pickled(nested_call("builtins", "bytearray", 1 << 36))), "call"),
    # These took hours.
    ("bytelatent, .pth", written("consolidated.pth", pickled(KEYS)), "tuples in each other"),
    # These ran code.
    *[
        ("checkpoint", lambda folder, i=i: (folder / "checkpoint/2/.metadata").write_bytes(
            hostile_pickles(folder / "checkpoint/2/.metadata")[i]), "the checkpoint is damaged")
        for i in range(12)
    ],
    # These read another file, or raised another class of error, or one without the file or with pages of text.
    ("transformers, shards", outside, "expected names of files in its folder, got '../other.safetensors'"),
    ("transformers", written("config.json", DEEP), "CASE/config.json: expected JSON, got objects and lists in each"),
    ("stored patches", written("stored/index.json", DEEP), "index.json is no index of stored patches"),
    ("log", written("log.jsonl", DEEP + b"\n"), "expected a JSON object with a step in line 1, got "),
    ("log", written("log.jsonl", b'{"step": 1, "bits_per_byte": null}\n'), "expected numbers in line 1"),
    ("transformers", edited("config.json", patcher_config__rms_norm_eps="x" * 10**5), "expected float, got 'xx"),
    ("texts", linked("empty"), "CASE/empty"),
    ("patch --save", linked("stored/patches.bits"), "CASE/stored"),
    ("ByteLM", config_of("model.safetensors", dim=2**62), "expected sizes that tensors can have"),
    ("ByteLM", config_of("model.safetensors", rope_theta=2**64, norm_eps=-1.0), "norm_eps: expected a value from 0"),
    ("ByteLM", config_of("model.safetensors", norm_eps=2**64), "norm_eps: expected a value from 0 to"),
    ("transformers", edited("config.json", decoder_config__rope_parameters={"rope_type": "x" * 10**5}), "rope_type: "),
    ("ByteLM", config_of("model.safetensors", rope_scaling=["8", 1, 4, 9]), "rope_scaling: expected a number, got '8'"),
    ("bytelatent, .pth", edited("params.json", model__ffn_dim_multiplier=float("inf")), "a number that gives a width"),
    ("bytelatent, .pth", edited("params.json", model__dim_global=1 << 64), "dim_global: expected a number of 64 bits"),
    ("resumed training", without_step, "the checkpoint is damaged: the optimiser's state of embed_tokens.weight"),
    ("checkpoint", edited("checkpoint/2/values.json", step=-5), "expected a number of steps as step"),
    ("checkpoint", edited("checkpoint/2/values.json", options__steps="3"), "a number of steps as options.steps"),
    ("patch --save", edited("stored/index.json", made_with__patching="x" * 10**5), "holds patches of something else"),
    ("hub cache", written("models--owner--blt/refs/main", b"\xff"), "the cache of the hub is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("loader", "change", "message"), FOUND, ids=map(str, range(len(FOUND))))
def test_what_was_found(files: Files, tmp_path: Path, loader: str, change: Callable, message: str) -> None:
    got = refused(files, tmp_path, loader, change)
    assert re.search(message, got), got


def test_names_send_nothing_to_a_terminal(tmp_path: Path) -> None:
    """The command line shows control characters as escapes."""
    with pytest.raises(RefusedError, match=re.escape("\\x1b[2J")):
        command("patch FOLDER", tmp_path / "\x1b[2J")


def test_pickles_of_torch_pass(tmp_path: Path) -> None:
    state = {
        "model": {
            "a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
            "c": torch.ones(2).to(torch.float8_e4m3fn), "d": torch.ones(4).expand(3, 4),
        },
        "optim": {"param_groups": [{"betas": (0.9, 0.95), "lr": 1e-3, "params": [0, 1]}], "step": 3, "name": "adam"},
    }  # fmt: skip
    torch.save(state, tmp_path / "x.pth")
    with (tmp_path / "x.pth").open("rb") as file:
        check_torch_file(file, (tmp_path / "x.pth").stat().st_size)


@given(st.binary(max_size=200), st.integers(0, 50))
def test_no_pickle_is_more_than_refused(content: bytes, at: int) -> None:
    """Any bytes in and around a pickle are refused by ValueError, or are a pickle."""
    whole = pickle.dumps({"model": {"a": (1, 2.5, "x")}}, 2)
    for candidate in (content, whole[:at] + content + whole[at:]):
        try:
            check_pickle(io.BytesIO(candidate), len(candidate))
        except ValueError:
            continue


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(VALUES, st.integers(0, 1 << 32))
def test_json_is_parsed_or_refused(value: object, seed: int) -> None:
    """JSON and what is almost JSON are parsed or refused by ValueError."""
    text = json.dumps(value)
    assert repr(parse_json(text)) == repr(json.loads(text))
    try:
        parse_json(mutated_json(text, random.Random(seed)))
    except ValueError:
        return
