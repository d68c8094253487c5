"""The byte-level models are composed from the ops.

`cu_seqlens` delimits the rows of a batch, in models and ops alike. The docstrings of the ops call a row a document.
Here a row of a training batch may hold several documents, each ended by EOS: with ``split_documents``, attention stops
at those ends too, and a model gives its attention ops the offsets of the documents in place of those of the rows.
"""

from __future__ import annotations

import os

import torch

from blt_kernels.models.base import ByteModel, model_name
from blt_kernels.models.blt import BLT
from blt_kernels.models.byte_lm import ByteLM
from blt_kernels.models.checkpoint import holds_blt
from blt_kernels.models.config import BLTConfig, ByteLMConfig, MegaByteConfig
from blt_kernels.models.megabyte import MegaByte

__all__ = ["BLT", "BLTConfig", "ByteLM", "ByteLMConfig", "ByteModel", "MegaByte", "MegaByteConfig", "load_model"]


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
        A file that `ByteModel.save` wrote, or a directory as `BLT.from_pretrained` and `ByteLM.from_pretrained` read.
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
    if os.path.isdir(path):
        model: type[BLT | ByteLM] = BLT if holds_blt(path) else ByteLM
        return model.from_pretrained(path, ops, dtype=dtype, device=device)
    classes: dict[str, type[ByteModel]] = {cls.__name__: cls for cls in (ByteLM, BLT, MegaByte)}
    name = model_name(path)
    if name not in classes:
        raise ValueError(f"path: expected a file of {', '.join(classes)}, got {name!r} in {path}")
    return classes[name].load(path, ops, dtype=dtype, device=device)
