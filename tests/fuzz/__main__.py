"""Fuzzes the loaders of files and the arguments of the ops: ``PYTHONPATH=tests python -m fuzz [files] [ops]``.

The parts share the time equally. The exit code is 1 if a part finds something.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

PARTS = tuple(part for part in ("files", "ops") if Path(__file__).with_name(f"{part}.py").exists())


def main() -> int:
    """Run the parts that the command line names, all of them if it names none."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; all if none is given")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all parts together")
    parser.add_argument("--seed", type=int, default=0, help="first seed; a run of the same seed has the same cases")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"expected parts among {', '.join(PARTS)}, got {', '.join(unknown)}")
    parts = arguments.parts or list(PARTS)
    found = 0
    for part in parts:
        found += import_module(f"fuzz.{part}").main(60 * arguments.minutes / len(parts), arguments.seed)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
