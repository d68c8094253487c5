"""Docstrings of the public functions: their sections are there, and their examples run."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import blt_kernels

FUNCTIONS = [name for name in blt_kernels.__all__ if inspect.isfunction(getattr(blt_kernels, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_section_is_there(name: str) -> None:
    function = getattr(blt_kernels, name)
    signature = inspect.signature(function)
    sections = ["Examples"]
    if signature.return_annotation != "None":
        sections.append("Returns")
    if signature.parameters:
        sections += ["Parameters", "Raises"]
    missing = [s for s in sections if f"\n{s}\n{'-' * len(s)}\n" not in inspect.getdoc(function)]
    assert missing == []


@pytest.mark.parametrize("name", blt_kernels.__all__)
def test_examples_run(name: str) -> None:
    names = {public: getattr(blt_kernels, public) for public in blt_kernels.__all__} | {"torch": torch}
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(getattr(blt_kernels, name), name, globs=names):
        log: list[str] = []
        failures, _ = runner.run(test, out=log.append)
        assert failures == 0, "".join(log)
