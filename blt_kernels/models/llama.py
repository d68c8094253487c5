"""The global transformer of a BLT from Llama (arXiv 2412.09871, section 6.2): its layers, without embeddings, last norm
and head.

A Llama is a directory in transformers' format, or a repository on the hub: ``config.json``, and ``model.safetensors``
or its shards and their index. transformers turns entries j and j + E/2 of a head together, the layers here 2j and
2j + 1: so the rows of the query and key projections change places.

The scaled rotary positions of Llama 3.1 and later come along. What the layers here lack is an error: other scalings of
them, biases, heads whose width is not ``hidden_size / num_attention_heads``.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from blt_kernels.models.blt import BLT
from blt_kernels.models.checkpoint import Folder
from blt_kernels.models.checkpoint_formats import rope
from blt_kernels.nn import TransformerConfig, check_tensors


def read_config(path: str | os.PathLike[str], *, revision: str | None = None) -> TransformerConfig:
    """The configuration that a global transformer needs to hold the layers of a Llama.

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
        There is no such directory, or no ``config.json`` in it.
    ValueError
        It is not the configuration of a Llama, or asks for what the layers here lack; the message names it.
    """
    values = Folder.open(path, revision).json("config.json")
    values.expect("model_type", "llama")
    values.expect("hidden_act", "silu")
    values.expect("attention_bias", False)
    values.expect("mlp_bias", False)
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    if values.get("head_dim") is not None:
        values.expect("head_dim", dim // heads)
    kv_heads = values.get("num_key_value_heads") or heads
    return TransformerConfig(
        dim,
        values["num_hidden_layers"],
        heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        ffn_dim=values["intermediate_size"],
        norm_eps=values["rms_norm_eps"],
        **rope(values, 10000.0),
    )


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
    ImportError, FileNotFoundError
        As `read_config`; or safetensors is not installed.
    ValueError
        As `read_config`; or the layers differ in number or shape from those of the model, or keys are missing, unknown
        or misshapen; the message names them.
    """
    llama, own = read_config(path, revision=revision), model.config.global_transformer
    for name in ("dim", "num_layers", "num_heads", "kv_heads", "hidden_dim", "rope_theta", "rope_scaling", "norm_eps"):
        if getattr(own, name) != getattr(llama, name):
            field = {"kv_heads": "num_kv_heads", "hidden_dim": "ffn_dim"}.get(name, name)
            raise ValueError(
                f"global_transformer.{field}: expected {getattr(llama, name)} of {path}, got {getattr(own, name)}"
            )
    folder = Folder.open(path, revision)
    weights = folder.weights()
    prefix = "model." if any(name.startswith("model.layers.") for name in weights) else ""  # none without a head
    weights = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(f"{prefix}layers.") and not name.endswith("rotary_emb.inv_freq")
    }
    parameters = {f"layers.{name}": value for name, value in model.global_transformer.layers.named_parameters()}
    expected = {name: value.shape for name, value in parameters.items()}
    check_tensors(f"{folder}: does not fit the global transformer", weights, expected)
    for name, parameter in parameters.items():
        value = weights[name]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = _interleave(value, llama.head_dim)
        parameter.copy_(value)


def _interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head: j of the first half becomes 2j, j of the second half 2j + 1."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
