"""The passes of the ops in CUDA C++ at the shapes of BASELINES.md, in the order of the table.

An entry has the arguments of a kernel as its .cuh declares them; a struct is a list. When a kernel's parameters change,
edit its entry in cases_*.py: sizes are compared with the PTX, and an access outside the arrays is an error.
"""

from __future__ import annotations

from collections.abc import Iterator

from cuda_model.cases_cross import cross_cases
from cuda_model.cases_ema import ema_cases
from cuda_model.cases_entropy import entropy_cases, head_cases
from cuda_model.cases_ngram import ngram_cases
from cuda_model.cases_rows import pool_cases
from cuda_model.launches import Case


def cases() -> Iterator[Case]:
    """Yield all cases in the order of the table."""
    yield from entropy_cases()
    yield from head_cases()
    yield from pool_cases()
    yield from ema_cases()
    yield from ngram_cases()
    yield from cross_cases()
