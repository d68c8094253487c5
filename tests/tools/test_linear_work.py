"""Commands do work in proportion to their input: counted in calls, comparisons and bytes that are copied."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from blt_kernels.cli import app
from blt_kernels.cli.patch import plot
from blt_kernels.cli.patch.rules import Rules, Scheme
from blt_kernels.cli.patch.show import JsonLines
from blt_kernels.cli.patch.stream import Piece
from blt_kernels.cli.patch.window import Window
from blt_kernels.models import ByteLM, ByteLMConfig
from blt_kernels.testing import real_text
from blt_kernels.train import data, ngram

NO_STARTS = torch.empty(0, dtype=torch.int64)


def pieces_without_a_boundary(count: int, size: int = 16) -> list[Piece]:
    """Return a stream of one patch."""
    starts = [torch.tensor([0]), *[NO_STARTS] * (count - 1)]
    return [Piece(i * size, b"x" * size, torch.full((size,), float(i)), s) for i, s in enumerate(starts)]


def test_json_joins_the_entropies_of_a_patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, copied, cat = pieces_without_a_boundary(200), [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: (copied.append(sum(map(len, parts))), cat(parts))[1])
    out = io.StringIO()
    lines = JsonLines(out, entropies=True)
    for piece in pieces:
        lines.add(piece)
    lines.finish(200 * 16)
    assert sum(copied) < 3 * 200 * 16
    assert f"{[float(i) for i in range(200) for _ in range(16)]}" in out.getvalue()


class CountedBytes(bytes):
    """Counts the bytes that ``+`` copies."""

    copied = 0

    def __radd__(self, before: bytes) -> CountedBytes:
        CountedBytes.copied += len(before) + len(self)
        return CountedBytes(bytes(before) + bytes(self))

    def __getitem__(self, key: Any) -> Any:
        return CountedBytes(super().__getitem__(key))


class CountedList(list):
    """Holds entropies, and counts the numbers that ``+`` copies."""

    copied = 0

    def __radd__(self, before: list[float]) -> CountedList:
        CountedList.copied += len(before) + len(self)
        return CountedList([*before, *self])

    def __getitem__(self, key: Any) -> Any:
        return CountedList(super().__getitem__(key))

    def tolist(self) -> CountedList:
        return self


def test_a_window_copies_its_bytes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedBytes, "copied", 0)
    monkeypatch.setattr(CountedList, "copied", 0)
    window = Window(0, 1 << 20)
    for piece in pieces_without_a_boundary(200):
        entropy: Any = CountedList(piece.entropy.tolist())
        window.add(Piece(piece.offset, CountedBytes(piece.data), entropy, piece.starts))
    window.finish()
    assert window.data == b"x" * 200 * 16
    assert window.entropy == [float(i) for i in range(200) for _ in range(16)]
    assert CountedBytes.copied + CountedList.copied < 200 * 16


class Counter:
    """Counts calls of Python and C functions while a function runs, and the numbers that `torch.cat` copies."""

    def __init__(self) -> None:
        self.work = 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.work += event in ("call", "c_call")

    def measure(self, function: Callable[[], Any]) -> int:
        self.work, cat = 0, torch.cat

        def counted(parts: Any, *rest: Any, **options: Any) -> torch.Tensor:
            result = cat(parts, *rest, **options)
            self.work += result.numel()
            return result

        torch.cat = counted
        sys.setprofile(self)
        try:
            function()
        finally:
            sys.setprofile(None)
            torch.cat = cat
        return self.work


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("--json --entropies --threshold 100 --model m.safetensors", 1 << 13),  # it makes one patch
        ("--json --entropies --model m.safetensors", 1 << 11),
        ("--json --threshold 100 --max-patch-length 5 --model m.safetensors", 1 << 13),
        ("--json --target-size 3 --model m.safetensors", 1 << 13),
        ("--json --scheme topk --entropies --model m.safetensors", 1 << 11),
        ("--max-show 1000000 --scheme space", 1 << 11),
        ("--max-show 1000000 --scheme byte --color always", 1 << 10),
        ("--json --html x.html --length 1000000 --scheme space", 1 << 11),
    ],
)
def test_patch(options: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ByteLM(ByteLMConfig(dim=16, num_layers=1, num_heads=1, ffn_dim=16, window=16)).save("m.safetensors")
    counter, text = Counter(), real_text(4 * size, 1)

    def patch(size: int) -> None:
        Path("text").write_bytes(text[:size])
        result = CliRunner().invoke(app, ["patch", "text", *options.split()])
        assert result.exit_code == 0, result.output

    patch(size)  # the first call imports modules
    one, two, four = (counter.measure(lambda n=n: patch(n * size)) for n in (1, 2, 4))
    assert four - two < 1.4 * 2 * (two - one)  # the factor is 2 if linear, 3 if half is quadratic


def test_a_plot_has_as_many_artists_for_any_number_of_patches() -> None:
    """matplotlib goes through the artists of a picture whenever one is added to it."""
    counts = []
    for size in (1500, 6000):
        axis = Figure().subplots()
        window = Window(0, size, b"x" * size, None, 0, list(range(0, size + 1, 3)))
        plot._draw_row(axis, window, [3.0] * size, Rules(Scheme.static), 0, size)
        counts.append(len(axis.get_children()))
    assert counts[0] == counts[1]


# --- files ------------------------------------------------------------------------------------------------------------


class Row(data.Row):
    """Counts how often the length of a row is asked for."""

    asked = 0

    @property
    def length(self) -> int:
        Row.asked += 1
        return self[2]


def many_files(folder: Path, count: int) -> list[data.Source]:
    for i in range(count):
        (folder / str(i)).write_text(str(i))
    return data.find_sources([folder])


def test_batches_of_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Row, "asked", 0)
    find = data.find_piece
    monkeypatch.setattr(data, "find_piece", lambda *of: Row(*find(*of)))
    ((_, rows),) = data.heldout_batches(many_files(tmp_path, 300), 1 << 20, 64)
    assert len(rows) == 301
    assert 300 <= Row.asked < 10 * 300


class Length(int):
    """Counts the comparisons of sums of a length."""

    compared = 0

    def __radd__(self, other: int) -> Length:
        return Length(int(other) + int(self))

    def __add__(self, other: int) -> Length:
        return Length(int(self) + int(other))

    def __lt__(self, other: int) -> bool:
        Length.compared += 1
        return int(self) < int(other)

    def __eq__(self, other: object) -> bool:
        Length.compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def test_rows_are_shared_among_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Length, "compared", 0)
    lengths = [Length(i % 97 + 1) for i in range(2000)]
    shares = data.share(lengths, 500)
    assert sorted(i for share in shares for i in share) == list(range(2000))
    assert Length.compared < 2000 * 2 * 4 * 9  # a heap of 500 takes two comparisons at each child

    calls, share = [], data.share
    monkeypatch.setattr(data, "share", lambda *of: (calls.append(of), share(*of))[1])
    batches = data.PackedBatches(many_files(tmp_path, 50), 1 << 20, 64, seed=0)
    for step in range(3):
        for part in range(10):
            batches.batch(step, part, 10)
    assert len(calls) == 3  # it is called once a step, not once a part


def test_ngrams_of_files_without_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_BLOCK_BYTES", 64)
    generator, sums, merge = np.random.default_rng(0), [], ngram._sum_by_key
    (tmp_path / "a").write_bytes(generator.bytes(64 * 64))
    monkeypatch.setattr(ngram, "_sum_by_key", lambda keys, values: (sums.append(len(keys)), merge(keys, values))[1])
    model = ngram.NgramModel.train(data.find_sources([tmp_path / "a"]))
    assert model.followers[3].values.sum() == 64 * 64
    assert sum(sums) < 64 * 64 * (1 + 6 + 1 + 3 * 4)  # blocks, six merges, the last one, three tables of each order
