"""``make gpu`` rehearsed without a GPU: stages, budgets, what a fault costs, the summary, and the carried folder."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends import emulator
from cases import CASES

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"), pytest.mark.slow]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a module of `gpu_stages`."""
    monkeypatch.syspath_prepend(str(BENCH))
    return lambda name: importlib.import_module(f"gpu_stages.{name}")


def rehearse(folder: Path, *options: str, faults: str = "") -> tuple[list[dict[str, str]], str, int]:
    """Return the rows of a rehearsal, what it printed and its exit code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "BLT_KERNELS_FAULTS": faults, "OUT": str(folder)}
    command = [sys.executable, str(BENCH / "gpu.py"), "--rehearse", *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert "Traceback" not in done.stderr, done.stderr
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file)), done.stdout, done.returncode


def of_stage(rows: list[dict[str, str]], name: str) -> list[tuple[str, str, str]]:
    return [(row["op"], row["shape"], row["status"]) for row in rows if name in row["op"]]


def test_every_stage_runs(tmp_path: Path) -> None:
    emulator()
    every = [
        "ceilings",
        "smoke",
        "timings",
        "attention",
        "search",
        "generation",
        "counters",
        "memcheck",
        "racecheck",
        "suite",
    ]
    rows, printed, code = rehearse(tmp_path, "--stages", *every)
    failed = [row for row in rows if not row["status"].startswith("ok")]
    assert code == 0, failed
    assert failed == []
    ended = [row["op"].removeprefix("stage ") for row in rows if row["op"].startswith("stage ")]
    assert ended == every
    timed = {row["op"]: row for row in rows if row["implementation"] == "blt_kernels" and row["median_ms"]}
    for op in (
        *("limit: copy", "limit: product", "patch_pool max fwd", "entropy_patch", "ngram_hash"),
        *("patch_cross_attention encode fwd", "patch_unpool patch fwd", "block_causal_attention fwd"),
        "ncu block_causal_attention_fwd_kernel",
    ):
        assert float(timed[op]["median_ms"]) > 0, op
    assert {"scatter_reduce", "limit: torch.sum"} & {row["implementation"] for row in rows}
    assert any(row["op"] == "smoke block_causal_attention[decoding] float32" for row in rows)
    captured = [row for row in rows if row["op"].endswith("captured ids")]
    assert len(captured) == 2
    assert {row["status"] for row in captured} == {"ok: 2 of 2 ids are those of the other path"}
    count = len({case.op for case in CASES}) + 1  # it counts every op, and decoding
    assert f"smoke: {count} of {count} cases right" in printed
    assert "stages: ceilings" in printed
    for kernel in ("fwd", "bwd_dkdv", "bwd_dq", "decode"):
        assert 2 <= len([row for row in rows if row["op"] == f"search {kernel}"]) <= 12, kernel
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".csv", ".log"]


def test_a_fault_costs_one_row(tmp_path: Path) -> None:
    """An exception, a hang and the end of the process: the cases before and behind them have their rows."""
    faults = "fail ceilings kernels;hang ceilings copy;end ceilings product torch.bfloat16"
    options = ["--stages", "ceilings", "--case-seconds", "5", "--only", "kernels", "copy", "read", "product"]
    rows, printed, code = rehearse(tmp_path, *options, faults=faults)
    assert code == 1
    assert [(row["op"], row["shape"]) for row in rows if not row["status"].startswith("ok")] == [
        ("ceilings kernels", ""),
        ("stage ceilings", "copy"),
        ("stage ceilings", "product torch.bfloat16"),
    ]
    assert [row["op"] for row in rows] == [
        *("ceilings kernels", "stage ceilings", "limit: read (torch.sum)", "stage ceilings"),
        *("limit: product", "stage ceilings"),
    ]
    status = {row["shape"]: row["status"] for row in rows}
    assert status["copy"] == "killed after 5 s"
    assert status["product torch.bfloat16"] == "ended its process with 139"
    assert rows[0]["status"] == "RuntimeError: injected fault"
    assert "6 rows, 3 failed" in printed


def test_the_budget_is_kept(tmp_path: Path) -> None:
    """Rows measured before the budget was spent are there; the next stage says that there was no time."""
    began = time.monotonic()
    faults = "hang ceilings copy"
    rows, _, code = rehearse(tmp_path, "--stages", "ceilings", "smoke", "--budget", "14", faults=faults)
    assert time.monotonic() - began < 40  # processes of a busy machine start slowly
    assert code == 1
    killed = [row["status"] for row in rows if "killed" in row["status"]]
    assert len(killed) == 1
    assert "the budget of its stage was spent" in killed[0]
    assert ("stage smoke", "", "no time for it, from case 1 on") in of_stage(rows, "stage smoke")
    assert rows[0]["op"] == "versions"


def test_the_budget_begins_with_the_process(stages: Callable[[str], ModuleType]) -> None:
    code = "import time; time.sleep(2); import gpu; print(gpu.process_age())"
    paths = os.pathsep.join([str(BENCH), str(ROOT)])
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    assert 2 <= float(done.stdout) <= time.monotonic() - began + 0.1  # the kernel counts in ticks


def test_every_case_of_a_gpu_is_listed_without_one(stages: Callable[[str], ModuleType]) -> None:
    """The lists are made without inputs; the first cases are of different ops."""
    target = stages("target").Target()
    registry = importlib.import_module("gpu_stages").STAGES
    counts = {name: len(registry[name].cases(target)) for name in registry if name != "suite"}
    assert counts["smoke"] > 80
    assert counts["timings"] >= 25
    assert counts["attention"] >= 12
    assert counts["search"] == 4
    attention = [case.name for case in registry["attention"].cases(target)]
    assert [name for name in attention if name.endswith("True")] == attention[-4:]  # these use flex_attention
    first = [case.name.split()[0] for case in registry["timings"].cases(target)[:5]]
    assert len(set(first)) == 5
    names = [case.name for case in registry["smoke"].cases(target)]
    assert len(names) == len(set(names))
    narrowed = registry["smoke"].cases(stages("target").Target(["[decoding] bfloat16"]))
    assert [case.name for case in narrowed] == ["block_causal_attention[decoding] bfloat16"]


# --- what comes back --------------------------------------------------------------------------------------------------


def row(op: str, **values: str) -> dict[str, str]:
    names = ["shape", "dtype", "median_ms", "gb_per_s", "share_of_limit", "ratio_to_best_peer"]
    return {"op": op, **dict.fromkeys(names, ""), "implementation": "blt_kernels", "status": "ok", **values}


def test_the_summary_is_one_screen(stages: Callable[[str], ModuleType]) -> None:
    rows = [row("versions", status="ok: " + "v" * 5000), row("stage smoke", median_ms="2000")]
    rows += [row(f"smoke case {n}", status=f"AssertionError: {'x' * 300}") for n in range(500)]
    rows += [row(f"op {n}", median_ms="1.5", share_of_limit="0.8", shape="s" * 90) for n in range(500)]
    text = stages("summary").summary(rows, 321.0)
    assert len(text) <= 12_000 - 200  # the names of the files follow
    assert "1002 rows, 500 failed, 321 s" in text
    assert "smoke: 0 of 500 cases right" in text
    assert "... and 475 more failures" in text
    assert "op 0 sss" in text
    assert "more lines are in the CSV file" in text.splitlines()[-1]


def test_the_summary_says_what_was_measured(stages: Callable[[str], ModuleType]) -> None:
    pool = {"shape": "[8]", "dtype": "bfloat16"}
    launch = {"shape": "rows 64", "status": "ok"}
    rows = [
        row("limit: copy", **pool, median_ms="2", gb_per_s="4300"),
        row("patch_pool fwd", **pool, median_ms="0.05", share_of_limit="0.87", ratio_to_best_peer="3.1"),
        row("patch_pool fwd", **pool, median_ms="0.155", implementation="segment_reduce"),
        row("patch_pool fwd", **pool, median_ms="0.04", implementation="limit: copy"),
        row("search fwd", **launch, median_ms="1.1"),
        row("search fwd", shape="rows 128", status="ok, in the table", median_ms="1.3"),
        row("search fwd", shape="rows 256", status="OutOfResources: shared memory"),
        row("ncu some_kernel", median_ms="0.06", status="ok, DRAM 82%"),
    ]
    lines = stages("summary").summary(rows, 1.0).splitlines()
    assert "limit: copy [8] bfloat16: 2 ms, 4300 G/s" in lines
    assert "patch_pool fwd [8] bfloat16: 0.05 ms, 87%, 3.1x segment_reduce" in lines
    assert "search fwd: best 1.1 ms with rows 64; the table's 1.3 ms" in lines
    assert "ncu some_kernel 0.06 ms: DRAM 82%" in lines


def test_counters_are_read(stages: Callable[[str], ModuleType]) -> None:
    printed = importlib.import_module("gpu_stand_in").NCU
    first, second = stages("counters").rows_of(f"output of the program\n{printed}==PROF== Disconnected\n")
    assert first.op == "ncu blt::patch_pool_fwd_kernel<__nv_bfloat16, 8, 1>"
    assert (first.median_ms, first.share_of_limit) == (0.064512, 0.815)
    assert first.status == (
        "ok, DRAM 82%, issue 18%, warps 62%, 40 registers, long_scoreboard 9.61, wait 1.2, math_pipe_throttle 0.1"
    )
    assert second.op == "ncu block_causal_attention_fwd_kernel"
    assert list(stages("counters").rows_of("no table")) == []


def test_errors_of_the_sanitizer_are_rows(stages: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    checks, target = stages("checks"), stages("target").Rehearsal()
    printed = [
        "case one",
        "========= COMPUTE-SANITIZER",
        "========= Invalid __global__ read of size 4 bytes",
        "=========     at blt::kernel",
        "case two",
        "2 runs by nvcc",
        "========= ERROR SUMMARY: 1 error",
    ]
    monkeypatch.setattr(checks, "lines_of", lambda *_, **__: iter(printed))
    rows = list(checks.sanitize(target, "memcheck"))
    assert [(r.shape, r.status) for r in rows] == [
        ("case 1", "Invalid __global__ read of size 4 bytes"),
        ("2 cases", "1 errors: ERROR SUMMARY: 1 error"),
    ]
    monkeypatch.setattr(checks, "lines_of", lambda *_, **__: iter(["case one", "Killed"]))
    assert [r.status for r in checks.sanitize(target, "memcheck")] == ["0 errors: no summary, the program ended early"]
    early = ["case one", "Traceback", "RuntimeError: no", "========= ERROR SUMMARY: 0 errors"]
    monkeypatch.setattr(checks, "lines_of", lambda *_, **__: iter(early))
    assert [r.status for r in checks.sanitize(target, "memcheck")] == [
        "0 errors: ERROR SUMMARY: 0 errors, the program ended early"
    ]
    race = ["case one", "========= Error: Race reported between Write access at blt::kernel"]
    race += ["========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"]
    monkeypatch.setattr(checks, "lines_of", lambda *_, **__: iter(race))
    assert [r.status[:14] for r in checks.sanitize(target, "racecheck")] == ["Error: Race re", "1 errors: RACE"]
    clean = ["case one", "1 runs by nvcc", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"]
    monkeypatch.setattr(checks, "lines_of", lambda *_, **__: iter(clean))
    assert [r.status[:7] for r in checks.sanitize(target, "racecheck")] == ["ok: RAC"]


def test_failing_tests_are_rows(stages: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = stages("checks")
    printed = [
        "[gw0] [ 10%] PASSED tests/test_a.py::test_good ",
        "[gw3] [ 20%] FAILED tests/test_a.py::test_bad[cuda] ",
        "FAILED tests/test_a.py::test_bad[cuda] - AssertionError",
        "=== 1 failed, 1 passed in 2.00s ===",
    ]
    monkeypatch.setattr(checks, "lines_of", lambda *_, **__: iter(printed))
    rows = list(checks.suite(stages("target").Target()))
    assert (rows[0].shape, rows[0].status, len(rows)) == ("tests/test_a.py::test_bad[cuda]", "FAILED", 2)
    assert rows[-1].status == "1 failed, 1 passed in 2.00s"
    many = [f"[gw0] [ 10%] PASSED tests/test_a.py::test_good[{n}] " for n in range(250)]
    monkeypatch.setattr(checks, "lines_of", lambda *_, **__: iter(many))  # the suite was killed before its end
    rows = list(checks.suite(stages("target").Target()))
    assert [(r.shape, r.status) for r in rows[:2]] == [("100 tests", "ok so far"), ("200 tests", "ok so far")]
    assert rows[2].status == "no end"
    monkeypatch.setattr(checks, "lines_of", lambda *_, **__: iter(["=== 7 passed in 1.00s ==="]))
    assert [r.status for r in checks.suite(stages("target").Target())] == ["ok: 7 passed in 1.00s"]


# --- the carried folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def carried(stages: Callable[[str], ModuleType], tmp_path: Path) -> Path:
    """Return a folder as `make gpu-build` makes it, with stand-ins for the modules, and a package to put them into."""
    folder = tmp_path / "gpu"
    (folder / "include").mkdir(parents=True)
    (tmp_path / "package").mkdir()
    for name in ("_C_cuda.abi3.so", "_C_v4.abi3.so", "_C_jit.abi3.so", "include/device.cuh"):
        (folder / name).write_text(name)
    (folder / "manifest.json").write_text(json.dumps({"sources": stages("build").source_hash()}))
    return folder


def test_carried_kernels_are_used(stages: Callable[[str], ModuleType], carried: Path) -> None:
    package, log = carried.parent / "package", io.StringIO()
    tried = stages("build").provide_kernels(
        log, 1.0, carried=carried, package=package, loads=lambda _: None, build_there=lambda *_: pytest.fail("built")
    )
    assert [(name, how[:3]) for name, how in tried] == [("carried folder", "ok:")]
    assert (package / "_C_cuda.abi3.so").read_text() == "_C_cuda.abi3.so"
    assert (package / "include" / "device.cuh").exists()


def test_the_folder_is_small_and_complete(
    stages: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine with a GPU takes what `make gpu-build` writes. The compiler of the test only copies."""
    build, folder, package = stages("build"), tmp_path / "gpu", tmp_path / "package"
    package.mkdir()

    def compiles(into: Path, *_options: object) -> None:
        (into / "include").mkdir(parents=True, exist_ok=True)
        shutil.copy(next((ROOT / "blt_kernels").glob("_C_v*.so")), into / "_C_cuda.abi3.so")

    monkeypatch.setattr(build, "build", compiles)
    assert build.carry(folder).startswith(f"{folder}: ")
    build.install(folder, package)
    assert [path.name for path in package.glob("*.so")] == ["_C_cuda.abi3.so"]
    monkeypatch.setattr(build, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match="MB that may be carried"):
        build.carry(folder)
    assert not (folder / "manifest.json").exists()  # what is too large is not used
    monkeypatch.setattr(build, "newer_symbols", lambda _: ["GLIBC_2.99"])
    with pytest.raises(SystemExit, match=r"_C_cuda.abi3.so needs GLIBC_2.99"):
        build.carry(folder)


