"""``blt-kernels bench`` runs the measurements of ``bench/`` in one process and writes a table and a CSV."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from blt_kernels.cli.base import ColorOption, Command, app, numbers
from blt_kernels.cli.console import Color, console
from blt_kernels.train import checks

_MOST_THREADS = 1024
SOURCE = Path(__file__).resolve().parents[2] / "bench"


def find_benches() -> Path:
    """Return the folder of the benches, which belong to a checkout and are not part of an installed package.

    Raises
    ------
    FileNotFoundError
        Neither the package's own checkout nor the current directory has them.
    """
    for folder in (SOURCE, Path.cwd() / "bench"):
        if (folder / "timing.py").exists():
            return folder
    raise FileNotFoundError("the benches are not part of the installed package: run `blt-kernels bench` in a checkout")


@app.command(cls=Command)
def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Ops to measure; all if not given.")
    ] = None,
    threads: Annotated[str, typer.Option(help="Numbers of CPU threads, with commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(help="Rounds: every implementation is timed once a round.")] = 30,
    budget: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Time budget per implementation, in seconds; at least three rounds always run."
        ),
    ] = 5.0,
    small: Annotated[bool, typer.Option("--small", help="Small inputs, to see that everything runs.")] = False,
    compile_peers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure torch.compile as well.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time", help="Measure CPU time in place of the clock: where other processes run, with one thread."
        ),
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add to this file instead of bench/results/<date>-<device>.csv."),
    ] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write the CSV file and pictures.")] = True,
    color: ColorOption = Color.auto,
) -> None:
    """Time the ops beside the best that one could run instead, and beside the limit of the machine."""
    counts = numbers("--threads", threads, int)
    folder = find_benches()
    known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    for op in ops or ():
        if op not in known:
            raise ValueError(f"ops: expected some of {', '.join(known)}, got {op!r}")
    checks.check_count("rounds", rounds, 1)
    for count in counts:
        if not 1 <= count <= _MOST_THREADS:  # OpenMP ends the process for more
            raise ValueError(f"threads: expected 1 to {_MOST_THREADS}, got {count}")
    checks.check_finite("budget", budget, 0)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    checks.check_device(device)
    if cpu_time and (device != "cpu" or counts != [1]):
        raise ValueError(f"cpu_time: expected one thread of the CPU, got {threads} on {device}")
    if csv is not None and not save:
        raise ValueError(f"csv: expected None, since nothing is saved, got {csv}")
    if csv is not None and csv.is_dir():
        raise ValueError(f"csv: expected a file, got the directory {csv}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    timing = importlib.import_module("timing")
    modules = {op: importlib.import_module(f"bench_{op}") for op in ops or known}
    out, rows = console(color), []
    path = csv or timing.csv_path(device)
    timing.read_csv(path)  # it raises before anything is measured
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            for module in modules.values():
                options = {"small": small, "device": device, "compile_peers": compile_peers}
                compare = partial(timing.compare, rounds=rounds, budget=budget, cpu_time=cpu_time)
                for new in _measure(timing, module, compare, **options):
                    if measured := _measured(new):
                        out.print(_table(measured))
                    for row in _failed(new):
                        name = f"{row.implementation} of {row.op} {row.shape} {row.dtype}"
                        out.print(f"not timed: {name}: {row.status}", style="red", markup=False, soft_wrap=True)
                    rows += new
                    if save:  # at once: nothing is lost if the process ends
                        timing.write_csv(new, path)
    finally:
        torch.set_num_threads(before)
    for module in modules.values():
        for line in module.remarks(_measured(rows)):
            out.print(line, soft_wrap=True)
    out.print(
        "Medians of interleaved rounds. Share: of the limit, the fastest of several ways to read, copy or multiply as "
        "much. Ratio: times that the best peer takes as long. Extra MB: the most held during a call, outputs included."
    )
    if save and rows:
        out.print(f"wrote {path}", soft_wrap=True)
        for op, module in modules.items():
            if hasattr(module, "plot") and _measured(rows):
                _plot(module, _measured(rows), path.with_name(f"{path.stem}-{op}.png"), out)
    if failed := _failed(rows):
        raise ValueError(f"{len(failed)} implementations were not timed, since they failed or their results disagree")


def _measure(
    timing: ModuleType, module: ModuleType, compare: Callable[..., list[Any]], **options: Any
) -> Iterator[list[Any]]:
    """Yield the rows of every comparison, also of one that raises. The shapes of one op come together."""
    comparisons = (timing.rows_of(make, compare) for make in module.comparisons(**options))
    for _, group in groupby(comparisons, lambda rows: (rows[0].op, rows[0].dtype)):
        yield list(chain.from_iterable(group))


def _measured(rows: list[Any]) -> list[Any]:
    return [row for row in rows if row.status == "ok"]


def _failed(rows: list[Any]) -> list[Any]:
    return [row for row in rows if row.status != "ok"]


def _plot(module: ModuleType, rows: list[Any], path: Path, out: Console) -> None:
    try:
        module.plot(rows, path)
    except ModuleNotFoundError as missing:
        out.print(f"no {path.name}: it needs {missing.name}, pip install 'blt-kernels[cli]'", soft_wrap=True)
    else:
        out.print(f"wrote {path}", soft_wrap=True)


def _table(rows: list[Any]) -> Table:
    first = rows[0]
    arithmetic = first.bytes is None
    one_shape = len({row.shape for row in rows}) == 1
    table = Table(
        title=f"{first.op}  {first.shape if one_shape else ''}  {first.dtype}  {first.threads} threads",
        title_justify="left",
    )
    if not one_shape:
        table.add_column("shape")
    table.add_column("")
    for name in ("ms", "GFLOP/s" if arithmetic else "GB/s", "share", "ratio", "extra MB"):
        table.add_column(name, justify="right")
    for row in rows:
        style = (
            "bold" if row.implementation == "blt_kernels" else "dim" if row.implementation.startswith("limit") else None
        )
        values = [
            row.implementation,
            f"{row.median_ms:.4g}",
            f"{row.gb_per_s:.3g}",
            f"{row.share_of_limit:.0%}",
            "" if row.ratio_to_best_peer is None else f"{row.ratio_to_best_peer:.2f}",
            "" if row.extra_mb is None else f"{row.extra_mb:.1f}",
        ]
        table.add_row(*([] if one_shape else [row.shape]), *values, style=style)
    return table
