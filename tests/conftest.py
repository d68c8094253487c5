"""Hypothesis profiles (``HYPOTHESIS_PROFILE=ci`` by default, or ``long``), and what every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: the first call of an op may compile or load something.
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that this machine has."""
    return request.param


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests are small, and may run beside each other: more threads only wait. Those that ask for more get them."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
