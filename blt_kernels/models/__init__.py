"""The byte-level models are composed from the ops.

`cu_seqlens` delimits the rows of a batch, in models and ops alike. The docstrings of the ops call a row a document.
Here a row of a training batch may hold several documents, each ended by EOS: with ``split_documents``, attention stops
at those ends too, and a model gives its attention ops the offsets of the documents in place of those of the rows.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blt_kernels.models.base import ByteModel
from blt_kernels.models.blt import BLT
from blt_kernels.models.byte_lm import ByteLM
from blt_kernels.models.checkpoint import holds_blt
from blt_kernels.models.checkpoint import read_config as checkpoint_config
from blt_kernels.models.checkpoint.files import CONFIGURATIONS
from blt_kernels.models.config import BLTConfig, ByteLMConfig, MegaByteConfig
from blt_kernels.models.megabyte import MegaByte
from blt_kernels.models.state import ByteState
from blt_kernels.models.stored_config import model_name, stored_config

__all__ = [
    "BLT",
    "BLTConfig",
    "ByteLM",
    "ByteLMConfig",
    "ByteModel",
    "ByteState",
    "MegaByte",
    "MegaByteConfig",
    "load_model",
]

MODELS: dict[str | None, type[ByteModel]] = {cls.__name__: cls for cls in (ByteLM, BLT, MegaByte)}


def load_model(
    path: str | os.PathLike[str],
    ops: str = "fused",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> ByteModel:
    """Load a model of any class.

    Parameters
    ----------
    path : str or PathLike
        A file that `ByteModel.save` wrote, the directory of a training run, which has one, or a directory as
        `BLT.from_pretrained` and `ByteLM.from_pretrained` read.
    ops, dtype, device
        As in `ByteModel.load`.

    Returns
    -------
    BLT, ByteLM or MegaByte

    Raises
    ------
    OSError, ImportError, ValueError
        As in `ByteModel.load` and `BLT.from_pretrained`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ByteLM.from_values({"dim": 8, "num_layers": 0, "num_heads": 1}).save(f"{folder}/model.safetensors")
    ...     type(load_model(f"{folder}/model.safetensors")).__name__
    'ByteLM'
    """
    file = _saved_file(path)
    if file is None:
        model: type[BLT | ByteLM] = BLT if holds_blt(path) else ByteLM
        return model.from_pretrained(path, ops, dtype=dtype, device=device)
    return _class_in(file).load(file, ops, dtype=dtype, device=device)


def load_patcher(path: str | os.PathLike[str], ops: str = "fused") -> ByteLM:
    """Load an entropy model in fp32: a `ByteLM`, or the patcher of a `BLT`, with the threshold of the BLT.

    Parameters
    ----------
    path : str or PathLike
        As in `load_model`.
    ops : "fused" or "reference"

    Returns
    -------
    ByteLM

    Raises
    ------
    OSError, ImportError, ValueError
        As in `load_model`; or the model has no patcher.
    """
    file = _saved_file(path)
    if file is None:
        return ByteLM.from_pretrained(path, ops, dtype=torch.float32)
    if _class_in(file) is not BLT:
        return ByteLM.load(file, ops, dtype=torch.float32)
    model = BLT.load(file, ops, dtype=torch.float32)
    if model.patcher is None:
        raise ValueError(f"path: expected a BLT with a patcher, got one without in {file}")
    model.patcher.config = replace(model.patcher.config, threshold=model.config.threshold)
    return model.patcher


def read_config(path: str | os.PathLike[str]) -> Any:
    """Return the configuration of a model that `load_model` reads, without reading its weights."""
    file = _saved_file(path)
    if file is None:
        return checkpoint_config(path)
    cls = _class_in(file)
    return stored_config(file, cls.__name__, cls.config_class)


def _saved_file(path: str | os.PathLike[str]) -> Path | None:
    """Return the file that `ByteModel.save` wrote, at `path` or in a run there; None for directories of checkpoints."""
    file = Path(path)
    if not file.is_dir():
        return file
    if any((file / name).exists() for name in CONFIGURATIONS) or not (file / "model.safetensors").exists():
        return None
    return file / "model.safetensors"


def _class_in(file: Path) -> type[ByteModel]:
    name = model_name(file)
    if name not in MODELS:
        raise ValueError(f"path: expected a file of {', '.join(map(str, MODELS))}, got {name!r} in {file}")
    return MODELS[name]
