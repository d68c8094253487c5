"""`Place` tells the replacement of a function of facebookresearch/blt what it replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from blt_kernels.integrations._applied import Applied

Function = Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """Holds what a replacement needs to call the code base and to count its calls.

    Attributes
    ----------
    applied : Applied
    path : the function or method, as the report names it
    theirs : the stock function
    home : the module that defines it
    modules : all modules that `apply` imports, by their names without "bytelatent."
    """

    applied: Applied
    path: str
    theirs: Function
    home: ModuleType
    modules: Mapping[str, ModuleType]

    def count(self) -> None:
        """Count a call that ours computes."""
        self.applied.count(self.path)

    def fell_back(self, reason: str) -> None:
        """Count something that is left to the code base."""
        self.applied.fell_back(self.path, reason)

    def counted(self, function: Function) -> Function:
        """Return `function` with its calls counted."""
        return self.applied.counted(self.path, function)
