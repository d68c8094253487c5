"""Opens, checks and writes safetensors files. The package itself does not depend on safetensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from blt_kernels._files import whole_file


def check_tensors(what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError, opening with `what`, unless `tensors` are floats of the names and shapes of `expected`."""
    problems = [f"missing {name}" for name in expected if name not in tensors]
    for name, value in tensors.items():
        if name not in expected:
            problems.append(f"unknown {name}")
        elif tuple(value.shape) != tuple(expected[name]):
            problems.append(f"{name} of shape {list(value.shape)}, expected {list(expected[name])}")
        elif not value.is_floating_point():
            problems.append(f"{name} of {value.dtype}, expected a floating-point dtype")
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")


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
    """Open a file to read tensors from; ValueError if it is damaged."""
    module = safetensors_module()
    try:
        with module.safe_open(path, "pt", device=str(device)) as file:
            yield file
    except module.SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got {error}") from error


def safetensors_module() -> ModuleType:
    """Return the safetensors package, or raise ImportError with the command that installs it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving and loading models needs safetensors: pip install 'blt-kernels[cli]'") from error
    return safetensors
