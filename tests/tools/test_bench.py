"""The benches run, measure what they say, and their peers compute what the ops do. No time is asserted."""

from __future__ import annotations

import csv
import gc
import importlib
import importlib.util
import itertools
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from blt_kernels import cli, patch_starts
from blt_kernels.cli import bench as tool
from blt_kernels.models import MegaByte, MegaByteConfig
from blt_kernels.nn import TransformerConfig

NEEDS = {
    "bench_generate": "transformers",
    "bench_integrations": "MEGABYTE_pytorch",
    "bench_models": "transformers",
    "bench_transformers": "transformers",
    "bench_transformers_generate": "transformers",
}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


OPTIONAL = {"MEGABYTE-pytorch"}  # these peers need not be installed
BENCHES = [
    pytest.param(name, marks=needs(NEEDS[name]) if name in NEEDS else ())
    for name in sorted(path.stem for path in tool.SOURCE.glob("bench_*.py"))
]


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(tool.SOURCE))
    return importlib.import_module("timing")


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_implementations_agree_and_are_measured(timing: ModuleType, name: str) -> None:
    bench = importlib.import_module(name)
    rows = []
    for make in bench.comparisons(small=True, compile_peers=False):
        comparison = make()
        assert set(comparison.failures) <= OPTIONAL
        new = timing.compare(comparison, rounds=1, warmup=0)
        assert {row.implementation for row in new if row.status != timing.OK} == set(comparison.failures)
        new = [row for row in new if row.status == timing.OK]
        assert new[0].implementation == timing.OURS
        assert new[-1].implementation.startswith("limit: ")
        assert new[-1].share_of_limit == 1
        assert all(row.median_ms > 0 for row in new)
        rows += new
    assert all(isinstance(line, str) for line in bench.remarks(rows))


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_inputs_belong_to_no_graph(timing: ModuleType, name: str) -> None:
    """A graph that is older than a capture keeps the stream that it was made on, and ends the capture in an error."""
    bench = importlib.import_module(name)
    for make in itertools.islice(bench.comparisons(small=True, compile_peers=False), 8):
        before = {id(x) for x in results_of_graphs()}
        comparison = make()
        found = [x.shape for x in results_of_graphs() if id(x) not in before]
        assert not found, f"{comparison.op} {comparison.dtype}: {found}"


def results_of_graphs() -> list[torch.Tensor]:
    """Return the tensors that hold an autograd graph."""
    return [x for x in gc.get_objects() if type(x) is torch.Tensor and x.grad_fn is not None]


@pytest.mark.parametrize("name", BENCHES)
def test_comparisons_for_cuda_are_made_when_they_are_called(timing: ModuleType, name: str) -> None:
    """The list of them takes no inputs, and no GPU."""
    assert all(map(callable, importlib.import_module(name).comparisons(device="cuda", compile_peers=False)))


def test_what_a_step_of_generation_reads(timing: ModuleType) -> None:
    """One layer of 8 x 8 matrices and a feed-forward of 4 in each transformer; patches of two bytes."""
    bench = importlib.import_module("bench_generate")
    layers = TransformerConfig(8, 1, 1, ffn_dim=4, window=2), TransformerConfig(8, 1, 1, ffn_dim=4)
    model = MegaByte(MegaByteConfig(2, layers[1], layers[0]))
    steps = bench.Steps(model, bench.text(3, 8), bench.Case(3, 4, 4))
    layer = 4 * 8 * 8 + 3 * 8 * 4 + 2 * 8
    local = layer + 8 + 260 * 8 + 8 + 3 * 8  # adds norm, output, first byte of a patch, and rows of the embedding
    wide = layer + 8 + 8 * 4 + 8 + 3 * 4
    keys = [3 * 2 * 8 * n for n in (2, 2, 2, 2)], [3 * 2 * 8 * n for n in (0, 4, 0, 5)]
    assert steps.work() == 4 * (4 * local + 2 * wide + sum(keys[0]) + sum(keys[1]))


