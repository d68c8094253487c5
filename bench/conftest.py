"""``pytest bench/bench_<op>.py`` runs every implementation of every comparison of a file through pytest-benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from timing import OURS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="small inputs, to see that the benches run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run_benchmark" in metafunc.fixturenames:
        found = [
            pytest.param((i, name), id=f"{c.op}-{c.shape}-{c.dtype}-{name}")
            for i, make in enumerate(metafunc.module.comparisons(small=metafunc.config.getoption("--small")))
            for c in [make()]
            for name in c.implementations
        ]
        metafunc.parametrize("run_benchmark", found, indirect=True)


@pytest.fixture
def run_benchmark(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], None]:
    """Run one implementation of one comparison, after a check that all of them agree."""
    index, implementation = request.param
    small = request.config.getoption("--small")
    comparison = next(itertools.islice(request.module.comparisons(small=small), index, None))()

    def run() -> None:
        if implementation == OURS:
            comparison.agree({name: function() for name, function in comparison.implementations.items()})
        benchmark.group = f"{comparison.op} {comparison.shape} {comparison.dtype}"
        benchmark.extra_info["work"] = comparison.work
        function = comparison.implementations[implementation]
        benchmark.pedantic(function, rounds=5 if small else 30, warmup_rounds=3)

    return run
