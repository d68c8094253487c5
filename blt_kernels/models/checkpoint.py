"""Checkpoints of transformers and of facebookresearch/blt: read both, write the first.

Weights are not copied: on the CPU, and without another dtype, the parameters are the mapped file. The one exception are
the hash tables of facebookresearch/blt, which become one. A weight that is missing, unknown or of the wrong shape is an
error that names it as the file does. So is a field of a configuration that is unknown or asks for what the models here
lack: `blt_kernels.models.checkpoint_fields` has every field of both code bases, and what becomes of it. On the hub,
only its word that a file is not in a repository means that there is none: no answer, no access and no such revision are
errors of their own.

transformers (checked against version 5.23): ``config.json`` and ``model.safetensors``, or its shards and their index.
A BLT holds its patcher (keys ``model.patcher.*``); a patcher alone has the ``model_type`` ``blt_patcher``. The model
computes what transformers does, quirks included: it pools at every encoder layer, groups the heads of cross attention
too, knows no documents, and patches by byte unless the configuration says ``entropy`` and ``patch_in_forward``. What is
not taken over: dropout, which is never applied; and a quirk in the logits at the last byte of a row, which no loss
sees. With ``max_patch_length``, transformers lets no patch open after that byte in those rows of a batch that have the
most patches; here, as in facebookresearch/blt, the boundary decision counts in every row. What only this package knows
(documents, the threshold of a patcher alone) is written to ``config.json`` under names that transformers ignores.

facebookresearch/blt at 9774ed4. Checked by hand, on the CPU and with dense masks in place of xformers and of compiled
attention: files that its code wrote from random weights give the logits and patch lengths of that code. No released
file was at hand: that those have the names, the layout and the arguments described here could not be verified.

- ``params.json`` (the training arguments), and ``consolidated.pth`` (``{"model": ...}``), read with ``weights_only``,
  or the weights alone as ``consolidated.safetensors``; these may also lie in a folder ``consolidated``.
- On the hub: ``config.json`` (``{"args": ...}``, the model's arguments alone), ``model.safetensors`` or one of those
  files, and the training arguments as ``train_args.json``.

The patching rule is that of ``data.patcher_args``, if there are training arguments, and else that of the model's. The
entropy model lies in a directory of its own. Of its ``params.json``, as in that repository's ``load_entropy_model``,
only the sizes are read: the window is 512, theta 10000 and epsilon 1e-5 whatever it says, and documents are split.

Which entries attention reaches is what that code computes by ``attn_impl`` and ``attn_bias_type``. With "xformers", the
layers over bytes stop at ``eos_id``, and the global transformer at EOS with "block_causal", nowhere with "causal". With
"flex_attention", no layer stops anywhere, nor has a window. "sdpa" raises for all but "causal" there, unless an
environment variable makes it compute "causal" for all: it is read as what "xformers" computes. Buffers ``freqs_cis``
are left out: they are computed.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from blt_kernels._files import whole_file
from blt_kernels.models import checkpoint_formats as formats
from blt_kernels.models.blt import BLT, BLTConfig
from blt_kernels.models.byte_lm import ByteLM, ByteLMConfig
from blt_kernels.models.checkpoint_fields import Values
from blt_kernels.nn import ByteModel, check_tensors, open_safetensors, write_safetensors

Names = Callable[[str], list[str]]

CONFIGURATIONS = ("config.json", "params.json")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "consolidated/consolidated.safetensors",
    "consolidated.safetensors",
    "consolidated/consolidated.pth",
    "consolidated.pth",
)


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
    config, foreign = _blt_config(folder)
    names: Names = formats.transformers_names
    if foreign:
        names = partial(formats.bytelatent_names, tables=config.num_functions * len(config.ngram_sizes))
    with torch.device("meta"):
        model = BLT(replace(config, **changes), ops)
    _fill(model, folder, folder.weights(), names, dtype, device)

    source = Folder.open(patcher, revision) if patcher is not None else folder.patcher() if foreign else None
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


def _blt_config(folder: Folder) -> tuple[BLTConfig, bool]:
    """The configuration of a BLT, and whether it is one of facebookresearch/blt, whose entropy model lies elsewhere."""
    values = folder.json(*CONFIGURATIONS)
    if "model_type" in values:
        values.expect("model_type", "blt")
        return formats.transformers_blt(values), False
    training = folder.find("train_args.json")
    return formats.bytelatent_blt(values, values if training is None else Values.read(training)), True


def _byte_lm_config(values: Values) -> ByteLMConfig:
    if "model_type" not in values:
        return formats.bytelatent_byte_lm(values)
    if values["model_type"] == "blt":
        values.expect("patch_in_forward", True, True)  # there is no patcher without
        return formats.transformers_patcher(values)
    values.expect("model_type", "blt_patcher")
    return formats.transformers_byte_lm(values)


def _read_byte_lm(
    folder: Folder, ops: str, dtype: torch.dtype | None, device: torch.device | str, changes: Mapping[str, Any]
) -> ByteLM:
    values = folder.json(*CONFIGURATIONS)
    config, weights = _byte_lm_config(values), folder.weights()
    names: Names = partial(_prefixed, "")
    if "model_type" not in values:
        names = formats.bytelatent_names
    elif values["model_type"] == "blt":
        names = partial(_prefixed, "model.patcher.")
        weights = {name: value for name, value in weights.items() if name.startswith("model.patcher.")}
    with torch.device("meta"):
        model = ByteLM(replace(config, **changes), ops)
    _fill(model, folder, weights, names, dtype, device)
    return model


def read_model(
    path: str | os.PathLike[str], ops: str, dtype: torch.dtype | None, device: torch.device | str
) -> BLT | ByteLM:
    """`blt_kernels.models.load_model` of a directory: a BLT, or an entropy model alone."""
    if formats.is_blt(Folder.open(path, None).json(*CONFIGURATIONS)):
        return read_blt(path, ops, dtype, device, None, None, {})
    return read_byte_lm(path, ops, dtype, device, None, {})


def read_config(path: str | os.PathLike[str]) -> BLTConfig | ByteLMConfig:
    """The configuration of what `read_model` reads, without the weights."""
    folder = Folder.open(path, None)
    values = folder.json(*CONFIGURATIONS)
    if not formats.is_blt(values):
        return _byte_lm_config(values)
    config, foreign = _blt_config(folder)
    source = folder.patcher() if foreign else None
    return config if source is None else replace(config, patcher=_byte_lm_config(source.json(*CONFIGURATIONS)))


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

    def patcher(self) -> Folder | None:
        """The entropy model of a BLT: in its folder or beside it."""
        parents = [self.path]
        if self.path or self.repository is None:
            parents.append(os.path.join(self.path, "..") if self.repository is None else os.path.dirname(self.path))
        places = (Folder(os.path.join(p, "entropy_model"), self.repository, self.revision) for p in parents)
        return next((place for place in places if place.find(*CONFIGURATIONS)), None)

    def find(self, *names: str) -> Path | None:
        """The first of these files that there is."""
        files = (self._local(name) if self.repository is None else self._remote(name) for name in names)
        return next((file for file in files if file is not None), None)

    def get(self, *names: str) -> Path:
        file = self.find(*names)
        if file is None:
            raise FileNotFoundError(f"{self}: expected {' or '.join(names)}, found none")
        return file

    def json(self, *names: str) -> Values:
        return Values.read(self.get(*names))

    def weights(self) -> dict[str, Tensor]:
        """All tensors by their names, mapped."""
        file = self.get(*WEIGHTS)
        if file.suffix == ".pth":
            return _pickled(file)
        shards = [file]
        if file.suffix == ".json":
            places = Values.read(file).inner("weight_map")
            if not places or not all(isinstance(name, str) for name in places.values()):
                raise ValueError(f"{places}: expected the names of files by those of weights, got {dict(places)}")
            shards = [self.get(name) for name in sorted(set(places.values()))]
        tensors = {}
        for shard in shards:
            with open_safetensors(shard) as opened:
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
        except hub.errors.LocalEntryNotFoundError as error:  # it is not in the cache, and no answer came
            if hub.try_to_load_from_cache(self.repository, file, revision=self.revision) is hub._CACHED_NO_EXIST:
                return None
            reason = error if error.__cause__ is None else error.__cause__
            raise ConnectionError(f"{self}: the hub does not say whether there is {name}: {reason}") from error
        except hub.errors.EntryNotFoundError:
            return None
        except hub.errors.GatedRepoError as error:
            raise PermissionError(f"{self.repository}: the hub gives no access to it: {error}") from error
        except hub.errors.RepositoryNotFoundError as error:
            where = f"{self.repository}: there is no such directory, and no repository on the hub but private ones"
            raise FileNotFoundError(f"{where}: {error}") from error
        except hub.errors.RevisionNotFoundError as error:
            raise ValueError(f"revision: expected one of {self.repository}, got {self.revision!r}") from error
        except (OSError, ValueError):
            raise
        except Exception as error:  # of the HTTP client, which is another one in every version of the hub's
            raise ConnectionError(f"{self}: {name} could not be downloaded: {error!r}") from error


def _pickled(file: Path) -> dict[str, Tensor]:
    """The weights under "model" in a file of `torch.save`; no code in there is run."""
    try:
        state = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # of zip files, pickles and torch, by what is damaged
        raise ValueError(f"{file}: expected weights of torch.save, got {error!r}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        got = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{file}: expected weights under 'model', got {got}")
    return {name: value for name, value in state["model"].items() if isinstance(value, Tensor)}


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
    tensors = {names(name)[0]: value for name, value in model.state_dict().items()}
    dtype = str(model.get_parameter("lm_head.weight").dtype).removeprefix("torch.")
    with whole_file(folder / "config.json") as part:  # it comes into its place after the weights, if they do
        part.write_text(json.dumps({**values, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
