"""Gives the global transformer of a BLT the layers of a Llama (arXiv 2412.09871, section 6.2).

Embeddings, last norm and head of the Llama are not used.

A Llama is a directory in transformers' format, or a repository on the hub: ``config.json``, and ``model.safetensors``
or its shards and their index. transformers rotates entries j and j + E/2 of a head together, the layers here
entries 2j and 2j + 1, so the rows of the query and key projections are permuted.

The scaled rotary positions of Llama 3.1 and later are read too. Features that the layers here lack raise an error:
other scalings, biases, heads whose width is not ``hidden_size / num_attention_heads``, quantized weights, fields of
other models.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from blt_kernels.models.blt import BLT
from blt_kernels.models.checkpoint.files import Folder
from blt_kernels.models.checkpoint.transformers import read_llama
from blt_kernels.models.config import BLTConfig
from blt_kernels.models.weights import check_tensors, empty_model
from blt_kernels.nn import TransformerConfig


def read_config(path: str | os.PathLike[str], *, revision: str | None = None) -> TransformerConfig:
    """Return the configuration that a global transformer needs to hold the layers of a Llama.

    Parameters
    ----------
    path : str or PathLike
        A directory, or a repository on the hub, as in `BLT.from_pretrained`.
    revision : str, optional
        Of the repository.

    Raises
    ------
    ImportError
        For the hub, huggingface_hub is not installed.
    FileNotFoundError
        There is no such directory or repository, or no ``config.json`` in it.
    OSError
        The file cannot be read, or the hub does not answer (ConnectionError) or gives no access (PermissionError).
    ValueError
        It is not the configuration of a Llama, has unknown fields or asks for what the layers here lack, or the
        repository has no such revision; the message names it.
    """
    return read_llama(Folder.open(path, revision).json("config.json"))


@torch.no_grad()
def load_global_transformer(model: BLT, path: str | os.PathLike[str], *, revision: str | None = None) -> None:
    """Give the layers of a BLT's global transformer the weights of a Llama's.

    Parameters
    ----------
    model : BLT
        Its dtype and device stay. So do its other weights, and the window of its global transformer.
    path, revision
        As in `read_config`.

    Raises
    ------
    ImportError, OSError
        As `read_config`; or safetensors is not installed.
    ValueError
        As `read_config`; or a file is damaged, or the layers differ in number or shape from those of the model, or
        weights are missing, unknown, misshapen or no floats; the message names them.
    """
    head_dim, weights = read_config(path, revision=revision).head_dim, _weights(model, path, revision)
    for name, parameter in _parameters(model).items():
        value = weights[name]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = _interleave(value, head_dim)
        parameter.copy_(value)


def check_files(config: BLTConfig, path: str | os.PathLike[str], *, revision: str | None = None) -> None:
    """Raise what `load_global_transformer` raises for the files at `path`, before a model takes memory for its sizes.

    Parameters
    ----------
    config : BLTConfig
        Of the model.
    path, revision
        As in `read_config`.

    Raises
    ------
    ImportError, OSError, ValueError
        As `load_global_transformer`.
    """
    _check_config(config.global_transformer, path, revision)
    parts = (config.encoder, config.decoder, config.patcher)
    count = len(Folder.open(path, revision).weights()) + sum(part.num_layers for part in parts if part is not None)
    _weights(empty_model(f"{path}: does not fit the global transformer", BLT, config, "fused", count), path, revision)


def _check_config(own: TransformerConfig, path: str | os.PathLike[str], revision: str | None) -> None:
    theirs = read_config(path, revision=revision)
    for name in ("dim", "num_layers", "num_heads", "kv_heads", "hidden_dim", "rope_theta", "rope_scaling", "norm_eps"):
        if getattr(own, name) != getattr(theirs, name):
            field = {"kv_heads": "num_kv_heads", "hidden_dim": "ffn_dim"}.get(name, name)
            raise ValueError(
                f"global_transformer.{field}: expected {getattr(theirs, name)} of {path}, got {getattr(own, name)}"
            )


def _parameters(model: BLT) -> dict[str, Tensor]:
    return {f"layers.{name}": value for name, value in model.global_transformer.layers.named_parameters()}


def _weights(model: BLT, path: str | os.PathLike[str], revision: str | None) -> dict[str, Tensor]:
    """Return a Llama's layers by their names in a global transformer, with the shapes that `model` has."""
    _check_config(model.config.global_transformer, path, revision)
    folder = Folder.open(path, revision)
    weights = folder.weights()
    # A Llama without a head has no prefix.
    prefix = "model." if any(name.startswith("model.layers.") for name in weights) else ""
    weights = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(f"{prefix}layers.") and not name.endswith("rotary_emb.inv_freq")
    }
    expected = {name: value.shape for name, value in _parameters(model).items()}
    check_tensors(f"{folder}: does not fit the global transformer", weights, expected)
    return weights


def _interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Permute the rows of each head: j of the first half becomes 2j, j of the second half 2j + 1."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
