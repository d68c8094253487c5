"""Checkpoints by torch.distributed.checkpoint: any number of ranks reads what any number of ranks wrote.

A checkpoint is a directory named by its step. It holds weights and optimiser state in the files of that format, and
numbers, options and the configuration of the model in ``values.json``. It is complete once ``values.json`` and
``.metadata``, which is written last, are there; only then are older ones removed. So a run that is killed at any moment
has a complete one. Only checkpoints are removed: other files beside or inside of them stay.

The hash tables of a BLT are stored as ``[N, V, D]``: they are sharded in this shape.

``.metadata`` is a pickle, in which only the classes of that format may be (`_GLOBALS`), and what it says of the other
files is checked before they are read: no code in a checkpoint is run.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from blt_kernels._files import LIST_BYTES, check_regular, naming, read_bytes, read_json, shortened, sync_folder
from blt_kernels._pickles import Slice, check_pickle, check_torch_file
from blt_kernels.distributed import TableShards
from blt_kernels.models import BLT
from blt_kernels.models.base import ByteModel
from blt_kernels.train.parallel import Ranks, is_of_lost_rank

FORMAT = 1
_TABLES = "encoder_hash_tok_embedding.weight"
_OWN = re.compile(r"\.metadata(\.tmp)?|values\.json|__\d+_\d+\.distcp")  # matches the files of a checkpoint
_DATA = re.compile(r"__\d+_\d+\.distcp", re.ASCII)
_GLOBALS = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|TensorStorageMetadata|TensorProperties"
    r"|ChunkStorageMetadata|StorageMeta|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo|torch\.serialization\._get_layout|torch\.Size"
    r"|torch\.(bfloat16|float(8_\w+|16|32|64)|u?int(8|16|32|64)|bool)|pathlib(\._local)?\.PosixPath",
    re.ASCII,
)


def latest(folder: Path) -> Path | None:
    """Return the last complete checkpoint in a directory."""
    return next(reversed(_complete(folder)), None)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a directory, incomplete ones of killed processes included."""
    return [path for path in folder.glob("*") if path.name.isascii() and path.name.isdecimal() and path.is_dir()]


def _complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, oldest first."""
    return sorted(filter(_is_complete, _checkpoints(folder)), key=lambda path: int(path.name))


def _is_complete(path: Path) -> bool:
    return all((path / name).exists() for name in (".metadata", "values.json"))


def _remove(path: Path) -> None:
    """Remove a checkpoint, and its directory unless there is something else in it."""
    for file in sorted(path.glob("*")):  # .metadata goes first: without it a checkpoint is not complete
        if _OWN.fullmatch(file.name):
            file.unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def save(
    folder: Path,
    step: int,
    model: ByteModel,
    optimizer: torch.optim.Optimizer,
    values: dict[str, Any],
    ranks: Ranks,
    keep: int = 1,
) -> None:
    """Write a checkpoint, unless there is one of this step, then `prune`.

    All ranks take part; `values` are those of rank 0.

    As that removes incomplete ones, no other process may write to `folder`.

    Raises
    ------
    OSError
        It cannot be written. The checkpoint before it stays.
    """
    path = folder / str(step)
    if ranks.first(_is_complete(path)):
        return
    try:
        if ranks.rank == 0:
            _remove(path)
            path.mkdir(parents=True, exist_ok=True)
            with naming(path / "values.json"), (path / "values.json").open("w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, **values}, file)
                file.flush()
                os.fsync(file.fileno())
        ranks.barrier()
        # The weights are first: that shards again what FSDP2 left whole after a forward without backward.
        weights = _weights(model)
        with _quiet():
            save_tensors({**weights, **_moments(model, optimizer)}, checkpoint_id=path, no_dist=ranks.world == 1)
        if ranks.rank == 0:  # the folders too are on the disk before an older checkpoint goes
            sync_folder(path)
            sync_folder(folder)
    except BaseException as error:
        if ranks.rank == 0:
            _remove(path)  # an incomplete one would only fill the disk
        if isinstance(error, CheckpointException):  # it is derived from BaseException
            causes = _causes(error)
            _raise_interruption(causes)
            reasons = "; ".join(sorted(set(map(_reason, causes))))
            raise OSError(f"{path}: the checkpoint could not be written: {reasons}") from error
        raise
    if ranks.rank == 0:
        prune(folder, keep)


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest ones, and incomplete ones. Only rank 0 calls it."""
    complete = _complete(folder)
    for path in set(_checkpoints(folder)) - set(complete[-keep:]):
        if path in complete or all(_OWN.fullmatch(file.name) for file in path.glob("*")):
            _remove(path)


