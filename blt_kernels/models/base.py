"""`ByteModel`, the base of the models."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from blt_kernels import _checks
from blt_kernels.models.generating import GeneratingModel
from blt_kernels.models.quantized import is_quantized
from blt_kernels.models.stored_config import config_from_dict, stored_config
from blt_kernels.models.weights import check_tensors, empty_model, open_safetensors, write_safetensors
from blt_kernels.nn import next_byte_targets
from blt_kernels.nn.functional import mean_bits
from blt_kernels.nn.matrices import target_nats

Model = TypeVar("Model", bound="ByteModel")


def check_targets(targets: Tensor | None, tokens: Tensor) -> None:
    """Raise TypeError or ValueError unless targets are int64 in the shape of the tokens, or None."""
    if targets is not None:
        _checks.check_tensor("targets", targets, (1, 2), (torch.int64,))
        _checks.check_shape("targets", targets, tokens.shape, "that of tokens")


class ByteModel(GeneratingModel):
    """Is the base of the models. It computes the loss, and keeps weights and configuration in one safetensors file.

    A subclass sets `config_class`, stores its configuration as `config` and its ops as `ops`, and defines `forward`,
    which returns logits, or nats if it is given `targets`.

    Examples
    --------
    >>> model = ByteLM.from_values({"dim": 32, "num_layers": 1, "num_heads": 2})
    >>> isinstance(model, ByteModel), model.config.dim
    (True, 32)
    """

    config_class: type
    ops: Any

    @classmethod
    def from_values(cls: type[Model], values: dict[str, Any], ops: str = "fused") -> Model:
        """Return a freshly initialized model.

        Parameters
        ----------
        values : dict
            Fields of the configuration, as `dataclasses.asdict` or JSON gives them. The others keep their defaults.
        ops : "fused" or "reference"

        Returns
        -------
        ByteModel
            An instance of the class that this is called on.

        Raises
        ------
        TypeError, ValueError
            A field is unknown, or has the wrong type or value; the message names it.
        """
        return cls(config_from_dict(cls.config_class, values), ops)

    def loss(self, tokens: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> Tensor:
        """Return bits per byte: the mean of ``-log2 p`` over every id that follows another in its row.

        Parameters
        ----------
        tokens : int32 or int64 ``[T]`` or ``[B, S]``
        cu_seqlens : int32 or int64 ``[R+1]``, optional
            Rows of packed tokens; one row if None.
        options
            As in `forward`.

        Returns
        -------
        fp32 (fp64 for an fp64 model), a scalar
            EOS counts as a byte. 0 if nothing is predicted. Logits are not stored.

        Raises
        ------
        TypeError, ValueError
            As in `forward`.
        """
        ids, rows = self.pack(tokens, cu_seqlens)
        targets = next_byte_targets(ids, rows.offsets, self.config.vocab_size).view(tokens.shape)
        return mean_bits(self(tokens, cu_seqlens, targets=targets, **options), targets)

    def _head(self, x: Tensor, tokens: Tensor, targets: Tensor | None) -> Tensor:
        """Return logits of normed states ``[T, D]``, or nats of the targets, in the shape of the tokens."""
        if targets is None:
            logits = self.lm_head(x)
            return logits if tokens.dim() == 1 else logits.view(*tokens.shape, logits.shape[-1])
        return target_nats(self.ops, self.lm_head, x, targets.flatten()).view(tokens.shape)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write weights and configuration to one ``.safetensors`` file, which replaces `path` only once it is complete.

        Tied weights are written under each of their names, so the model that `load` returns has copies.

        Parameters
        ----------
        path : str or PathLike
        dtype : torch.dtype, optional
            The weights keep their dtypes if None.

        Raises
        ------
        ImportError
            safetensors is not installed.
        OSError
            The file cannot be written.
        ValueError
            A parameter is on the meta device, or fake; or the model is `quantized`.
        """
        if is_quantized(self):
            raise ValueError("model: expected one that is not quantized, got one that is: save that it is a copy of")
        tensors = {name: value.to(dtype) for name, value in self.state_dict().items()}
        metadata = {"format": "pt", "model": type(self).__name__, "config": json.dumps(asdict(self.config))}
        write_safetensors(Path(path), tensors, metadata)

    @classmethod
    def load(
        cls: type[Model],
        path: str | os.PathLike[str],
        ops: str = "fused",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Model:
        """Read a file that `save` wrote.

        Parameters
        ----------
        path : str or PathLike
        ops : "fused" or "reference"
        dtype : torch.dtype, optional
            The stored dtypes if None.
        device : torch.device or str

        Returns
        -------
        ByteModel
            An instance of the class that this is called on.

        Raises
        ------
        ImportError
            safetensors is not installed.
        OSError
            The file cannot be read.
        ValueError
            The file is damaged or holds another model, its configuration is not one of this version, or keys are
            missing, unknown or of the wrong shape or dtype; the message names the file and them.
        """
        config = stored_config(path, cls.__name__, cls.config_class)
        with open_safetensors(path, device) as file:
            tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
        model = empty_model(f"{path}: does not fit {cls.__name__}", cls, config, ops, len(tensors))
        expected = {name: value.shape for name, value in model.state_dict().items()}
        check_tensors(f"{path}: does not fit {cls.__name__}", tensors, expected)
        model.load_state_dict(tensors, assign=True)
        return model
