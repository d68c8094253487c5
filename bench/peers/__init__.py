"""A user would run these instead of the ops: steps of other code bases and torch's own functions, one file an op.

transformers' own functions are called where it is installed. facebookresearch/blt is no package; what it does is
written out, with the checks that it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for the shapes that it is called with, as a benchmark would want.

    Earlier graphs are dropped: torch allows a function so many of them only, of all comparisons together.
    """
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)
