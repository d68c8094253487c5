"""The configuration of a model is stored as JSON in the metadata of its safetensors file."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from blt_kernels._files import listed, parse_json, shortened
from blt_kernels.models.weights import open_safetensors


def model_name(path: str | os.PathLike[str]) -> str | None:
    """Return the class of the model in a file that `ByteModel.save` wrote; None for other safetensors files."""
    with open_safetensors(path) as file:
        return (file.metadata() or {}).get("model")


def stored_config(path: str | os.PathLike[str], name: str, cls: type) -> Any:
    """Return the configuration, of class `cls`, in a file of the model `name`; ValueError for another file."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("model") != name:
        raise ValueError(f"path: expected a file of {name}, got {shortened(metadata.get('model'))} in {path}")
    try:
        return config_from_dict(cls, parse_json(metadata.get("config", "null")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Rebuild a configuration dataclass, nested ones included, from its values in JSON."""
    if not isinstance(values, dict):
        raise ValueError(f"config: expected the fields of {cls.__name__}, got {shortened(values)}")
    unknown = sorted(set(values) - {field.name for field in fields(cls)})
    if unknown:
        raise ValueError(f"config: expected the fields of {cls.__name__}, got {listed(unknown)} as well")
    hints, arguments = get_type_hints(cls), {}
    for name, value in values.items():
        if isinstance(value, dict):
            nested = next((t for t in (hints[name], *get_args(hints[name])) if is_dataclass(t)), None)
            if nested is None:
                raise ValueError(f"config: expected a value of {cls.__name__}.{name}, got {shortened(value)}")
            value = config_from_dict(nested, value)  # type: ignore[arg-type]
        value = tuple(value) if isinstance(value, list) else value
        _check_kind(name, value, hints[name])
        arguments[name] = value
    return cls(**arguments)


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError unless a value is of a kind of its field that the classes themselves do not check."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        expected = get_origin(kind) or kind
        if expected in (bool, tuple) or is_dataclass(expected):
            lengths = [len(get_args(kind))] if expected is tuple and Ellipsis not in get_args(kind) else []
            fits = isinstance(value, expected) and (not lengths or len(value) in lengths)
            if not fits and not (value is None and type(None) in kinds):
                raise ValueError(f"{name}: expected {expected.__name__}, got {shortened(value)}")