def test_generation_is_drawn_and_told(timing: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench, rows = importlib.import_module("bench_generate"), []
    for length, ms in ((64, 8.0), (512, 9.0)):
        shape = f"9M parameters, 8 bytes behind {length}, batch 1, 3 MB of state"
        row = timing.Row(bench.BLT_OP, shape, "float32", 2, timing.OURS, ms, 1, 1.0, 0.5, 2.0, None, 3)
        rows += [row, replace(row, implementation="peer", median_ms=40.0), replace(row, implementation="limit: copy")]
    line, _ = bench.remarks(rows)
    assert line.endswith("2 threads: 1 ms a step, 1000 bytes/s; limit 0.5 ms; peer 5 times")
    bench.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_not_timed(timing: ModuleType) -> None:
    def agree(results: dict[str, int]) -> None:
        assert results[timing.OURS] == results["peer"]

    wrong = timing.Comparison("op", "[]", "int", {timing.OURS: lambda: 1, "peer": lambda: 2}, 1, {}, 1, agree)
    with pytest.raises(AssertionError):
        timing.compare(wrong, rounds=1)


def test_agreement_judges_ours_and_every_peer(timing: ModuleType) -> None:
    assert_agree = importlib.import_module("common").assert_agree
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    rounded = truth.float()
    for wrong in (timing.OURS, "peer"):
        results = {timing.OURS: [rounded], "eager": [rounded], "peer": [rounded]}
        assert_agree(results, [truth], "eager")
        results[wrong] = [rounded * 1.01]
        with pytest.raises(AssertionError):
            assert_agree(results, [truth], "eager")
        del results["eager"]  # it may be out of memory
        with pytest.raises(AssertionError):
            assert_agree(results, [truth], "eager")


def test_figures(timing: ModuleType) -> None:
    """Shares and ratios from given times: 2 ms against 4 and 6, with a limit of 1 ms for half of the bytes."""
    functions = {timing.OURS: int, "slow": int, "slower": int}
    comparison = timing.Comparison(
        "op", "[1]", "int", functions, 8_000_000, {"copy": int}, 4_000_000, lambda _: None, device="x"
    )
    times = {timing.OURS: [2e-3] * 3, "slow": [4e-3, 4e-3, 1.0], "slower": [6e-3] * 3, "limit: copy": [1e-3] * 3}
    ours, slow, _, limit = timing._rows(comparison, functions, times)
    assert (ours.median_ms, ours.gb_per_s, ours.share_of_limit, ours.ratio_to_best_peer) == (2.0, 4.0, 1.0, 2.0)
    assert (slow.share_of_limit, slow.ratio_to_best_peer) == (0.5, 1.0)
    assert (limit.bytes, limit.gb_per_s, limit.ratio_to_best_peer) == (4_000_000, 4.0, None)
    assert {row.rounds for row in (ours, slow, limit)} == {3}


def test_ratios_are_of_the_rounds_that_both_took_part_in(timing: ModuleType) -> None:
    functions = {timing.OURS: int, "slow": int}
    comparison = timing.Comparison("op", "[1]", "int", functions, 1, {"copy": int}, 1, lambda _: None, device="x")
    drifting = [1e-3, 1e-3, 4e-3, 4e-3, 4e-3]  # the machine slows down after the slow one has dropped out
    times = {timing.OURS: drifting, "slow": [3e-3, 3e-3], "limit: copy": [1e-3] * 5}
    ours, slow, _ = timing._rows(comparison, functions, times)
    assert (ours.median_ms, ours.ratio_to_best_peer, ours.rounds) == (4.0, 3.0, 5)
    assert (slow.median_ms, slow.ratio_to_best_peer, slow.rounds) == (3.0, 1.0, 2)


def test_slow_implementations_drop_out(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock believes what functions say they take: 0.5 s of a budget of 2 s, and more than all of it."""
    calls: dict[str, int] = {}

    def takes(name: str, seconds: float) -> Callable[[], float]:
        def function() -> float:
            calls[name] = calls.get(name, 0) + 1
            return seconds

        return function

    monkeypatch.setattr(timing._Clock, "sample", lambda self, function, repeats: function())
    functions = {timing.OURS: takes("ours", 0.01), "slow": takes("slow", 0.5), "slower": takes("slower", 30.0)}
    limits = {"copy": takes("copy", 0.001)}
    comparison = timing.Comparison("op", "[1]", "int", functions, 1, limits, 1, lambda _: None, device="x")
    rows = timing.compare(comparison, rounds=20, warmup=3, budget=2.0)
    assert {row.implementation: row.rounds for row in rows} == {
        timing.OURS: 20,
        "slow": 4,
        "slower": timing.MIN_SAMPLES,
        "limit: copy": 20,
    }
    # One call's result is checked, and others warm up, of which the last tells how long a call takes.
    assert {name: calls[name] - rounds for name, rounds in (("ours", 20), ("slow", 4), ("slower", 3))} == {
        "ours": 1 + 4,
        "slow": 1 + 1,
        "slower": 1 + 1,
    }


def test_cpu_time_leaves_out_waiting(timing: ModuleType) -> None:
    def wait() -> int:
        time.sleep(0.2)
        return 1

    comparison = timing.Comparison(
        "op", "[]", "int", {timing.OURS: wait}, 1, {"copy": partial(sum, range(10))}, 1, lambda _: None
    )
    waited, ran = (timing.compare(comparison, rounds=1, warmup=0, cpu_time=own)[0] for own in (False, True))
    assert waited.median_ms >= 200
    assert ran.median_ms < 100


def test_csv_replaces_what_was_measured_again(timing: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.csv"
    first = timing.Row("op", "[1]", "int", 1, timing.OURS, 2.0, 1, 1.0, 1.0, None, None, 3)
    timing.write_csv([first, replace(first, implementation="peer"), replace(first, threads=2)], path)
    timing.write_csv([replace(first, median_ms=3.0)], path)
    with path.open() as file:
        rows = [(row["implementation"], row["threads"], row["median_ms"]) for row in csv.DictReader(file)]
    assert rows == [(timing.OURS, "2", "2"), (timing.OURS, "1", "3")]
    path.write_text("op,shape,dtype,threads,implementation\nold,[1],int,1,peer\n")
    timing.write_csv([first], path)
    assert path.read_text().splitlines()[1] == "old,[1],int,1,peer,,,,,,,,"


def test_readme_has_a_line_for_every_input(timing: ModuleType, tmp_path: Path) -> None:
    def rows(op: str, dtype: str, ours: float, *, peer: bool = True) -> list[object]:
        row = timing.Row(op, "[8]", dtype, 2, timing.OURS, ours, 1, 1.0, 0.5, 4.0 if peer else None, None, 3)
        limit = replace(row, implementation="limit: copy", median_ms=0.1)
        peers = [replace(row, implementation=n, median_ms=t * ours) for n, t in (("slow", 9), ("fast", 4))]
        return [row, *(peers if peer else []), limit]

    measured = [*rows("pool fwd", "int", 1.5), *rows("pool fwd+bwd", "int", 2.5), *rows("pool fwd+bwd", "half", 3.5)]
    measured += [*rows("layout", "int", 0.25, peer=False), *rows("pool fwd, scaling with bytes", "int", 1.0)]
    measured += [*rows("decode pool", "int", 1.0), *rows("pool decode fwd", "int", 4.5)]
    timing.write_csv([*measured, replace(measured[0], threads=1, median_ms=77.0)], tmp_path / "rows.csv")
    table = importlib.import_module("readme").table(tmp_path / "rows.csv").splitlines()
    assert "2 threads" in table[0]
    assert table[4:] == [
        "| `pool` | [8] int | 1.5 (50%) | fast: 4 | 2.5 (50%) | fast: 4 |",
        "| `pool` | [8] half |  |  | 3.5 (50%) | fast: 4 |",
        "| `layout` | [8] int | 0.25 (50%) |  |  |  |",
        "| `pool decode` | [8] int | 4.5 (50%) | fast: 4 |  |  |",
    ]


def test_readme_has_the_newest_table_and_picture(timing: ModuleType, tmp_path: Path) -> None:
    readme = importlib.import_module("readme")
    text = (readme.ROOT / "README.md").read_text()
    assert readme.with_table(text, readme.ROOT / "bench" / "results") == text, "run `python bench/readme.py`"
    for path in readme.draw_picture(tmp_path):
        (texts, numbers), (old_texts, old_numbers) = shapes(path), shapes(readme.PICTURES / path.name)
        assert texts == old_texts, "run `python bench/readme.py`"
        assert numbers == pytest.approx(old_numbers, abs=0.5), "run `python bench/readme.py`"


def shapes(path: Path) -> tuple[list[str], list[float]]:
    """Return the texts of a picture and the numbers of its paths, without what a version of matplotlib adds."""
    text = re.sub(r"<(metadata|style|defs).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    paths = " ".join(re.findall(r' d="([^"]+)"', text))
    return re.findall(r">([^<>\n]+)<", text), [float(number) for number in re.findall(r"-?[\d.]+", paths)]


def test_readme_has_small_table(timing: ModuleType, tmp_path: Path) -> None:
    """It has fp32 with two threads; the ratio of generation is that of medians, and byte transformers do not count."""
    readme = importlib.import_module("readme")
    row = timing.Row("", "", "float32", 2, timing.OURS, 4.0, 1, 1.0, 0.4, 3.0, None, 3)
    rows = []
    for _name, op, shape in (*readme.SPEED, *readme.SPEED_OF_GENERATION):
        ours = replace(row, op=op, shape=f"{shape} 3 MB of state")
        others = (("slow", 80.0), ("fast", 8.0), ("ByteLM of 9M", 1.0), ("limit: copy", 0.1))
        rows += [ours, *(replace(ours, implementation=name, median_ms=ms) for name, ms in others)]
        rows += [replace(ours, threads=1, median_ms=9.0), replace(ours, dtype="bfloat16", median_ms=9.0)]
    timing.write_csv(rows, tmp_path / "2026-01-01-cpu.csv")
    table = readme.table_of_speed(*[tmp_path / "2026-01-01-cpu.csv"] * 2).splitlines()
    assert table[4] == "| BLT, forward | [1, 8192] | 4 | fast | 3 |"
    assert table[-1] == "| BLT, one more byte | behind 512 bytes | 0.25 | fast | 2 |"
    timing.write_csv([row], tmp_path / "2026-01-02-cpu.csv")
    with pytest.raises(ValueError, match="'BLT fwd'"):
        readme.table_of_speed(*[tmp_path / "2026-01-02-cpu.csv"] * 2)


def test_readme_has_a_line_for_every_generation(timing: ModuleType, tmp_path: Path) -> None:
    """In ms a step: 8 steps of ours took 4 ms, and 40% of that is the limit."""
    shape = "9M parameters, 8 bytes behind 64, batch 2, 3 MB of state"
    row = timing.Row("BLT generation", shape, "float32", 2, timing.OURS, 4.0, 1, 1.0, 0.4, 2.0, None, 3)
    peers = [replace(row, implementation=name, median_ms=ms) for name, ms in (("slow", 80.0), ("limit: copy", 1.0))]
    failed = timing.failed_row(row.op, shape, row.dtype, "absent", "not installed")
    timing.write_csv([row, *peers, failed, replace(row, op="pool"), replace(row, threads=1)], tmp_path / "rows.csv")
    table = importlib.import_module("readme").table_of_generation(tmp_path / "rows.csv").splitlines()
    assert "2 threads" in table[0]
    assert table[4:] == ["| BLT, 9M parameters, float32 | 64 | 2 | 0.5 | 0.2 | 3 MB | slow 20 |"]


def test_readme_shows_results_of_gpus(timing: ModuleType, tmp_path: Path) -> None:
    """A file's name says that. Rows that failed or stand alone are not in the table; later ones replace others."""
    readme = importlib.import_module("readme")
    row = timing.Row("pool fwd", "[8]", "bf16", 16, timing.OURS, 9.0, 1, 1.0, 0.5, 1.0, None, 3, "ok, by graphs")
    limit = replace(row, implementation="limit: copy", median_ms=0.1)
    timing.append_csv([replace(row, op="cpu op"), replace(limit, op="cpu op")], tmp_path / "2026-01-02-intel-xeon.csv")
    assert readme.newest(tmp_path, "gpu") is None
    alone = [("limit: copy", "float32", 4321.0), ("limit: product", "bfloat16", 790000.0)]
    rows = [
        *(replace(row, op=op, dtype=dtype, gb_per_s=rate, threads=1) for op, dtype, rate in alone),
        *(row, limit, timing.failed_row("pool fwd", "[8]", "bf16", "flex", "out of memory")),
        replace(row, implementation="peer", median_ms=1.5),
        replace(row, op="search fwd", status="ok, in the table"),
        replace(row, median_ms=0.5, share_of_limit=0.88, ratio_to_best_peer=3.0),
    ]
    (tmp_path / "model-sm90.csv").write_text("kernel,share\n")
    timing.append_csv(rows, tmp_path / "2026-12-01-nvidia-h100-80gb-hbm3.csv")
    timing.append_csv([replace(row, op="older"), limit], tmp_path / "2026-11-30-nvidia-h200.csv")
    cpu, gpu = (readme.table(readme.newest(tmp_path, kind)) for kind in ("cpu", "gpu"))
    assert "| `cpu op` | [8] bf16 | 9 (50%) |" in cpu
    assert "older" not in gpu
    lines = [line for line in gpu.splitlines() if line]
    assert "nvidia-h100-80gb-hbm3.csv`, copy 4.32 TB/s, bfloat16 product 790 TFLOP/s: milliseconds a call" in lines[0]
    assert lines[3:] == ["| `pool` | [8] bf16 | 0.5 (88%) | peer: 3 |  |  |"]


def test_scaling_fits_exponents(timing: ModuleType) -> None:
    bench = importlib.import_module("bench_scaling")
    row = timing.Row("op fwd, scaling with bytes", "", "int", 2, timing.OURS, 1.0, 1, 1.0, 1.0, None, 1.0, 3)
    rows = [
        replace(row, shape=f"{size} bytes", median_ms=float(size**2), extra_mb=float(size)) for size in (10, 100, 1000)
    ]
    rows.append(replace(rows[0], implementation="limit: copy", median_ms=1e9))
    rows += [
        replace(row, op="op fwd, scaling with documents", shape=f"{n} documents", median_ms=ms)
        for n, ms in ((1, 2.0), (10, 3.0))
    ]
    assert bench.remarks(rows) == [
        "op fwd, 2 threads, 10 to 1000 bytes: time T^2.00 (2.00 at the end), memory T^1.00 (1.00 at the end)",
        "op fwd, 2 threads, 1 to 10 documents: the slowest takes 1.50 times as long as the fastest",
    ]


def test_command_draws_scaling(timing: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench = importlib.import_module("bench_scaling")
    for ops in ("ALL", "ON_PATCHES", "ON_DOCUMENTS"):
        monkeypatch.setattr(bench, ops, {"patch_pool max": bench.patch_pool})
    path = tmp_path / "rows.csv"
    arguments = ["bench", "scaling", "--small", "--rounds", "1", "--threads", "1", "--csv", str(path)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "patch_pool max fwd+bwd, 1 threads, 256 to 1024 bytes: time T^" in result.output
    assert path.exists()
    assert (tmp_path / "rows-scaling.png").read_bytes().startswith(b"\x89PNG")


def test_masked_attention_has_the_mask_of_transformers(timing: ModuleType) -> None:
    theirs = pytest.importorskip("transformers.models.blt.modeling_blt")._prepare_patch_cross_attention_mask
    additive_mask = importlib.import_module("peers.patch_cross_attention").additive_mask
    ids = torch.tensor([[0, 1, 1, 3, 3, 3], [0, 0, 1, 2, 3, 4]])
    vectors = torch.arange(5).repeat_interleave(2).expand(2, -1)
    for dtype in (torch.float32, torch.bfloat16):
        encode = theirs(ids, 5, 6, patches_as_queries=True, cross_attn_k=2, dtype=dtype)
        assert torch.equal(additive_mask(vectors, ids, dtype), encode)
        decode = theirs(ids, 5, 6, patches_as_queries=False, cross_attn_k=2, dtype=dtype)
        assert torch.equal(additive_mask(ids, vectors, dtype), decode)


def test_peak_memory_counts_what_is_held_at_a_time(timing: ModuleType) -> None:
    memory = importlib.import_module("memory")

    def three() -> torch.Tensor:
        first = torch.ones(1000)  # it takes 4000 bytes
        second = first + 1  # it takes 8000
        del first
        return second + 1  # `second` and the result take 8000

    assert 8000 <= memory.peak_extra_bytes(three) < 8100  # a scalar or two are counted too
    entropy = torch.rand(5000)
    held = 4 * (2 * 5001 + 2 + 5000 + 5000) + 1 + 5000  # the layout, and a decision for each byte
    assert held <= memory.peak_extra_bytes(lambda: patch_starts(entropy, threshold=0.5)) < held + 1000


def test_command_goes_on_after_a_wrong_result(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def agree(results: dict[str, int]) -> None:
        assert results[timing.OURS] == 1, "they differ"

    def comparisons(**_options: object) -> list[object]:
        make = partial(
            timing.Comparison, shape="[]", dtype="int", work=1, limits={"none": int}, limit_work=1, agree=agree
        )
        return [
            partial(make, op="wrong", implementations={timing.OURS: int}),
            partial(make, op="right", implementations={timing.OURS: lambda: 1}),
        ]

    monkeypatch.setattr(importlib.import_module("bench_entropy_patch"), "comparisons", comparisons)
    result = CliRunner().invoke(cli.app, ["bench", "entropy_patch", "--rounds", "1", "--threads", "1", "--no-save"])
    assert result.exit_code == 1
    assert "not timed: blt_kernels of wrong [] int: AssertionError: they differ" in result.output
    assert "right  []  int  1 threads" in result.output


def test_command_goes_on_after_any_exception(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Inputs that do not fit, an op or a peer that raises, at once or later: a row each, and all else is timed."""
    calls: dict[str, int] = {}

    def fails(times: int) -> Callable[[], int]:
        """Raises at this call."""

        def function() -> int:
            calls["peer"] = calls.get("peer", 0) + 1
            if calls["peer"] >= times:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 1

        return function

    def too_large(size: int) -> timing.Comparison:
        raise torch.OutOfMemoryError(f"no room for {size}")

    def comparisons(**_options: object) -> list[object]:
        make = partial(
            timing.Comparison, shape="[]", dtype="int", work=1, limits={"none": int}, limit_work=1, agree=lambda _: None
        )
        ours = {timing.OURS: lambda: 1}
        return [
            partial(too_large, 7),
            partial(make, op="raises", implementations={timing.OURS: fails(1)}),
            partial(make, op="peer raises", implementations={**ours, "peer": fails(1)}, failures={"flex": "not here"}),
            partial(make, op="peer raises later", implementations={**ours, "peer": fails(9), "other": int}),
            partial(make, op="right", implementations=ours),
        ]

    monkeypatch.setattr(importlib.import_module("bench_entropy_patch"), "comparisons", comparisons)
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-9)
    arguments = ["bench", "entropy_patch", "--rounds", "9", "--threads", "1", "--csv", str(path)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert "5 implementations were not timed" in result.output
    with path.open() as file:
        rows = [(row["op"], row["implementation"], row["status"], row["median_ms"]) for row in csv.DictReader(file)]
    memory = "OutOfMemoryError: CUDA out of memory"
    assert [row for row in rows if row[2] != "ok"] == [
        ("test_bench", timing.OURS, "OutOfMemoryError: no room for 7", ""),
        ("raises", timing.OURS, memory, ""),
        ("peer raises", "flex", "not here", ""),
        ("peer raises", "peer", memory, ""),
        ("peer raises later", "peer", memory, ""),
    ]
    timed = [(op, name) for op, name, status, ms in rows if status == "ok" and float(ms) >= 0]
    assert [op for op, name in timed if name == timing.OURS] == ["peer raises", "peer raises later", "right"]
    assert ("peer raises later", "other") in timed


@pytest.mark.parametrize(("key_heads", "window"), [(2, None), (1, 9)])
def test_exact_attention_is_that_of_autograd(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch, key_heads: int, window: int | None
) -> None:
    bench = importlib.import_module("bench_block_causal_attention")
    peers = importlib.import_module("peers.block_causal_attention")
    lengths = [30, 0, 1, 50]
    q, k, v = (
        torch.randn(81, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (2, key_heads, key_heads)
    )
    grad = torch.randn(81, 2, 8, dtype=torch.float64)
    out = peers.attention_by_document(lengths, window)(q, k, v)
    for block in (7, 512):
        monkeypatch.setattr(bench, "BLOCK", block)
        torch.testing.assert_close(bench.exact((q, k, v), lengths, window), [out.detach()])
        expected = list(torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
        torch.testing.assert_close(bench.exact((q, k, v), lengths, window, grad), expected)


def test_rows_are_appended_at_once(timing: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    row = timing.Row("op", "[1]", "int", 1, timing.OURS, 2.0, 1, 1.0, 1.0, None, None, 3)
    for number in (1, 2):
        timing.append_csv([row, timing.failed_row("op", "[1]", "int", "peer", "not here")], path)
        rows = timing.read_csv(path)
        assert [(r["median_ms"], r["status"]) for r in rows] == [("2", "ok"), ("", "not here")] * number


def test_exponent(timing: ModuleType) -> None:
    assert timing.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_command_writes_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    arguments = [
        "bench",
        "entropy_patch",
        "--small",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--no-compile",
        "--csv",
        str(path),
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "facebookresearch/blt" in result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} >= {"entropy_patch", "patch_starts"}
    assert all(float(row["median_ms"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing"),
        (["--rounds", "0"], "rounds"),
        (["--threads", "x"], "x"),
        (["--device", "tpu"], "tpu"),
        (["--cpu-time"], "cpu-time"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert result.exit_code in (1, 2)
    assert message in result.output
