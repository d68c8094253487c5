"""Opens, checks and writes safetensors files. The package itself does not depend on safetensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from blt_kernels._files import check_regular, listed, shortened, whole_file

Model = TypeVar("Model", bound=nn.Module)


def check_tensors(what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError, opening with `what`, unless `tensors` are floats of the names and shapes of `expected`."""
    problems = [f"missing {name}" for name in expected if name not in tensors]
    for name, value in tensors.items():
        if name not in expected:
            problems.append(f"unknown {name if name.isprintable() else ascii(name)}")
        elif tuple(value.shape) != tuple(expected[name]):
            problems.append(f"{name} of shape {list(value.shape)}, expected {list(expected[name])}")
        elif value.layout != torch.strided or value.is_meta or type(value) not in (Tensor, nn.Parameter):
            problems.append(f"{name} that is sparse, without values or of another class, expected a dense tensor")
        elif not value.is_floating_point():
            problems.append(f"{name} of {value.dtype}, expected a floating-point dtype")
    if problems:
        raise ValueError(f"{what}: {listed(problems, '; ')}")


def empty_model(what: str, cls: type[Model], config: Any, ops: str, count: int) -> Model:
    """Return a model on the meta device, for weights of which there are `count` tensors.

    Raises
    ------
    ValueError
        The configuration has more layers than there are tensors, or sizes that no tensor has; the message opens with
        `what`. Building so many layers could take hours.
    """
    layers = _num_layers(config)
    if layers > count:
        raise ValueError(f"{what}: expected weights of {layers:,} layers, got {count:,} tensors")
    try:
        with torch.device("meta"):
            return cls(config, ops)
    except (RuntimeError, TypeError, OverflowError) as error:  # torch has no class for sizes that overflow
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{what}: expected sizes that tensors can have, got {shortened(config)}: {reason}") from error


def _num_layers(config: Any) -> int:
    """Return the number of layers in a configuration, those of the configurations in it included."""
    inner = (getattr(config, field.name) for field in fields(config))
    return getattr(config, "num_layers", 0) + sum(_num_layers(value) for value in inner if is_dataclass(value))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file, whole or not at all. Tensors mapped from an old file of this name keep their values.

    The format has no tensors that share memory: they are written under each of their names.

    Raises
    ------
    ImportError
        safetensors is not installed.
    OSError
        The file cannot be written.
    ValueError
        A tensor is on the meta device, or fake.
    """
    module, apart = safetensors_module(), _apart(tensors)
    if path.exists() and not path.is_file():  # safetensors would replace it by a file
        raise OSError(f"{path}: expected a regular file, or none")
    with whole_file(path) as part:
        part.touch()
        mode = part.stat().st_mode  # the user's default mode, which safetensors does not keep
        try:
            module.torch.save_file(apart, part, metadata)
        except module.SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        part.chmod(mode)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory; those that do are copied."""
    result: dict[str, Tensor] = {}
    taken: list[tuple[torch.device, int, int]] = []
    for name, value in tensors.items():
        if value.is_meta or isinstance(value, FakeTensor):
            raise ValueError(f"{name}: expected values to write, got a tensor on the meta device, or a fake one")
        value = value.detach().contiguous()
        start = value.data_ptr()
        end = start + value.nbytes
        if any(value.device == device and start < stop and begin < end for device, begin, stop in taken):
            value = value.clone()
        else:
            taken.append((value.device, start, end))
        result[name] = value
    return result


@contextmanager
def open_safetensors(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Iterator[Any]:
    """Open a file to read tensors from; ValueError if it is damaged, OSError if it cannot be read."""
    module = safetensors_module()
    check_regular(Path(path))
    try:
        with module.safe_open(path, "pt", device=str(device)) as file:
            yield file
    except module.SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got {shortened(str(error))[1:-1]}") from error
    except (OSError, MemoryError) as error:
        if str(path) in str(error):
            raise
        raise OSError(f"{path}: the file cannot be mapped to memory: {error}") from error


def safetensors_module() -> ModuleType:
    """Return the safetensors package, or raise ImportError with the command that installs it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving and loading models needs safetensors: pip install 'blt-kernels[cli]'") from error
    return safetensors
