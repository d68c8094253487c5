"""The end of ``make gpu``: one screen, which is all that a lent machine is sure to return."""

from __future__ import annotations

from collections.abc import Iterable

MAX_CHARACTERS = 11_500  # the end of the output that comes back has 12,000
MAX_FAILURES = 25
OURS, LIMIT = "blt_kernels", "limit: "
Row = dict[str, str]


def summary(rows: list[Row], seconds: float) -> str:
    """Return one screen: versions, failures, the time of every stage, then timings, the most informative first."""
    failed = [row for row in rows if not row["status"].startswith("ok")]
    notes = [row["status"].removeprefix("ok: ") for row in rows if row["op"] in ("versions", "kernels", "build")]
    stages = [f"{row['op'].removeprefix('stage ')} {seconds_of(row):.0f} s" for row in rows if is_stage(row)]
    lines = [f"==== make gpu: {len(rows)} rows, {len(failed)} failed, {seconds:.0f} s", *(note[:900] for note in notes)]
    lines += [f"stages: {', '.join(stages)}", ""]
    smoke = [row for row in rows if row["op"].startswith("smoke ")]
    if smoke:
        good = sum(row["status"].startswith("ok") for row in smoke)
        lines.append(f"smoke: {good} of {len(smoke)} cases right")
    lines += [
        f"failed: {row['op']} {row['shape'][:60]} {row['implementation']}: {row['status']}"[:240] for row in failed
    ][:MAX_FAILURES]
    if len(failed) > MAX_FAILURES:
        lines.append(f"... and {len(failed) - MAX_FAILURES} more failures")
    lines += ["", *times(rows), *others(rows)]
    return cut(lines)


def is_stage(row: Row) -> bool:
    return row["op"].startswith("stage ") and row["status"] == "ok"


def seconds_of(row: Row) -> float:
    return float(row["median_ms"]) / 1e3


def times(rows: list[Row]) -> Iterable[str]:
    """Return our time of every comparison, its share of the limit, and the best peer."""
    found = [row for row in rows if row["median_ms"] and row["op"].split()[0] not in ("stage", "search", "ncu")]
    for row in found:
        if row["op"].startswith((LIMIT, "smallest")):
            yield f"{row['op']} {row['shape']} {row['dtype']}: {float(row['median_ms']):.4g} ms, {row['gb_per_s']} G/s"
    by_comparison: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        by_comparison.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    for (op, shape, dtype), group in by_comparison.items():
        ours = next((row for row in group if row["implementation"] == OURS), None)
        if ours is None or op.startswith((LIMIT, "smallest")):
            continue
        peers = [row for row in group if row is not ours and not row["implementation"].startswith(LIMIT)]
        best = min(peers, key=lambda row: float(row["median_ms"]), default=None)
        against = f", {ours['ratio_to_best_peer']}x {best['implementation']}" if best else ""
        share = f", {float(ours['share_of_limit']):.0%}" if ours["share_of_limit"] else ""
        time = f"{float(ours['median_ms']):.4g} ms{share}{against}"
        yield f"{op} {shape[:50]} {dtype}: {time}"


def others(rows: list[Row]) -> Iterable[str]:
    """Return the fastest launch of every kernel beside the table's, and what the counters say."""
    by_kernel: dict[str, list[Row]] = {}
    for row in rows:
        if row["op"].startswith("search ") and row["median_ms"]:
            by_kernel.setdefault(row["op"], []).append(row)
    for kernel, found in by_kernel.items():
        best = min(found, key=lambda row: float(row["median_ms"]))
        table = next((row for row in found if "table" in row["status"]), best)
        yield f"{kernel}: best {best['median_ms']} ms with {best['shape']}; the table's {table['median_ms']} ms"
    for row in rows:
        if row["op"].startswith("ncu ") and row["median_ms"]:
            yield f"{row['op'][:70]} {float(row['median_ms']):.4g} ms: {row['status'].removeprefix('ok, ')}"


def cut(lines: list[str]) -> str:
    """Return as many of the lines as the device tool returns."""
    kept: list[str] = []
    left = MAX_CHARACTERS
    for number, line in enumerate(lines):
        left -= len(line) + 1
        if left < 60:
            kept.append(f"... {len(lines) - number} more lines are in the CSV file")
            break
        kept.append(line)
    return "\n".join(kept)
