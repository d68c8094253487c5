"""Make the tables of the site and of README.md; ``python bench/readme.py`` writes the table and picture of README.md.

The table of ops follows from the package and the names of its source files. Results are files
``bench/results/<date>-<device>.csv``. A file with the name of a GPU gives the table of GPUs, another file that of CPUs.
Rows of bench_generate.py are in files ``generation-<date>-<device>.csv``.
"""

from __future__ import annotations

import csv
import re
import sys
from importlib import import_module
from pathlib import Path

import blt_kernels
from blt_kernels._extension import OPERATORS, is_triton
from blt_kernels._files import write_text

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "images"
MARKERS = ("<!-- speed:begin -->", "<!-- speed:end -->")
# Each entry has the title and the input in the small table, the op of the row, and the start of its shape.
SPEED = (
    ("BLT, forward | [1, 8192]", "BLT fwd", "63.9M parameters, [1, 8192]"),
    ("BLT, forward + backward | [1, 8192]", "BLT fwd+bwd", "63.9M parameters, [1, 8192]"),
    ("`entropy_patch` | [8, 8192, 260]", "entropy_patch", "[8, 8192, 260]"),
    ("`ngram_hash_embed` | [8, 8192], 6 tables", "ngram_hash_embed fwd", "[8, 8192], 6 x [500002, 512]"),
    ("`patch_pool`, maximum | [8, 8192, 512]", "patch_pool max fwd", "[8, 8192, 512]"),
    (
        "`patch_cross_attention` | 8192 bytes, 1809 patches",
        "patch_cross_attention encode fwd",
        "1 x 8192 bytes, 1809 patches",
    ),
    (
        "`block_causal_attention` | 8192 bytes, window 512",
        "block_causal_attention fwd",
        "window 512, [8192, 16, 64]",
    ),
    ("`ema_scan` | [8, 1820, 512]", "ema_scan fwd", "[8, 1820, 512]"),
)
SPEED_OF_GENERATION = (
    ("BLT, one more byte | behind 512 bytes", "BLT generation", "63.9M parameters, 16 bytes behind 512, batch 1,"),
)
GENERATION_SHAPE = re.compile(r"(.*), (\d+) bytes behind (\d+), batch (\d+), (.*) of state")  # bench_generate writes it
GPUS = "nvidia"
OURS, LIMIT = "blt_kernels", "limit: "
OTHER_MODEL = "ByteLM of "  # in rows of generation: a byte transformer of the size of the model
TOLD_ELSEWHERE = re.compile(r"scaling|latency|generation|^decode |^few_row_")
FORWARD, BACKWARD = " fwd", " fwd+bwd"

Row = dict[str, str]
Groups = dict[tuple[str, str], dict[str, list[Row]]]


def table_of_ops() -> str:
    """Return one line for each op: its public functions, the first sentence of its file, and who computes it."""
    lines = ["| op | what it does | CPU | CUDA |", "|---|---|---|---|"]
    for op in sorted(set(OPERATORS.values())):
        module = import_module(f"blt_kernels.ops.{op}")
        names = [
            n for n in blt_kernels.__all__ if getattr(getattr(blt_kernels, n), "__module__", "") == module.__name__
        ]
        shown = ", ".join(f"`{name}`" for name in sorted(names, key=lambda name: (name != op, name))) or f"`{op}`"
        meaning = " ".join(str(module.__doc__).split("\n\n")[0].split()).removeprefix(f"{op}: ").rstrip(".")
        cpu = "C++" if (ROOT / "csrc" / "cpu" / f"{op}.cpp").exists() else "reference"
        cuda = "Triton" if is_triton(op) else "CUDA" if (ROOT / "csrc" / "cuda" / f"{op}.cu").exists() else "reference"
        lines.append(f"| {shown} | {meaning} | {cpu} | {cuda} |")
    return "\n".join(lines)


def newest(folder: Path, kind: str) -> Path | None:
    """Return the newest results of a kind, "cpu" or "gpu"."""
    dated = [path for path in folder.glob("*.csv") if re.match(r"\d{4}-\d\d-\d\d-", path.name)]
    return max((path for path in dated if kind_of(path) == kind), default=None)


