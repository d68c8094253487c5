"""``blt-kernels bench``: the measurements of ``bench/`` in one process, as a table and as CSV."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.table import Table

from blt_kernels.tools.render import Color, console

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


def run(
    ops: list[str],
    *,
    threads: list[int],
    rounds: int,
    small: bool,
    compile_peers: bool,
    device: str,
    csv: Path | None,
    save: bool,
    color: Color,
) -> None:
    """Measure, print a table for every comparison as it is done, and write the rows.

    Parameters
    ----------
    ops
        Which ``bench_<op>.py`` to run; all of them if empty.
    threads
        Numbers of CPU threads to measure with, one after the other.
    rounds
        Times that every implementation is measured.
    small, compile_peers, device
        Passed to the benches: small inputs, peers through torch.compile as well, "cpu" or "cuda".
    csv
        File to append the rows to; ``bench/results/<date>-<device>.csv`` if None.
    save
        Write the rows at all.

    Raises
    ------
    FileNotFoundError, ValueError
        There are no benches, or none of that name; a value is out of range; results of some implementations disagree,
        which then were not timed.
    """
    folder = find_benches()
    known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    for op in ops:
        if op not in known:
            raise ValueError(f"ops: expected some of {', '.join(known)}, got {op!r}")
    if rounds < 1 or min(threads, default=0) < 1:
        raise ValueError(f"rounds and threads: expected at least 1, got {rounds} and {threads}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu, since torch sees no CUDA device, got 'cuda'")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    timing = importlib.import_module("timing")
    out, rows, wrong = console(color), [], []
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for op in ops or known:
                module = importlib.import_module(f"bench_{op}")
                for new in _measure(module, timing, rounds, small=small, device=device, compile_peers=compile_peers):
                    if isinstance(new, str):
                        out.print(f"not timed, since results disagree: {new}", style="red", markup=False)
                        wrong.append(new)
                    else:
                        out.print(_table(new))
                        rows += new
    finally:
        torch.set_num_threads(before)
    for op in ops or known:
        for line in importlib.import_module(f"bench_{op}").remarks(rows):
            out.print(line)
    out.print(
        "Medians of interleaved rounds. Share: of the limit, the fastest of several ways to read, copy or multiply as "
        "much. Ratio: times that the best peer takes as long."
    )
    if save:
        out.print(f"wrote {timing.write_csv(rows, csv, device)}", soft_wrap=True)
    if wrong:
        raise ValueError(f"{len(wrong)} comparisons were not timed, since their results disagree")


def _measure(module: ModuleType, timing: ModuleType, rounds: int, **options: Any) -> Iterator[list[Any] | str]:
    """The rows of every comparison, or how its results disagree. Those of one op that differ in shape come together."""
    for (op, dtype), group in groupby(module.comparisons(**options), key=lambda c: (c.op, c.dtype)):
        rows = []
        for comparison in group:
            try:
                rows += timing.compare(comparison, rounds=rounds)
            except AssertionError as error:
                yield f"{op} {comparison.shape} {dtype}: {error}"
        if rows:
            yield rows


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
