"""Hypothesis profiles (``HYPOTHESIS_PROFILE=ci`` by default, or ``long``), and what every test may ask for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, DEVICES, use
from hypothesis import HealthCheck, settings

from blt_kernels.integrations import _applied

STAND_INS = Path(__file__).parent / "stand_ins"

# There is no deadline, since the first call of an op may compile or load something.
# Fixtures may be shared by all examples: `device` holds no state, and threads are set once.
shared = [HealthCheck.function_scoped_fixture]
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, suppress_health_check=shared)
settings.register_profile("long", max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect on the emulator what has no kernel in CUDA C++: it would run the CPU's kernels a second time.

    Of the cases that it does run, mark as slow those that the fast tier leaves to the CPU kernels.
    """
    left_out = set()
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters is None or parameters.params.get("backend") != "emulated":
            continue
        case = parameters.params.get("case")
        if item.get_closest_marker("triton") is not None or not getattr(case, "emulated", True):
            left_out.add(item)
        elif not getattr(case, "fast", True):
            item.add_marker("slow")
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return what runs the operators: "cpu", "reference", "emulated" or "cuda"."""
    with use(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> str:
    """Return the device of the tensors for each backend: the reference and the emulator run on "cpu"."""
    return "cuda" if backend == "cuda" else "cpu"


@pytest.fixture(params=DEVICES)
def installed(request: pytest.FixtureRequest) -> str:
    """Return a device of this machine, to test what torch makes of the kernels that the package loads."""
    return request.param


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the code bases of `tests/stand_ins`, which are not on the package index, be imported while the test runs."""
    places = [path for path in STAND_INS.iterdir() if path.is_dir()]

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in {path.name for path in places}]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(str(STAND_INS))
    yield
    forget()
    _applied._SLOTS.clear()  # Nobody undoes what was applied to the forgotten modules.


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests are small, and may run beside each other: more threads only wait. Those that ask for more get them."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