def read_values(path: Path) -> dict[str, Any]:
    """Return the `values` that `save` was given.

    Raises
    ------
    OSError, ValueError
        They cannot be read, or are damaged.
    """
    file = path / "values.json"
    try:
        values = read_json(file, LIST_BYTES)
    except ValueError as error:
        raise ValueError(f"{file}: damaged: {str(error).removeprefix(f'{file}: ')}. {_way_out(path)}") from error
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
        got = f"{shortened(values['format'])}: another version of blt-kernels wrote it"
        raise ValueError(f"{file}: expected format {FORMAT}, got {got}")
    expected: dict[str, Any] = {
        "options": dict,
        "config": dict,
        "step": int,
        "seconds": float,
        "heldout_bits": (float, type(None)),
    }
    for name, kind in expected.items():
        if not isinstance(values, dict) or not isinstance(values.get(name), kind):
            raise ValueError(f"{file}: damaged: expected the {name} of a run. {_way_out(path)}")
    for name, value in (("step", values["step"]), ("options.steps", values["options"].get("steps"))):
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{file}: damaged: expected a number of steps as {name}. {_way_out(path)}")
    return values


def _way_out(path: Path) -> str:
    return f"Without {path}, the run goes on from the checkpoint before, or anew in another --out"


def load(path: Path, model: ByteModel, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Read a checkpoint into a model and its fresh optimiser, sharded or not. All ranks take part.

    Raises
    ------
    ValueError
        It is damaged, or the optimiser's state is not that of AdamW.
    """
    with _reading(path):
        stored = _Reader(path).read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        moments: dict[str, Any] = {
            key.removeprefix(prefix): what for key, what in stored.items() if key.startswith(prefix)
        }
        scalars = {kind for kind, what in moments.items() if not what.size}
        floats = all(what.properties.dtype.is_floating_point for what in moments.values())
        if moments and not (moments.keys() == {"step", "exp_avg", "exp_avg_sq"} and scalars == {"step"} and floats):
            raise ValueError(f"{path}: the checkpoint is damaged: the optimiser's state of {name}. {_way_out(path)}")
        for kind, what in moments.items():
            dtype = what.properties.dtype
            value = (
                parameter.new_zeros((), dtype=dtype) if kind in scalars else torch.zeros_like(parameter, dtype=dtype)
            )
            optimizer.state[parameter][kind] = value
    state = {**_weights(model), **_moments(model, optimizer)}
    with _reading(path):
        load_tensors(state, storage_reader=_Reader(path), no_dist=ranks.world == 1)


def load_weights(path: Path, model: ByteModel) -> None:
    """Read the weights of a checkpoint into a model that is not sharded, on one rank; ValueError if damaged."""
    state = _weights(model)
    with _reading(path):
        load_tensors(state, storage_reader=_Reader(path), no_dist=True)


def _weights(model: ByteModel) -> dict[str, Tensor]:
    return {f"model.{name}": _as_stored(model, name, value) for name, value in model.state_dict().items()}


def _moments(model: ByteModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{kind}": _as_stored(model, name, value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _as_stored(model: ByteModel, name: str, value: Tensor) -> Tensor:
    """Return a view of the same memory: hash tables, and tensors of their shape, as ``[N, V, D]``."""
    if not isinstance(model, BLT) or name != _TABLES or value.dim() == 0:
        return value
    shards: Any = model.encoder_hash_tok_embedding
    if isinstance(shards, TableShards):
        return shards.whole(value.detach())
    return value.detach().unflatten(0, (-1, model.config.ngram_vocab))


class _Reader(FileSystemReader):
    """Reads checkpoints of `save`, and raises ValueError for a ``.metadata`` that `save` does not write."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what is in a checkpoint, after all of it is checked."""
        folder = Path(self.path)
        content = read_bytes(folder / ".metadata", LIST_BYTES)
        check_pickle(io.BytesIO(content), len(content), lambda name: _GLOBALS.fullmatch(name) is not None)
        metadata = _Unpickler(io.BytesIO(content)).load()
        _check_metadata(metadata)
        for info in metadata.storage_data.values():
            file = folder / info.relative_path
            check_regular(file)
            with file.open("rb") as opened:
                check_torch_file(Slice(opened, info.offset, info.length), info.length)
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if _GLOBALS.fullmatch(f"{module}.{name}") is None:
            raise ValueError(f"the global {module}.{name}, which no checkpoint has")
        return super().find_class(module, name)


def _check_metadata(metadata: Any) -> None:
    """Raise ValueError unless the entries of a ``.metadata`` have their classes, and sizes and places that can be."""
    fits = type(metadata) is Metadata and type(metadata.storage_meta) is StorageMeta
    fits = fits and isinstance(metadata.state_dict_metadata, dict) and isinstance(metadata.storage_data, dict)
    if not fits:
        raise ValueError("no metadata of a checkpoint")
    for name, tensor in metadata.state_dict_metadata.items():
        fits = isinstance(name, str) and type(tensor) is TensorStorageMetadata and isinstance(tensor.chunks, list)
        fits = fits and type(tensor.properties) is TensorProperties
        fits = fits and isinstance(tensor.properties.dtype, torch.dtype) and _is_size(tensor.size)
        for chunk in tensor.chunks if fits else ():
            fits = fits and type(chunk) is ChunkStorageMetadata
            fits = fits and _is_size(chunk.offsets, len(tensor.size)) and _is_size(chunk.sizes, len(tensor.size))
        if not fits:
            raise ValueError(f"no tensor of a checkpoint: {shortened(name)}")
    for index, info in metadata.storage_data.items():
        fits = type(index) is MetadataIndex and type(info) is _StorageInfo and info.transform_descriptors is None
        fits = fits and isinstance(info.relative_path, str) and _DATA.fullmatch(info.relative_path) is not None
        if not fits or not all(type(value) is int and 0 <= value < 1 << 63 for value in (info.offset, info.length)):
            raise ValueError(f"no place in a file of a checkpoint: {shortened(index)}: {shortened(info)}")


def _is_size(value: Any, dims: int | None = None) -> bool:
    return isinstance(value, Size) and dims in (None, len(value)) and all(0 <= size < 1 << 63 for size in value)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of torch, pickle and zipfile for files that are no checkpoint into ValueError."""
    try:
        with _quiet():
            yield
    except MemoryError:
        raise
    except (CheckpointException, Exception) as error:
        causes = _causes(error)
        _raise_interruption(causes)
        text = str(causes[0])
        reason = f"{type(causes[0]).__name__}: {text if len(text) < 1000 else shortened(text, 1000)[1:-1]}"
        raise ValueError(f"{path}: the checkpoint is damaged: {reason}. {_way_out(path)}") from error


def _causes(error: BaseException) -> list[BaseException]:
    """Return the exceptions of all ranks that a `CheckpointException` holds, or the error itself."""
    return [failure[0] for failure in getattr(error, "failures", {}).values()] or [error]


def _reason(error: BaseException) -> str:
    """Return why a checkpoint could not be written: torch's zip writer raises its own error behind a failed write."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None and "unexpected pos" in str(error):  # what another rank sends comes without its context
        return f"a write failed, as on a full disk: {error}"
    return str(cause or error)


def _raise_interruption(causes: list[BaseException]) -> None:
    """Raise the first cause that says nothing about the files of a checkpoint, if there is one."""
    for cause in causes:
        if isinstance(cause, (KeyboardInterrupt, MemoryError)) or is_of_lost_rank(cause):
            raise cause


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning that one process saves and loads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
