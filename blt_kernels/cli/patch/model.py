"""Loads the entropy model that ``blt-kernels patch`` and ``demo`` cut with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from blt_kernels.models import BLT, ByteLM
from blt_kernels.models.base import model_name
from blt_kernels.models.byte_lm import BUNDLED
from blt_kernels.train import checks


def load_entropy_model(path: Path | None = None) -> ByteLM:
    """Load the entropy model in a safetensors file or in a checkpoint's directory, or the one in the package.

    Of a BLT, it is the patcher, with the threshold of the BLT.

    Raises
    ------
    ImportError
        safetensors is not installed; the message has the command.
    FileNotFoundError, ValueError
        There is no such file, or it holds no ByteLM. The message says how to get one.
    """
    try:
        from safetensors import SafetensorError
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--model: needs safetensors: pip install 'blt-kernels[cli]'") from None
    file = BUNDLED if path is None else path
    if file.is_dir():
        with checks.reading("model"):
            return ByteLM.from_pretrained(file, dtype=torch.float32).eval()
    if not file.is_file():
        train = "train one: blt-kernels train entropy PATH..."
        if path is None:
            raise ValueError(f"--model: the package has no {file.name} in it; install it again, or {train}")
        raise ValueError(
            f"--model {path}: expected a file or a directory. Leave it out to use the model in the package, or {train}"
        )
    try:
        if model_name(file) == BLT.__name__:
            blt = BLT.load(file, dtype=torch.float32)
            if blt.patcher is None:
                raise ValueError("the BLT in it has none")
            blt.patcher.config = replace(blt.patcher.config, threshold=blt.config.threshold)
            return blt.patcher.eval()
        return ByteLM.load(file, dtype=torch.float32).eval()
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"--model {file}: expected a ByteLM in safetensors: {error}") from error
