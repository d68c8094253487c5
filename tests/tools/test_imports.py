"""Imports of the package go one way and in no circle. Imports inside of functions and for type checkers count too."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import blt_kernels

PACKAGE = Path(blt_kernels.__file__).parent
ROOT = "blt_kernels"
# Layers are listed from the bottom up. A module imports modules of its own layer and of those below.
# "" is `blt_kernels/__init__.py`.
LAYERS = (
    ("_version", "_namespace", "_files", "_pickles", "_checks", "_padded", "layout"),
    ("reference", "_nvrtc", "bpe"),
    ("_extension", "triton", "testing"),
    ("ops",),
    ("ids", "optim"),
    ("", "nn"),
    ("models",),
    ("distributed", "flops", "_flop_counter"),
    ("integrations", "train"),
    ("cli", "__main__"),
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


@cache
def modules() -> dict[str, Path]:
    """Return the files of the package by the names of their modules."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join((ROOT, *(part for part in parts if part != "__init__")))] = path
    return names


def imports_of(name: str) -> set[str]:
    """Return the modules of the package that a module imports, without the packages around them."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: expected absolute imports"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else str(node.module))
    return {module for module in found if module.split(".")[0] == ROOT}


def layer_of(name: str) -> str:
    return (name + ".").split(".")[1]


@pytest.mark.parametrize("name", modules())
def test_imports_go_one_way(name: str) -> None:
    upwards = [other for other in imports_of(name) if RANKS[layer_of(other)] > RANKS[layer_of(name)]]
    assert upwards == [], f"{name} is below them"


def test_no_imports_go_in_a_circle() -> None:
    TopologicalSorter({name: imports_of(name) for name in modules()}).prepare()  # a CycleError names the cycle


def test_references_import_layouts_alone() -> None:
    for name in modules():
        if layer_of(name) == "reference":
            others = {other for other in imports_of(name) if layer_of(other) != "reference"}
            assert others <= {f"{ROOT}.layout"}, name
