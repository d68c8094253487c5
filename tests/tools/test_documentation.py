"""Docstrings of the public functions and classes: their sections are there, and their examples run."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import blt_kernels
from blt_kernels import distributed, flops, integrations, models, nn, optim, testing
from blt_kernels.integrations import bytelatent, hnet, megabyte, transformers

OWN = (blt_kernels, nn, models, optim, testing, flops, distributed)
MODULES = (*OWN, integrations, bytelatent, hnet, megabyte, transformers)


def is_function(value: Any) -> bool:
    return callable(value) and inspect.isfunction(inspect.unwrap(value))


def public(module: ModuleType) -> dict[str, Any]:
    """Return the public functions and classes of a module: those of `__all__`, or else those that it defines."""
    values = {name: getattr(module, name) for name in getattr(module, "__all__", vars(module)) if name[0] != "_"}
    values = {name: value for name, value in values.items() if is_function(value) or inspect.isclass(value)}
    listed = hasattr(module, "__all__")
    return {name: value for name, value in values.items() if listed or value.__module__ == module.__name__}


def arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def methods(cls: type) -> dict[str, Callable[..., Any]]:
    """Return the public methods that a class defines and that take arguments: for the others a summary is enough."""
    found = {name: inspect.unwrap(getattr(cls, name)) for name in vars(cls) if name[0] != "_"}
    routines = {name: value for name, value in found.items() if is_function(value)}
    return {f"{cls.__name__}.{name}": value for name, value in routines.items() if arguments(value)}


def has_section(value: Any, section: str) -> bool:
    return f"\n{section}\n{'-' * len(section)}\n" in (inspect.getdoc(value) or "")


PUBLIC = {f"{module.__name__}.{name}": value for module in MODULES for name, value in public(module).items()}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if is_function(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
METHODS = {name: value for cls in CLASSES.values() for name, value in methods(cls).items()}


def missing_sections(function: Callable[..., Any]) -> list[str]:
    """Return the sections that a function lacks. An op and whatever checks or raises by itself needs Raises."""
    sections = []
    if inspect.signature(function).return_annotation not in ("None", inspect.Signature.empty):
        sections.append("Returns")
    if arguments(function):
        sections.append("Parameters")
        checks = re.search(r"\braise \w|\bassert |_checks\.(check_|pack\()", inspect.getsource(function))
        if checks or function.__module__.startswith("blt_kernels.ops"):
            sections.append("Raises")
    return [section for section in sections if not has_section(function, section)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_section_is_there(name: str) -> None:
    function = FUNCTIONS[name]
    missing = missing_sections(function)
    if not has_section(function, "Examples"):
        missing.append("Examples")
    assert missing == []


@pytest.mark.parametrize("name", METHODS)
def test_every_section_of_a_method_is_there(name: str) -> None:
    assert missing_sections(METHODS[name]) == []


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_arguments_and_an_example(name: str) -> None:
    cls = CLASSES[name]
    section = "Attributes" if dataclasses.is_dataclass(cls) else "Parameters"
    assert has_section(cls, section) or "__init__" not in vars(cls)
    assert has_section(cls, "Examples")


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name: str, stand_ins: None) -> None:
    names = {key.rpartition(".")[2]: value for key, value in PUBLIC.items()} | {"torch": torch}
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(PUBLIC[name], name, globs=names):
        log: list[str] = []
        failures, _ = runner.run(test, out=log.append)
        assert failures == 0, "".join(log)
