"""The tables of the pages on contributing fit the code."""

from __future__ import annotations

import pytest
from traffic_table import measure, read


def test_traffic_is_as_stored() -> None:
    stored, counted = read(), measure()
    assert [(row["op"], row["minimum"]) for row in counted] == [(row["op"], row["minimum"]) for row in stored]
    for row, other in zip(counted, stored, strict=True):
        assert int(row["moved"]) == pytest.approx(int(other["moved"]), rel=0.02), "python tests/traffic_table.py"
