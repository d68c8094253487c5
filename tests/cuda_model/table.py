"""The table of estimates: bench/results/model-sm90.csv, a row for each kernel, shape and GPU, and one for each op.

What is compared is the time and the instructions of a row: a change by more than 10% either way is reported, so a
slower kernel fails `make cuda-check` and a faster one asks for a new table (`make cuda-check ARCHS=90a UPDATE=1`).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "bench" / "results" / "model-sm90.csv"
ALLOWED = 0.10
WHOLE = "all"  # a row for a whole op has this kernel


@dataclass(frozen=True)
class Row:
    """Holds one line of the table.

    Attributes
    ----------
    op, shape, dtype, gpu, kernel : what the row is of; `kernel` is "all" for an op with all of its launches
    launches : of the kernel
    us : estimated time of all launches, in microseconds
    share : of what a copy of the same bytes reaches, or of the measured rate of the tensor cores
    limit : the term that takes longest
    work : bytes that the op cannot do without, or flops
    instructions : warp instructions for each KB of work, or for each Mflop
    moved_mb : what goes to and from memory
    registers, warps : of a thread, and resident on a multiprocessor
    in_flight_kb, needed_kb : of loads on a multiprocessor on average, and what hides the latency of memory
    trips : dependent trips to memory of a warp
    measured_us, measured_share : as bench/gpu.py measured them; empty where it has not
    compiler : whose code the row is of
    """

    op: str
    shape: str
    dtype: str
    gpu: str
    kernel: str
    launches: int
    us: float
    share: float | None
    limit: str
    work: float
    instructions: float
    moved_mb: float
    registers: int | None
    warps: int | None
    in_flight_kb: float | None
    needed_kb: float | None
    trips: float | None
    measured_us: float | None
    measured_share: float | None
    compiler: str


Written = dict[str, str]  # is a row as it is in the file
KEY = ("op", "shape", "dtype", "gpu", "kernel")


def written(row: Row) -> Written:
    """Return a row in the form that the file has."""
    shown = asdict(row).items()
    return {k: f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for k, v in shown}


def key(row: Written) -> tuple[str, ...]:
    """Return the key of a row."""
    return tuple(row[name] for name in KEY)


def case_of(row: Written) -> tuple[str, str]:
    """Return the op and the shape of a row."""
    return row["op"], row["shape"]


def read(path: Path = TABLE) -> list[Written]:
    """Return the rows of a table; none if there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(rows: Iterable[Written], path: Path = TABLE) -> None:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def differences(old: Sequence[Written], new: Sequence[Written]) -> list[str]:
    """Return a line for each row of `new` that `old` lacks, or whose time or instructions moved by more than 10%."""
    before = {key(row): row for row in old}
    lines = []
    for row in new:
        name = ", ".join(key(row))
        if key(row) not in before:
            lines.append(f"new: {name}: {row['us']} us")
            continue
        was = before[key(row)]
        for column, unit in (("us", " us"), ("instructions", " instructions")):
            a, b = float(was[column]), float(row[column])
            if abs(b - a) > ALLOWED * a:
                change = "slower" if b > a else "faster"
                change = change if column == "us" else "more" if b > a else "fewer"
                compilers = was["compiler"], row["compiler"]
                by = "" if compilers[0] == compilers[1] else f" ({compilers[0]} then, {compilers[1]} now)"
                lines.append(f"{change}: {name}: {was[column]} -> {row[column]}{unit}{by}")
    return lines


def missing(old: Sequence[Written], new: Sequence[Written], whole: bool) -> list[str]:
    """Return a line for each row of the table that is gone; of ops in `new` alone unless that is the `whole`."""
    now, modeled = {key(row) for row in new}, {case_of(row) for row in new}
    gone = [row for row in old if key(row) not in now and (whole or case_of(row) in modeled)]
    return [f"gone: {', '.join(key(row))}" for row in gone]


def show(rows: Sequence[Written]) -> str:
    """Return a line for each whole op: time and share on each GPU, and what was measured."""
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    lines = [
        f"{'op':34} {'shape':58} " + " ".join(f"{g + ' us':>9} {'share':>6} {'limit':10} {'measured':>9}" for g in gpus)
    ]
    by_case: dict[tuple[str, ...], dict[str, Written]] = {}
    for row in rows:
        if row["kernel"] == WHOLE:
            by_case.setdefault((row["op"], row["shape"]), {})[row["gpu"]] = row
    for (op, shape), own in by_case.items():
        cells = [
            f"{float(own[g]['us']):9.4g} {float(own[g]['share']):6.0%} {own[g]['limit']:10} {own[g]['measured_us']:>9}"
            for g in gpus
        ]
        lines.append(f"{op:34} {shape[:58]:58} {' '.join(cells)}")
    return "\n".join(lines)


# --- measurements -----------------------------------------------------------------------------------------------------


def measurements(results: Path, gpu: str) -> list[Written]:
    """Return rows of our op in the newest file of bench/gpu.py for a GPU; none if it was never measured."""
    files = sorted(results.glob(f"20*{gpu.lower()}*.csv"))
    if not files:
        return []
    with files[-1].open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("implementation") == "blt_kernels"]


def measured(rows: Sequence[Written], op: str, dtype: str, shape: str) -> tuple[float | None, float | None]:
    """Return microseconds and share of an op, of the last row whose shape has `shape` in it.

    Benches measure "fwd" and "fwd+bwd"; "bwd" is the difference, and has no share.
    """

    def of(name: str) -> Written | None:
        found = [r for r in rows if r["op"] == name and r["dtype"] == dtype and shape in r["shape"]]
        found = [r for r in found if r["median_ms"] not in ("", "nan") and (r.get("status") or "ok").startswith("ok")]
        return found[-1] if found else None

    own = of(op) or (of(op.removesuffix(" fwd")) if op.endswith(" fwd") else None)
    if own is not None:
        return float(own["median_ms"]) * 1e3, float(own["share_of_limit"])
    if op.endswith(" bwd"):
        both, forward = of(op.removesuffix("bwd") + "fwd+bwd"), of(op.removesuffix("bwd") + "fwd")
        if both is not None and forward is not None:
            return (float(both["median_ms"]) - float(forward["median_ms"])) * 1e3, None
    return None, None
