"""Reads the values of a configuration file by tables of the fields of its classes.

`transformers_fields` and `bytelatent_fields` have a table for each class of configuration. A field is

- read: it is honoured. The table has its type and the value that it has in that class where a file lacks it.
- fixed: only one of its values is computed here, and every other one is an error that names it.
- ignored: it does not change what that code computes at inference, or that code does not use it at all.

A field that is in no table, unless it is null, is an error that names it, for it may change what is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

from blt_kernels._files import listed, read_json, shortened

Config = TypeVar("Config")
_INT64 = range(-(1 << 63), 1 << 63)


class Values(dict[str, Any]):
    """A JSON object that can name the file it is from, and its place in there."""

    def __init__(self, file: Path, place: str, content: object) -> None:
        if not isinstance(content, dict):
            where = f"{file}: {place}" if place else str(file)
            raise ValueError(f"{where}: expected a JSON object, got {type(content).__name__}")
        super().__init__(content)
        self.file, self.place = file, place

    @staticmethod
    def read(file: Path) -> Values:
        """Return the object in a file; ValueError for other content."""
        return Values(file, "", read_json(file))

    def inner(self, key: str) -> Values:
        """Return the object under a key; an empty one if there is none, or null."""
        content = self.get(key)
        return Values(self.file, self._path(key), {} if content is None else content)

    def expect(self, key: str, expected: object, default: object = None) -> None:
        """Raise ValueError unless the value under `key`, or `default` if there is none, is the expected one."""
        if self.get(key, default) != expected:
            raise self.error(key, repr(expected), default)

    def error(self, key: str, expected: str, default: object = None) -> ValueError:
        """Return the error that the value under `key`, or `default` if there is none, is not as `expected`."""
        got = shortened(self.get(key, default))
        return ValueError(f"{self.file}: {self._path(key)}: expected {expected}, got {got}")

    def build(self, cls: type[Config], **arguments: Any) -> Config:
        """Return a configuration of these values; its errors name the file."""
        try:
            return cls(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self}: {error}") from error

    def __str__(self) -> str:
        return f"{self.file}: {self.place}" if self.place else str(self.file)

    def _path(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.file}: {self._path(key)}: expected a value, found none")


def names(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


def alike(kind: Any, default: Any, text: str) -> dict[str, tuple[Any, Any]]:
    """Return the entries of `Fields.read` for the words of a text, which have one type and one default."""
    return dict.fromkeys(text.split(), (kind, default))


@dataclass(frozen=True)
class Fields:
    """Lists the fields of the configuration class `owner`.

    `read` has type and default, `fixed` the default and the one value that is computed here.
    """

    owner: str
    read: Mapping[str, tuple[Any, Any]]
    fixed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def take(self, values: Values) -> Values:
        """Return the fields that are read, with the defaults of those that `values` lacks.

        Raises
        ------
        ValueError
            A field is unknown, has a value of another type, or one that is not computed here; the message names it.
        """
        known = self.read.keys() | self.fixed.keys() | self.ignored
        given = (key for key, value in values.items() if value is not None and not key.startswith("_"))
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(
                f"{values}: expected the fields of {self.owner}, got {listed(unknown)} as well, which may change "
                "what the model computes: remove what does not"
            )
        for key, (default, expected) in self.fixed.items():
            values.expect(key, expected, default)
        taken = {}
        for key, (kind, default) in self.read.items():
            value, kinds = values.get(key, default), get_args(kind) or (kind,)
            if type(value) is float and float not in kinds and value.is_integer():
                value = int(value)
            if type(value) not in kinds and not (type(value) is int and float in kinds):
                raise values.error(key, " or ".join("None" if k is NoneType else k.__name__ for k in kinds))
            if type(value) is int and value not in _INT64:
                raise values.error(key, "a number of 64 bits")
            taken[key] = value
        return Values(values.file, values.place, taken)
