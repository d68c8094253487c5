"""Loads the entropy model that ``blt-kernels patch`` and ``demo`` cut with."""

from __future__ import annotations

from pathlib import Path

from blt_kernels.models import ByteLM, load_patcher
from blt_kernels.models.byte_lm import BUNDLED
from blt_kernels.train import checks


def load_entropy_model(path: Path | None = None) -> ByteLM:
    """Load the entropy model that `blt_kernels.models.load_patcher` finds at `path`, or the one in the package.

    Raises
    ------
    ImportError
        safetensors is not installed; the message has the command.
    FileNotFoundError, ValueError
        There is no such file, or it holds no ByteLM. The message says how to get one.
    """
    file = BUNDLED if path is None else path
    if not file.exists():
        train = "train one: blt-kernels train entropy PATH..."
        if path is None:
            raise ValueError(f"--model: the package has no {file.name} in it; install it again, or {train}")
        raise ValueError(
            f"--model {path}: expected a file or a directory. Leave it out to use the model in the package, or {train}"
        )
    with checks.reading("model"):
        return load_patcher(file).eval()
