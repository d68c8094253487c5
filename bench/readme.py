"""Write the table of the newest results into README.md: ``python bench/readme.py [CSV]``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from blt_kernels._files import write_text

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OURS, LIMIT = "blt_kernels", "limit: "
FORWARD, BACKWARD = " fwd", " fwd+bwd"


def table(path: Path) -> str:
    """One line for every op and input, forward and backward side by side, with the most threads measured.

    What has no pass in its name stands under forward. Scaling is told elsewhere.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    threads = max((row["threads"] for row in rows), key=int)
    groups: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        if row["threads"] == threads and "scaling" not in row["op"]:
            backward = row["op"].endswith(BACKWARD)
            op = row["op"].removesuffix(BACKWARD if backward else FORWARD)
            key = f"`{op}`", f"{row['shape']} {row['dtype']}"
            groups.setdefault(key, {}).setdefault(BACKWARD if backward else FORWARD, []).append(row)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    lines = [
        f"`{shown}`, {threads} threads: milliseconds, medians of interleaved rounds in one process; in brackets the"
        " share of what the machine can read, copy or multiply; then how many times longer the best peer takes.",
        "",
        "| op | input | forward | best peer | forward + backward | best peer |",
        "|---|---|---:|---|---:|---|",
    ]
    for (op, inputs), passes in groups.items():
        cells = [*cells_of(passes.get(FORWARD, [])), *cells_of(passes.get(BACKWARD, []))]
        lines.append(f"| {op} | {inputs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cells_of(rows: list[dict[str, str]]) -> tuple[str, str]:
    """Our time, and the best peer with its ratio; both empty where nothing was measured."""
    by_name = {row["implementation"]: row for row in rows}
    if OURS not in by_name:
        return "", ""
    ours = by_name.pop(OURS)
    peers = {name: float(row["median_ms"]) for name, row in by_name.items() if not name.startswith(LIMIT)}
    best = min(peers, key=peers.__getitem__, default=None)
    time = f"{float(ours['median_ms']):.3g} ({float(ours['share_of_limit']):.0%})"
    return time, f"{best}: {float(ours['ratio_to_best_peer']):.2g}" if best else ""


def main() -> None:
    """Replace what stands between the markers."""
    results = sorted((ROOT / "bench" / "results").glob("*.csv"))
    path = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else results[-1]
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    write_text(readme, f"{before}{BEGIN}\n{table(path)}\n{END}{after}")


if __name__ == "__main__":
    main()
