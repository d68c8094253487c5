"""Fixtures for tests of the Triton kernels: the interpreter in a process of its own."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from torch import Tensor
from triton_interpreter import SMALL, call, start


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=start) as pool:
        yield pool


@pytest.fixture
def run(interpreter: ProcessPoolExecutor) -> Callable[..., tuple[tuple[Tensor, ...], dict[str, int]]]:
    """Return results of `call`, and the products that each kernel made, or the bytes of tiles that it loaded."""

    def submit(arguments, grad=None, *, tiles=SMALL, splits=0, repeats=1, count="products"):
        message = pickle.dumps((arguments, grad, tiles, splits, repeats, count))  # pickling copies tensors
        return pickle.loads(interpreter.submit(call, message).result())

    return submit
