"""Checkpoints of transformers and of facebookresearch/blt: read both, write the first.

Weights are not copied: on the CPU, and without another dtype, the parameters are the mapped file. The one exception are
the hash tables of facebookresearch/blt, which become one. A key that is missing, unknown or of the wrong shape is an
error that names it as the file does.

transformers (checked against version 5.23): ``config.json`` and ``model.safetensors``, or its shards and their index.
A BLT holds its patcher (keys ``model.patcher.*``); a patcher alone has the ``model_type`` ``blt_patcher``. The model
computes what transformers does, quirks included: it pools at every encoder layer, groups the heads of cross attention
too, knows no documents, and patches by byte unless the configuration says ``entropy`` and ``patch_in_forward``. What is
not taken over: dropout, which is never applied; and a quirk in the logits at the last byte of a row, which no loss
sees. With ``max_patch_length``, transformers lets no patch open after that byte in those rows of a batch that have the
most patches; here, as in facebookresearch/blt, the boundary decision counts in every row. What only this package knows
(``split_documents``, the threshold of a patcher alone) is written to ``config.json`` under names that transformers
ignores.

facebookresearch/blt at 9774ed4. Checked by hand, on the CPU and with dense masks in place of xformers and of compiled
attention: files that its code wrote from random weights give the logits and patch lengths of that code. No released
file was at hand: that those have the names, the layout and the arguments described here could not be verified.

- ``params.json`` (the training arguments) and ``consolidated.pth`` (``{"model": ...}``), read with ``weights_only``.
- On the hub: ``config.json`` (``{"args": ...}``, the model's arguments alone), ``model.safetensors`` or
  ``consolidated.pth``, and the training arguments as ``train_args.json``.

The patching rule is that of ``data.patcher_args``, if there are training arguments. The entropy model lies in a
directory of its own. Of its ``params.json``, as in that repository's ``load_entropy_model``, only the sizes are read:
the window is 512, theta 10000 and epsilon 1e-5 whatever it says. Documents are split, as with xformers and the bias
"block_causal", which its configurations train with. Arguments that ask for what `BLT` lacks are errors; those that its
code ignores are ignored. Buffers ``freqs_cis`` are left out: they are computed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from blt_kernels.models import checkpoint_formats as formats
from blt_kernels.models.blt import BLT
from blt_kernels.models.byte_lm import ByteLM
from blt_kernels.nn import ByteModel, check_tensors, safetensors_module, write_safetensors

Names = Callable[[str], list[str]]


def read_blt(
    path: str | os.PathLike[str],
    ops: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    patcher: str | os.PathLike[str] | None,
    revision: str | None,
    changes: Mapping[str, Any],
) -> BLT:
    """`BLT.from_pretrained`."""
    folder = Folder.open(path, revision)
    values = folder.json("config.json", "params.json")
    names: Names = formats.transformers_names
    foreign = "model_type" not in values
    if foreign:
        training = folder.json("train_args.json") if folder.find("train_args.json") else values
        config = formats.bytelatent_blt(values, training)
        names = partial(formats.bytelatent_names, tables=config.num_functions * len(config.ngram_sizes))
    else:
        values.expect("model_type", "blt")
        config = formats.transformers_blt(values)
    with torch.device("meta"):
        model = BLT(replace(config, **changes), ops)
    _fill(model, folder, folder.weights(), names, dtype, device)

    source = None
    if patcher is not None:
        source = Folder.open(patcher, revision)
    elif foreign:
        source = next((place for place in folder.patchers() if place.find("config.json", "params.json")), None)
    if source is not None:
        model.patcher = _read_byte_lm(source, ops, dtype, device, {}).requires_grad_(False)
        model.config = replace(model.config, patcher=model.patcher.config)
    return model


def read_byte_lm(
    path: str | os.PathLike[str],
    ops: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    revision: str | None,
    changes: Mapping[str, Any],
) -> ByteLM:
    """`ByteLM.from_pretrained`."""
    return _read_byte_lm(Folder.open(path, revision), ops, dtype, device, changes)


def _read_byte_lm(
    folder: Folder, ops: str, dtype: torch.dtype | None, device: torch.device | str, changes: Mapping[str, Any]
) -> ByteLM:
    values = folder.json("config.json", "params.json")
    weights = folder.weights()
    if "model_type" not in values:
        config, names = formats.bytelatent_byte_lm(values), formats.bytelatent_names
    elif values["model_type"] == "blt":
        values.expect("patch_in_forward", True)  # there is no patcher without
        config, names = formats.transformers_patcher(values), partial(_prefixed, "model.patcher.")
        weights = {name: value for name, value in weights.items() if name.startswith("model.patcher.")}
    else:
        values.expect("model_type", "blt_patcher")
        config, names = formats.transformers_byte_lm(values), partial(_prefixed, "")
    with torch.device("meta"):
        model = ByteLM(replace(config, **changes), ops)
    _fill(model, folder, weights, names, dtype, device)
    return model


def read_model(
    path: str | os.PathLike[str], ops: str, dtype: torch.dtype | None, device: torch.device | str
) -> BLT | ByteLM:
    """`blt_kernels.models.load_model` of a directory: a BLT, or an entropy model alone."""
    values = Folder.open(path, None).json("config.json", "params.json")
    if formats.is_blt(values):
        return read_blt(path, ops, dtype, device, None, None, {})
    return read_byte_lm(path, ops, dtype, device, None, {})


def write_blt(model: BLT, path: str | os.PathLike[str]) -> None:
    """`BLT.save_pretrained`."""
    _write(model, path, formats.transformers_blt_values(model.config), formats.transformers_names)


def write_byte_lm(model: ByteLM, path: str | os.PathLike[str]) -> None:
    """`ByteLM.save_pretrained`."""
    values = formats.transformers_byte_lm_values(model.config)
    alone = {"architectures": ["BltPatcher"], "model_type": "blt_patcher", "patching_threshold": model.config.threshold}
    _write(model, path, {**alone, **values}, partial(_prefixed, ""))


def _prefixed(prefix: str, name: str) -> list[str]:
    return [prefix + name]


# --- files and weights ------------------------------------------------------------------------------------------------


class Folder:
    """Files by name: of a directory, or of a repository on the hub and a folder in it."""

    def __init__(self, path: str, repository: str | None, revision: str | None) -> None:
        self.path, self.repository, self.revision = path, repository, revision

    @staticmethod
    def open(path: str | os.PathLike[str], revision: str | None) -> Folder:
        path = os.fspath(path)
        if os.path.isdir(path):
            return Folder(path, None, None)
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)/?((?:\w[\w.-]*/?)*)", path)
        if match is None:
            raise FileNotFoundError(f"path: expected a directory or a repository on the hub, got {path}")
        return Folder(match[2], match[1], revision)

    def __str__(self) -> str:
        return self.path if self.repository is None else str(PurePosixPath(self.repository, self.path))

    def patchers(self) -> list[Folder]:
        """Where the entropy model of a BLT may be: in its folder or beside it."""
        parents = [self.path]
        if self.path or self.repository is None:
            parents.append(os.path.join(self.path, "..") if self.repository is None else os.path.dirname(self.path))
        return [Folder(os.path.join(p, "entropy_model"), self.repository, self.revision) for p in parents]

    def find(self, *names: str) -> Path | None:
        """The first of these files that there is."""
        files = (self._local(name) if self.repository is None else self._remote(name) for name in names)
        return next((file for file in files if file is not None), None)

    def get(self, *names: str) -> Path:
        file = self.find(*names)
        if file is None:
            raise FileNotFoundError(f"{self}: expected {' or '.join(names)}, found none")
        return file

    def json(self, *names: str) -> formats.Values:
        return formats.Values.read(self.get(*names))

    def weights(self) -> dict[str, Tensor]:
        """All tensors by their names, mapped."""
        index = "model.safetensors.index.json"
        file = self.get("model.safetensors", index, "consolidated/consolidated.pth", "consolidated.pth")
        if file.suffix == ".pth":
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            if "model" not in state:
                raise ValueError(f"{file}: expected weights under 'model', got {', '.join(map(str, state))}")
            return state["model"]
        shards = [file]
        if file.suffix == ".json":
            shards = [self.get(name) for name in sorted(set(formats.Values.read(file)["weight_map"].values()))]
        tensors = {}
        for shard in shards:
            with safetensors_module().safe_open(shard, "pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        return tensors

    def _local(self, name: str) -> Path | None:
        file = Path(self.path, name)
        return file if file.is_file() else None

    def _remote(self, name: str) -> Path | None:
        try:
            import huggingface_hub as hub
        except ImportError as error:
            message = f"there is no directory {self}, and the hub needs huggingface_hub: pip install 'blt-kernels[hub]'"
            raise ImportError(message) from error
        assert self.repository is not None
        file = str(PurePosixPath(self.path, name))
        try:
            return Path(hub.hf_hub_download(self.repository, file, revision=self.revision))
        except hub.errors.EntryNotFoundError:
            return None


def _fill(
    model: ByteModel,
    folder: Folder,
    weights: dict[str, Tensor],
    names: Names,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Give a model on the meta device its weights: a parameter has the rows of its `names` in the files, in turn."""
    weights = {name: value for name, value in weights.items() if not name.endswith("freqs_cis")}
    parts = {name: names(name) for name in model.state_dict()}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    expected = {part: (shapes[name][0] // len(of), *shapes[name][1:]) for name, of in parts.items() for part in of}
    check_tensors(f"{folder}: does not fit {type(model).__name__}", weights, expected)
    state = {}
    for name, of in parts.items():
        if len(of) == 1:
            state[name] = weights[of[0]].to(device=device, dtype=dtype)
        else:
            state[name] = torch.empty(shapes[name], dtype=dtype or weights[of[0]].dtype, device=device)
            for rows, part in zip(state[name].chunk(len(of)), of, strict=True):
                rows.copy_(weights[part])
    model.load_state_dict(state, assign=True)


def _write(model: ByteModel, path: str | os.PathLike[str], values: Mapping[str, Any], names: Names) -> None:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {names(name)[0]: value.detach().contiguous() for name, value in model.state_dict().items()}
    dtype = str(model.get_parameter("lm_head.weight").dtype).removeprefix("torch.")
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**values, "dtype": dtype}, indent=2) + "\n")
