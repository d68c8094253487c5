"""Checkpoints by torch.distributed.checkpoint: any number of ranks reads what any number of ranks wrote.

A checkpoint is a directory named by its step. It holds weights and optimiser state in the files of that format, and
numbers, options and the configuration of the model in ``values.json``. It is complete once ``values.json`` and
``.metadata``, which is written last, are there; only then are older ones removed. So a run that is killed at any moment
has a complete one. Only checkpoints are removed: other files beside or inside of them stay.

The hash tables of a BLT are stored as ``[N, V, D]``: they are sharded in this shape. ``.metadata`` is a
pickle: read it only from sources that you trust.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from blt_kernels.distributed import TableShards
from blt_kernels.models import BLT
from blt_kernels.models.base import ByteModel
from blt_kernels.train.parallel import Ranks

_TABLES = "encoder_hash_tok_embedding.weight"
_OWN = re.compile(r"\.metadata(\.tmp)?|values\.json|__\d+_\d+\.distcp")  # matches the files of a checkpoint


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
            with (path / "values.json").open("w", encoding="utf-8") as file:
                json.dump(values, file)
                file.flush()
                os.fsync(file.fileno())
        ranks.barrier()
        # The weights are first: that shards again what FSDP2 left whole after a forward without backward.
        weights = _weights(model)
        with _quiet():
            save_tensors({**weights, **_moments(model, optimizer)}, checkpoint_id=path, no_dist=ranks.world == 1)
    except BaseException as error:
        if ranks.rank == 0:
            _remove(path)  # an incomplete one would only fill the disk
        if isinstance(error, CheckpointException):  # it is derived from BaseException
            reasons = "; ".join(str(failure[0]) for failure in error.failures.values())
            raise OSError(f"{path}: the checkpoint could not be written: {reasons}") from error
        raise
    if ranks.rank == 0:
        prune(folder, keep)


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest ones, and incomplete ones. Only rank 0 calls it."""
    complete = _complete(folder)
    for path in set(_checkpoints(folder)) - set(complete[-keep:]):
        if path in complete or all(_OWN.fullmatch(file.name) for file in path.iterdir()):
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
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged: {error}. {_way_out(path)}") from error
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
    return values


def _way_out(path: Path) -> str:
    return f"Without {path}, the run goes on from the checkpoint before, or anew in another --out"


def load(path: Path, model: ByteModel, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Read a checkpoint into a model and its fresh optimiser, sharded or not. All ranks take part.

    Raises
    ------
    ValueError
        It is damaged.
    """
    with _reading(path):
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        for key, what in stored.items():
            if key.startswith(prefix):
                scalar = not what.size  # type: ignore[union-attr]
                dtype = what.properties.dtype  # type: ignore[union-attr]
                value = parameter.new_zeros((), dtype=dtype) if scalar else torch.zeros_like(parameter, dtype=dtype)
                optimizer.state[parameter][key.removeprefix(prefix)] = value
    state = {**_weights(model), **_moments(model, optimizer)}
    with _reading(path):
        load_tensors(state, checkpoint_id=path, no_dist=ranks.world == 1)


def load_weights(path: Path, model: ByteModel) -> None:
    """Read the weights of a checkpoint into a model that is not sharded, on one rank; ValueError if damaged."""
    state = _weights(model)
    with _reading(path):
        load_tensors(state, checkpoint_id=path, no_dist=True)


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


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of torch, pickle and zipfile for files that are no checkpoint into ValueError."""
    try:
        with _quiet():
            yield
    except MemoryError:
        raise
    except (CheckpointException, Exception) as error:
        causes = [failure[0] for failure in getattr(error, "failures", {}).values()] or [error]
        reason = f"{type(causes[0]).__name__}: {causes[0]}"
        raise ValueError(f"{path}: the checkpoint is damaged: {reason}. {_way_out(path)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning that one process saves and loads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
