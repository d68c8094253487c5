"""Every op with its settings: `test_ops.py` runs all shared checks on them. ``cases/<op>.py`` has those of one op."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

_FILES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
CASES = [case for op in _FILES for case in import_module(f"cases.{op}").CASES]