def kind_of(path: Path) -> str:
    return "gpu" if GPUS in path.name else "cpu"


def table(path: Path) -> str:
    """Return one line for every op and input, forward and backward side by side; `groups_of` says of which."""
    threads, alone, groups = groups_of(path)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    on_gpu, on_threads = kind_of(path) == "gpu", "1 thread" if threads == "1" else f"{threads} threads"
    how = "milliseconds, medians of interleaved rounds in one process"
    how = "milliseconds a call, medians of CUDA graphs of 20 calls replayed in turn" if on_gpu else how
    lines = [
        f"`{shown}`, {ceilings_of(alone) if on_gpu else on_threads}: {how}; in brackets the"
        " share of what the machine can read, copy or multiply; then how many times longer the best peer takes.",
        "",
        "| op | input | forward | best peer | forward + backward | best peer |",
        "|---|---|---:|---|---:|---|",
    ]
    for (op, inputs), passes in groups.items():
        cells = [*cells_of(passes.get(FORWARD, [])), *cells_of(passes.get(BACKWARD, []))]
        lines.append(f"| `{op}` | {inputs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def groups_of(path: Path) -> tuple[str, list[Row], Groups]:
    """Return the most threads measured, the rows of limits alone, and the other rows by op and input, then by pass.

    A measurement without a pass in its name is under forward. Scaling and latencies are left out, and so are rows that
    were not timed, and what was measured without a limit.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            row for row in csv.DictReader(file) if row["median_ms"] and (row.get("status") or "ok").startswith("ok")
        ]
    alone = [row for row in rows if row["op"].startswith(LIMIT)]
    limited = {key_of(row) for row in rows if row["implementation"].startswith(LIMIT)}
    rows = [row for row in rows if key_of(row) in limited]
    threads = max((row["threads"] for row in rows), key=int)
    groups: Groups = {}
    for row in rows:
        if row["threads"] == threads and not TOLD_ELSEWHERE.search(row["op"]):
            backward = row["op"].endswith(BACKWARD)
            op = row["op"].removesuffix(BACKWARD if backward else FORWARD)
            key = op, f"{row['shape']} {row['dtype']}"
            groups.setdefault(key, {}).setdefault(BACKWARD if backward else FORWARD, []).append(row)
    return threads, alone, groups


def key_of(row: Row) -> tuple[str, ...]:
    return row["op"], row["shape"], row["dtype"], row["threads"]


def ceilings_of(rows: list[Row]) -> str:
    """Return the measured bandwidth of a copy and rate of matrix products, in the units of data sheets."""
    found = {(row["op"].removeprefix(LIMIT), row["dtype"]): float(row["gb_per_s"]) / 1e3 for row in rows}
    return ", ".join(
        f"{what} {rate:.3g} TB/s" if what == "copy" else f"{dtype} product {rate:.3g} TFLOP/s"
        for (what, dtype), rate in found.items()
        if what in ("copy", "product")
    )


def cells_of(rows: list[Row]) -> tuple[str, str]:
    """Return our time, and the best peer with its ratio; both are empty where nothing was measured."""
    ours, peer = best_of(rows)
    if ours is None:
        return "", ""
    time = f"{milliseconds(float(ours['median_ms']))} ({float(ours['share_of_limit']):.0%})"
    return time, f"{peer}: {float(ours['ratio_to_best_peer']):.2g}" if peer else ""


def best_of(rows: list[Row]) -> tuple[Row | None, str | None]:
    """Return our row and the name of the fastest peer. Of two measurements of the same it takes the later one."""
    by_name = {row["implementation"]: row for row in rows}
    ours = by_name.pop(OURS, None)
    peers = {name: float(row["median_ms"]) for name, row in by_name.items() if not name.startswith(LIMIT)}
    return ours, min(peers, key=peers.__getitem__, default=None)


def milliseconds(value: float) -> str:
    """Return a time with three digits, and without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table_of_generation(path: Path) -> str:
    """Return one line for every model, prompt and batch, with the most threads measured."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["median_ms"] and "generation" in row["op"]]
    threads = max((row["threads"] for row in rows), key=int)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["threads"] == threads:
            groups.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    lines = [
        f"`{shown}`, {threads} threads: milliseconds to append a byte to every row of a batch, medians of interleaved"
        " rounds; the limit is reading the weights, keys and values; then how many times as long others take.",
        "",
        "| model | behind bytes | batch | ms | limit | state | others |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for (op, shape, dtype), group in groups.items():
        found, by_name = GENERATION_SHAPE.fullmatch(shape), {row["implementation"]: row for row in group}
        if found is None or OURS not in by_name:
            continue
        parameters, new, length, batch, state = found.groups()
        ours = float(by_name[OURS]["median_ms"]) / int(new)
        limit = ours * float(by_name[OURS]["share_of_limit"])
        others = [
            f"{name} {float(row['median_ms']) / int(new) / ours:.2g}"
            for name, row in by_name.items()
            if name != OURS and not name.startswith(LIMIT)
        ]
        model = f"{op.removesuffix(' generation')}, {parameters}, {dtype}"
        lines.append(f"| {model} | {length} | {batch} | {ours:.3g} | {limit:.2g} | {state} | {', '.join(others)} |")
    return "\n".join(lines)


def table_of_speed(ops: Path, generation: Path) -> str:
    """Return a small table: some measurements with two threads, the best of the others, and how long it takes.

    Raises
    ------
    ValueError
        One of the measurements is in neither file.
    """
    lines = [
        f"Median milliseconds in fp32 with two threads, from `{ops.stem}`, beside the fastest alternative.",
        "",
        "| what | input | ms | alternative | times as long |",
        "|---|---|---:|---|---:|",
    ]
    for path, name, op, shape in (
        *((ops, *row) for row in SPEED),
        *((generation, *row) for row in SPEED_OF_GENERATION),
    ):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["op"] == op and row["shape"].startswith(shape)]
        rows = [row for row in rows if row["dtype"] == "float32" and row["median_ms"]]
        if not rows:
            raise ValueError(f"{path.name}: expected rows of {op!r} with {shape!r}")
        by_name = {row["implementation"]: row for row in rows if row["threads"] == "2"}
        ours, written = by_name.pop(OURS), GENERATION_SHAPE.fullmatch(rows[0]["shape"])
        peers = {
            peer: float(row["median_ms"]) for peer, row in by_name.items() if not peer.startswith((LIMIT, OTHER_MODEL))
        }
        best = min(peers, key=peers.__getitem__)
        time, steps = float(ours["median_ms"]), int(written[2]) if written else 1
        ratio = peers[best] / time if written else float(ours["ratio_to_best_peer"])
        lines.append(f"| {name} | {milliseconds(time / steps)} | {best} | {ratio:.2g} |")
    return "\n".join(lines)


def with_table(text: str, folder: Path) -> str:
    """Return the README with a new table between the markers."""
    ops, generation = newest(folder, "cpu"), max(folder.glob("generation-*.csv"), default=None)
    return replaced(text, *MARKERS, table_of_speed(ops, generation) if ops and generation else "")


def replaced(text: str, begin: str, end: str, content: str) -> str:
    """Return the text with `content` between two markers."""
    before, rest = text.split(begin)
    lines = [begin, content, end] if content else [begin, end]
    return before + "\n".join(lines) + rest.split(end)[1]


def draw_picture(folder: Path) -> list[Path]:
    """Draw the picture of README.md, which the first page of the site has too, for light and for dark pages."""
    if str(ROOT / "docs") not in sys.path:
        sys.path.append(str(ROOT / "docs"))
    return import_module("extensions.figures").write("patches", folder)


def main() -> None:
    """Write README.md and its picture anew."""
    draw_picture(PICTURES)
    readme = ROOT / "README.md"
    write_text(readme, with_table(readme.read_text(encoding="utf-8"), ROOT / "bench" / "results"))


if __name__ == "__main__":
    main()
