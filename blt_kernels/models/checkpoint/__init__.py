"""Checkpoints of transformers and of facebookresearch/blt: this package reads both formats and writes the first.

Weights are not copied: on the CPU and without another dtype, the parameters are the mapped file. Only the hash tables
of facebookresearch/blt are copied, into one table. A weight that is missing, unknown or of the wrong shape is an error
that names it as the file does. A field of a configuration that is unknown, or that asks for what the models here lack,
is an error too: `transformers_fields` and `bytelatent_fields` list every field and what becomes of it. A file counts as
missing on the hub only where the hub says so. No answer, no access and an unknown revision are errors of their own.

transformers (checked with version 5.23) stores ``config.json``, and ``model.safetensors`` or its shards and their
index. A BLT holds its patcher under the keys ``model.patcher.*``. A patcher alone has the ``model_type``
``blt_patcher``. The model computes what transformers computes: it pools at every encoder layer, it groups the heads of
cross attention, it knows no documents, and it patches by byte unless the configuration says ``entropy`` and
``patch_in_forward``. Two things differ. Dropout is never applied. And with ``max_patch_length``, transformers opens no
patch after the last byte in those rows of a batch that have the most patches; here, as in facebookresearch/blt, that
boundary decision counts in every row. It changes the logits at the last byte of a row, which no loss reads. Fields that
only this package knows (documents, the threshold of a patcher alone) are written to ``config.json`` under names that
transformers ignores.

facebookresearch/blt was checked at 9774ed4, by hand and on the CPU, with dense masks in place of xformers and of
compiled attention: files that its code wrote from random weights give the logits and patch lengths of that code. No
released file was at hand, so the names, the layout and the arguments of the released files could not be verified. The
files are

- ``params.json`` (the training arguments), and ``consolidated.pth`` (``{"model": ...}``), read with ``weights_only``,
  or the weights alone as ``consolidated.safetensors``. The weights may also be in a folder ``consolidated``.
- On the hub: ``config.json`` (``{"args": ...}``, the model's arguments alone), ``model.safetensors`` or one of those
  files, and the training arguments as ``train_args.json``.

The patching rule is that of ``data.patcher_args`` where there are training arguments, and else the model's. The entropy
model has a directory of its own. Of its ``params.json`` only the sizes are read, as that repository's
``load_entropy_model`` does: the window is 512, theta 10000 and epsilon 1e-5 whatever the file says, and documents are
split.

``attn_impl`` and ``attn_bias_type`` decide which entries attention reaches, as in that code. With "xformers", the
layers over bytes stop at ``eos_id``, and the global transformer stops at EOS with "block_causal", nowhere with
"causal". With "flex_attention", no layer stops anywhere or has a window. "sdpa" raises there for all but "causal",
unless an environment variable makes it compute "causal" for all: it is read as what "xformers" computes. Buffers
``freqs_cis`` are ignored, since they are computed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from blt_kernels.models.checkpoint import bytelatent, transformers
from blt_kernels.models.checkpoint.fields import Values
from blt_kernels.models.checkpoint.files import CONFIGURATIONS, Folder, Names, write
from blt_kernels.models.config import BLTConfig, ByteLMConfig
from blt_kernels.models.weights import check_tensors, empty_model

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Stored:
    """A model in a checkpoint, found but not read.

    Attributes
    ----------
    folder : where its files are
    config : its configuration
    names : the name of a parameter -> the names that its rows have in the files
    prefix : the names of its weights begin with it; the others belong to other models
    apart : whether the entropy model of a BLT is in files of its own
    """

    folder: Folder
    config: Any
    names: Names
    prefix: str = ""
    apart: bool = False

    def load(
        self, cls: type[Model], ops: str, dtype: torch.dtype | None, device: torch.device | str, **changes: Any
    ) -> Model:
        """Return a model of a class, with these changes of its configuration.

        A parameter is the rows of its `names` in the files, in turn.
        """
        weights, what = self.folder.weights(), f"{self.folder}: does not fit {cls.__name__}"
        model = empty_model(what, cls, replace(self.config, **changes), ops, len(weights))
        weights = {name: value for name, value in weights.items() if self._is_own(name)}
        parts = {name: self.names(name) for name in model.state_dict()}
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        expected = {part: (shapes[name][0] // len(of), *shapes[name][1:]) for name, of in parts.items() for part in of}
        check_tensors(what, weights, expected)
        state = {}
        for name, of in parts.items():
            if len(of) == 1:
                state[name] = weights[of[0]].to(device=device, dtype=dtype)
            else:
                state[name] = torch.empty(shapes[name], dtype=dtype or weights[of[0]].dtype, device=device)
                for rows, part in zip(state[name].chunk(len(of)), of, strict=True):
                    rows.copy_(weights[part])
        model.load_state_dict(state, assign=True)
        return model

    def _is_own(self, name: str) -> bool:
        return name.startswith(self.prefix) and not name.endswith("freqs_cis")  # freqs_cis is computed

    def patcher(self) -> Stored | None:
        """Find the entropy model of a BLT that is in files of its own, None if there is none."""
        place = self.folder.patcher() if self.apart else None
        return None if place is None else _byte_lm(place)


def open_blt(path: str | os.PathLike[str], revision: str | None = None) -> Stored:
    """Find a BLT in a directory, or in a repository on the hub, and read its configuration."""
    folder = Folder.open(path, revision)
    values = folder.json(*CONFIGURATIONS)
    if "model_type" in values:
        values.expect("model_type", "blt")
        return Stored(folder, transformers.read_blt(values), transformers.names_of)
    training = folder.find("train_args.json")
    config = bytelatent.read_blt(values, values if training is None else Values.read(training))
    names = partial(bytelatent.names_of, tables=config.num_functions * len(config.ngram_sizes))
    return Stored(folder, config, names, apart=True)


def open_byte_lm(path: str | os.PathLike[str], revision: str | None = None) -> Stored:
    """Find an entropy model in a directory, or in a repository on the hub, and read its configuration."""
    return _byte_lm(Folder.open(path, revision))


def _byte_lm(folder: Folder) -> Stored:
    values = folder.json(*CONFIGURATIONS)
    if "model_type" not in values:
        return Stored(folder, bytelatent.read_byte_lm(values), bytelatent.names_of)
    if values["model_type"] == "blt":
        values.expect("patch_in_forward", True, True)  # without it there is no patcher
        prefix = "model.patcher."
        return Stored(folder, transformers.read_patcher(values), lambda name: [prefix + name], prefix)
    values.expect("model_type", "blt_patcher")
    return Stored(folder, transformers.read_byte_lm(values), lambda name: [name])


def holds_blt(path: str | os.PathLike[str]) -> bool:
    """Return whether a checkpoint has a whole BLT, and not an entropy model alone."""
    values = Folder.open(path, None).json(*CONFIGURATIONS)
    if "model_type" in values:
        return values["model_type"] == "blt"
    return bytelatent.is_blt(values)


def read_config(path: str | os.PathLike[str]) -> BLTConfig | ByteLMConfig:
    """Return the configuration of a checkpoint, without its weights."""
    if not holds_blt(path):
        return open_byte_lm(path).config
    stored = open_blt(path)
    patcher = stored.patcher()
    return stored.config if patcher is None else replace(stored.config, patcher=patcher.config)


def write_blt(model: nn.Module, config: BLTConfig, path: str | os.PathLike[str]) -> None:
    """Write a BLT for transformers: see `BLT.save_pretrained`."""
    write(model, path, transformers.write_blt(config), transformers.names_of)


def write_byte_lm(model: nn.Module, config: ByteLMConfig, path: str | os.PathLike[str]) -> None:
    """Write an entropy model for transformers: see `ByteLM.save_pretrained`."""
    alone = {"architectures": ["BltPatcher"], "model_type": "blt_patcher", "patching_threshold": config.threshold}
    write(model, path, {**alone, **transformers.write_byte_lm(config)}, lambda name: [name])
