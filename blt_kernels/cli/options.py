"""Arguments and options of commands, derived from the fields of the dataclasses that the commands make of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typing_extensions import Doc

Config = TypeVar("Config")


def options_of(*classes: type, **metavars: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command the documented fields of dataclasses.

    A field is documented if its type is ``Annotated[..., Doc(help)]``. Without a default it becomes an argument, else
    an option. The function gets all values by name as ``options``, from which `build` makes the dataclasses.

    Parameters
    ----------
    classes
        Dataclasses.
    metavars
        The names of values in the help text, by field.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature, derived = inspect.signature(function, eval_str=True), []
        for cls in classes:
            hints = get_type_hints(cls, include_extras=True)
            derived += [_parameter(f, hints[f.name], metavars.get(f.name)) for f in fields(cls) if _help(hints[f.name])]
        own = [p.replace(kind=p.KEYWORD_ONLY) for name, p in signature.parameters.items() if name != "options"]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(options={parameter.name: values.pop(parameter.name) for parameter in derived}, **values)

        command.__signature__ = signature.replace(parameters=[*derived, *own])  # type: ignore[attr-defined]
        return command

    return decorate


def build(cls: type[Config], options: dict[str, Any], **values: Any) -> Config:
    """Return a dataclass of those `options` that are its fields and are not None, and of more `values`."""
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in options.items() if name in names and value is not None}, **values)


def _help(hint: Any) -> str | None:
    return next((note.documentation for note in getattr(hint, "__metadata__", ()) if isinstance(note, Doc)), None)


def _parameter(field: Field[Any], hint: Any, metavar: str | None) -> inspect.Parameter:
    kind: Any = get_args(hint)[0]
    required = field.default is MISSING
    default = inspect.Parameter.empty if required else field.default
    if get_origin(kind) is Sequence:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
        default = default if required else None
    if required:
        info: Any = typer.Argument(metavar=metavar or field.name.upper(), help=_help(hint))
    else:
        flag = [f"--{field.name.replace('_', '-')}"] if kind is bool else []  # has no --no-...
        info = typer.Option(*flag, metavar=metavar, help=_help(hint))
    kind = kind | None if default is None else kind
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )
