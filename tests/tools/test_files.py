"""Files are written whole or not at all, on a full disk too, whoever writes them."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from blt_kernels import _nvrtc
from blt_kernels._files import locked, whole_file, write_text
from blt_kernels.models import BLT, BLTConfig, ByteLM, ByteLMConfig, load_model
from blt_kernels.nn import TransformerConfig
from blt_kernels.train import log as train_log
from blt_kernels.train import state as train_state
from blt_kernels.train import stored_patches
from blt_kernels.train.parallel import Ranks

safetensors = pytest.importorskip("safetensors.torch")

LOCAL = TransformerConfig(16, 1, 2, ffn_dim=16)


@contextmanager
def full_disk(size: int = 1000) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def byte_lm() -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(ByteLMConfig(16, 1, 2, ffn_dim=16, window=8))


def blt() -> BLT:
    torch.manual_seed(0)
    return BLT(BLTConfig(LOCAL, TransformerConfig(32, 1, 2, ffn_dim=16), LOCAL, byte_lm().config, ngram_vocab=7))


def tied() -> ByteLM:
    model = byte_lm()
    model.lm_head.weight = model.embed_tokens.weight
    return model


def save_checkpoint(folder: Path, values: dict[str, str] | None = None) -> None:
    model = byte_lm()
    optimizer = torch.optim.SGD(model.parameters())
    train_state.save(folder / "checkpoint", 3, model, optimizer, values or {}, Ranks(torch.device("cpu")))


def draw(folder: Path) -> None:
    (folder / "log.jsonl").write_text('{"step": 1, "bits_per_byte": 8.0}\n')
    train_log.draw_curve(folder / "log.jsonl", folder / "loss.png")


WRITERS: dict[str, Callable[[Path], object]] = {
    "save": lambda folder: byte_lm().save(folder / "model.safetensors"),
    "save_pretrained": lambda folder: blt().save_pretrained(folder),
    "text": lambda folder: write_text(folder / "page.html", "x" * 2000),
    "cache": lambda folder: _nvrtc._write(folder / "kernel.cubin", b"x" * 2000),
    "training": save_checkpoint,
    "numbers of training": lambda folder: save_checkpoint(folder, {"options": "x" * 2000}),
    "index of patches": lambda folder: stored_patches.write_index(folder, {"files": ["x" * 2000]}),
    "curve": draw,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_nothing_new(writer: str, tmp_path: Path) -> None:
    WRITERS[writer](tmp_path)  # this imports what it needs, and shows that it writes
    written = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert written
    before = {file: file.read_bytes() for file in written}
    if writer.endswith("training"):  # a checkpoint of this step is there, and would not be written again
        (tmp_path / "checkpoint" / "3").rename(tmp_path / "moved")
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with full_disk():
        if writer == "cache":  # without a cache the next process compiles again
            WRITERS[writer](tmp_path)
        else:
            with pytest.raises(OSError):
                WRITERS[writer](tmp_path)
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.parametrize("size", [1, 600, 1100, 2500, 5000, 12000])
def test_a_checkpoint_says_why_it_cannot_be_written(size: int, tmp_path: Path) -> None:
    """torch's zip writer turns some errors of the file system into others."""
    with pytest.raises(OSError, match="File too large"), full_disk(size):
        save_checkpoint(tmp_path)
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert train_state._reason(error).startswith("a write failed, as on a full disk: ")


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with whole_file(path) as part:
            part.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    (tmp_path / "link").symlink_to(path)
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert path.read_text() == "new"
    write_text(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match="expected a regular file"):
        byte_lm().save("/dev/null")
    assert not Path("/dev/null").is_file()


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    """By the next one that writes the same file or locks the folder, unless the process is still alive."""
    left, alive = tmp_path / "file.abcd_123.part", tmp_path / "file.x2345678.part"
    others = [tmp_path / name for name in ("file.part", "file.abcd_1234.part", "other.abcd_123.part")]
    for folder in (left, alive, *others):
        folder.mkdir()
        (folder / ".tmp1234").write_text("of safetensors")
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write_text(tmp_path / "file", "new")
    assert not left.exists()
    assert all(folder.exists() for folder in (alive, *others))
    os.close(descriptor)
    with locked(tmp_path, "out"):
        assert {path.name for path in tmp_path.iterdir()} == {"file", "lock", "file.part", "file.abcd_1234.part"}


def test_errors_name_the_file(tmp_path: Path) -> None:
    """A write to an open file has an error without a name, and no user knows the file beside the old one."""
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(OSError) as caught, full_disk(), whole_file(path) as part:
        part.write_bytes(b"x" * 2000)
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "no" / "file", "new")
    assert caught.value.filename == str(tmp_path / "no" / "file")
    with pytest.raises(FileNotFoundError) as caught, whole_file(path):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")


@pytest.mark.parametrize("write", ["save", "save_pretrained"])
def test_tied_weights_are_written_under_both_names(write: str, tmp_path: Path) -> None:
    model, path = tied(), tmp_path / "model.safetensors"
    getattr(model, write)(path if write == "save" else tmp_path)
    assert not list(tmp_path.glob("*.part"))
    stored = safetensors.load_file(path)
    assert stored.keys() == model.state_dict().keys()
    loaded = load_model(path) if write == "save" else ByteLM.from_pretrained(tmp_path)
    tokens = torch.arange(4, 40)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.lm_head.weight.data_ptr() != loaded.embed_tokens.weight.data_ptr()


def test_parts_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    model = byte_lm()
    rows = model.embed_tokens.weight.shape[0]
    both = nn.Parameter(torch.randn(rows + 5, 16))
    model.embed_tokens.weight = nn.Parameter(both.data[:rows])
    model.lm_head.weight = nn.Parameter(both.data[5:])  # it overlaps the other
    model.save(tmp_path / "model.safetensors")
    loaded = ByteLM.load(tmp_path / "model.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("write", ["save", "save_pretrained"])
def test_a_model_without_values_says_so(write: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = byte_lm()
    with pytest.raises(ValueError, match=r"embed_tokens.weight: expected values to write, got a tensor on the meta"):
        getattr(model, write)(tmp_path / "x")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model, path = byte_lm(), tmp_path / "model.safetensors"
    model.save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:100], whole[:-1], whole + b"x", b"\xff" * 300):
        path.write_bytes(damaged)
        for read in (load_model, ByteLM.load):
            with pytest.raises(ValueError, match=r"model.safetensors: expected a whole safetensors file, got "):
                read(path)
    tensors = model.state_dict()
    for config, problem in (
        ("[1]", r"config: expected the fields of ByteLMConfig, got \[1\]"),
        ("{", "Expecting property name"),
        ('{"dim": {"x": 1}}', r"config: expected a value of ByteLMConfig.dim, got {'x': 1}"),
        ('{"dim": "16"}', "dim: expected"),
    ):
        safetensors.save_file(tensors, path, {"model": "ByteLM", "config": config})
        with pytest.raises(ValueError, match=f"model.safetensors: .*{problem}"):
            ByteLM.load(path)
    safetensors.save_file(tensors, path, {"model": "ByteLM"})
    with pytest.raises(ValueError, match=r"model.safetensors: config: expected the fields of ByteLMConfig, got None"):
        load_model(path)
    tensors["norm.weight"] = tensors["norm.weight"].to(torch.int8)
    config = str(dataclasses.asdict(model.config)).replace("'", '"').replace("None", "null").replace("False", "false")
    safetensors.save_file(tensors, path, {"model": "ByteLM", "config": config})
    with pytest.raises(ValueError, match=r"norm.weight of torch.int8, expected a floating-point dtype"):
        load_model(path)
