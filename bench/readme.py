"""Write the table of the newest results into README.md: ``python bench/readme.py [CSV]``."""

from __future__ import annotations

import csv
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OURS, LIMIT = "blt_kernels", "limit: "


def table(path: Path) -> str:
    """One line for every comparison of ours with a peer or a limit, with the largest number of threads measured."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    threads = max((row["threads"] for row in rows), key=int)
    rows = [row for row in rows if row["threads"] == threads and "scaling" not in row["op"]]
    lines = [
        f"`{path.relative_to(ROOT)}`, {threads} threads, medians of interleaved rounds in one process:",
        "",
        "| op | input | ours, ms | best peer | its time / ours | share of the limit |",
        "|---|---|---:|---|---:|---:|",
    ]
    for (op, shape, dtype), group in groupby(rows, key=lambda row: (row["op"], row["shape"], row["dtype"])):
        by_name = {row["implementation"]: row for row in group}
        ours = by_name.pop(OURS)
        peers = {name: float(row["median_ms"]) for name, row in by_name.items() if not name.startswith(LIMIT)}
        best = min(peers, key=peers.__getitem__, default="none")
        ratio = f"{peers[best] / float(ours['median_ms']):.1f}" if peers else ""
        share = f"{float(ours['share_of_limit']):.0%}" if ours["share_of_limit"] else ""
        lines.append(f"| `{op}` | {shape} {dtype} | {float(ours['median_ms']):.3g} | {best} | {ratio} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the markers."""
    results = sorted((ROOT / "bench" / "results").glob("*.csv"))
    path = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else results[-1]
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table(path)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
