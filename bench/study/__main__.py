"""``python bench/study`` runs `study.command`, and ``python bench/study long`` `study.long_context`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # processes that a run starts import this file too
    sys.path[0] = str(Path(__file__).parents[1])  # this package and `timing` are in it

    if sys.argv[1:2] == ["long"]:
        from study import long_context

        long_context.main(sys.argv[2:])
    else:
        from study import command

        command.main()