@pytest.mark.parametrize("fault", ["missing", "other sources", "does not load"])
def test_kernels_are_built_where_the_carried_ones_cannot_be_used(
    stages: Callable[[str], ModuleType], carried: Path, fault: str
) -> None:
    build, built = stages("build"), []
    if fault == "missing":
        shutil.rmtree(carried)
    elif fault == "other sources":
        (carried / "manifest.json").write_text(json.dumps({"sources": "?"}))

    def loads(_log: io.StringIO) -> None:
        if not built:
            raise RuntimeError("undefined symbol")

    def build_there(seconds: float, _log: io.StringIO) -> None:
        built.append(seconds)

    options = {"carried": carried, "package": carried.parent / "package", "loads": loads}
    tried = build.provide_kernels(io.StringIO(), 99.0, **options, build_there=build_there)
    expected = {
        "missing": "was not carried",
        "other sources": "was built from other sources: make gpu-build",
        "does not load": "RuntimeError: undefined symbol",
    }
    assert expected[fault] in tried[0][1]
    assert (tried[1][0], tried[1][1][:3], built) == ("build here", "ok:", [99.0])

    def fails(_seconds: float, _log: io.StringIO) -> None:
        raise RuntimeError("no nvcc")

    built.clear()
    tried = build.provide_kernels(io.StringIO(), 99.0, **options, build_there=fails)
    assert [how for _, how in tried][1] == "RuntimeError: no nvcc"  # the stages go on with what there is


def test_a_module_that_does_not_load_is_told(stages: Callable[[str], ModuleType]) -> None:
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA here")
    with pytest.raises(RuntimeError, match="BLT_KERNELS_CUDA=nvcc: torch was built without CUDA"):
        stages("build").check_that_they_load(io.StringIO())


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no binutils")
def test_modules_load_with_older_c_libraries(
    stages: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = stages("build")
    modules = sorted((ROOT / "blt_kernels").glob("*.so"))
    assert modules
    for module in modules:
        assert build.newer_symbols(module) == []
    monkeypatch.setitem(build.NEWEST_SYMBOLS, "GLIBC", (2, 3))
    assert any(name.startswith("GLIBC_2.") for name in build.newer_symbols(modules[0]))


def test_the_hash_is_of_all_sources(
    stages: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = stages("build")
    for name in ("CMakeLists.txt", "csrc/cuda/a.cu", "csrc/common/b.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    hashes = {build.source_hash()}
    for path in sorted(tmp_path.rglob("*.*")):
        path.write_text(f"{path} changed")
        hashes.add(build.source_hash())
    assert len(hashes) == 4
