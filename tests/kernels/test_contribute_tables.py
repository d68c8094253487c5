"""The tables of the pages on contributing fit the code: traffic is counted anew, and each planted fault has a place."""

from __future__ import annotations

import pytest
from fault_check import FAULTS, ROOT, read
from traffic_table import measure
from traffic_table import read as read_traffic


def test_traffic_is_as_stored() -> None:
    stored, counted = read_traffic(), measure()
    assert [(row["op"], row["minimum"]) for row in counted] == [(row["op"], row["minimum"]) for row in stored]
    for row, other in zip(counted, stored, strict=True):
        assert int(row["moved"]) == pytest.approx(int(other["moved"]), rel=0.02), "python tests/traffic_table.py"


def test_faults_fit_the_code() -> None:
    """Each fault changes one place of its file, and has been planted: `python tests/fault_check.py --only ...`."""
    for fault in FAULTS:
        text = (ROOT / fault.file).read_text()
        assert not fault.old or text.count(fault.old) == 1, fault.what
    assert [(row["kind"], row["fault"], row["file"]) for row in read()] == [(f.kind, f.what, f.file) for f in FAULTS]
