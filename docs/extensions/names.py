"""Public names between single backticks in docstrings become links, in prose and in the types of arguments."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

from sphinx.application import Sphinx

MODULES = (
    "blt_kernels",
    "blt_kernels.nn",
    "blt_kernels.models",
    "blt_kernels.optim",
    "blt_kernels.testing",
    "blt_kernels.flops",
    "blt_kernels.distributed",
    "blt_kernels.integrations",
    "blt_kernels.integrations.bytelatent",
    "blt_kernels.integrations.hnet",
    "blt_kernels.integrations.megabyte",
    "blt_kernels.integrations.transformers",
)
IN_BACKTICKS = re.compile(r"(?<![`:\w])`([A-Za-z_]\w*)`(?![`\w])")
TYPE = re.compile(r"(?P<before>\(|^:returns: )\*(?P<type>[^*()]+)\*(?P<after>\)|$| --)")


def public_names() -> dict[str, str]:
    """Return the role and full name of each public function and class, unless two modules have one of that name."""
    found: dict[str, list[str]] = {}
    for module_name in MODULES:
        module = import_module(module_name)
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            listed = hasattr(module, "__all__") or getattr(value, "__module__", None) == module_name
            if listed and name[0] != "_" and (inspect.isclass(value) or inspect.isroutine(value)):
                role = "class" if inspect.isclass(value) else "func"
                found.setdefault(name, []).append(f":py:{role}:`~{module_name}.{name}`")
    return {name: roles[0] for name, roles in found.items() if len(roles) == 1}


NAMES = public_names()


def link(_app: Sphinx, _kind: str, name: str, _value: Any, _options: Any, lines: list[str]) -> None:
    """Put links into a docstring, except to what it describes itself."""
    own = name.rpartition(".")[2]

    def role(found: re.Match[str]) -> str:
        return found[0] if found[1] == own else NAMES.get(found[1], found[0])

    def typed(found: re.Match[str]) -> str:
        words = re.split(r"(\w+)", found["type"])
        if not any(word in NAMES for word in words):
            return found[0]
        return found["before"] + "".join(NAMES.get(word, word) for word in words) + found["after"]

    in_example = False
    for i, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if not in_example:
            lines[i] = TYPE.sub(typed, IN_BACKTICKS.sub(role, line))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the handler, which runs after napoleon's."""
    app.connect("autodoc-process-docstring", link, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
