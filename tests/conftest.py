"""Hypothesis profiles (``HYPOTHESIS_PROFILE=ci`` by default, or ``long``), and what every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from backends import BACKENDS, use
from hypothesis import HealthCheck, settings

# No deadline: the first call of an op may compile or load something.
# Fixtures may be shared by all examples: `device` holds no state, and threads are set once.
shared = [HealthCheck.function_scoped_fixture]
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, suppress_health_check=shared)
settings.register_profile("long", max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of the tensors, once for every backend: the reference and the emulator run on "cpu"."""
    with use(request.param) as device:
        yield device


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests are small, and may run beside each other: more threads only wait. Those that ask for more get them."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
