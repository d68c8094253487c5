"""The fast tier, `make test-fast`, keeps a few cases of each property. `make test` runs all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_unless(cases: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Return parameters for `pytest.mark.parametrize`: the cases that are not in `fast` are marked as slow."""
    return [case if case in fast else slow(case) for case in cases]


def slow(*values: Any) -> Any:
    """Return one set of parameters that the fast tier leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)
