"""`Applied` is what `apply` of every integration returns: what it replaced, and the way back.

An attribute is replaced in a slot, which keeps the stock value and the replacements in the order in which they came.
The newest one is in place. Replacements never wrap one another: each is made from the stock value.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from operator import contains
from types import MethodType, ModuleType, TracebackType
from typing import Any

import torch

_MISSING = object()


@dataclass
class _Bound:
    """Holds a method of the owner of a slot without the owner, so that slots keep no model alive."""

    function: Any


@dataclass
class _Slot:
    """Holds one attribute of one owner while at least one replacement of it is applied."""

    owner: weakref.ref[Any]
    stock: Any  # what the owner had in its own __dict__, or _MISSING if it inherited the attribute
    replacements: list[tuple[Applied, Any]] = field(default_factory=list)


_SLOTS: dict[tuple[int, str], _Slot] = {}


def _held(owner: Any, value: Any) -> Any:
    return _Bound(value.__func__) if isinstance(value, MethodType) and value.__self__ is owner else value


def _same(held: Any, other: Any) -> bool:
    both = isinstance(held, _Bound) and isinstance(other, _Bound)
    return held.function is other.function if both else held is other


def _value(owner: Any, held: Any) -> Any:
    return MethodType(held.function, owner) if isinstance(held, _Bound) else held


@dataclass(frozen=True)
class Report:
    """Says what an integration did. `str` of it is made for reading.

    Attributes
    ----------
    code_base : str
        Its name and version.
    replaced : dict of str to int
        The calls of each replacement. Calls inside of compiled graphs are not counted.
    fell_back : dict of (str, str) to int
        How often something was left to the code base, by its name and the reason.
    active : bool
        False after `undo`.

    Examples
    --------
    >>> print(Report("transformers 5.23.0", {"BltModel.forward": 2}, {("BltModel.forward", "dropout"): 1}, True))
    transformers 5.23.0: 1 replaced
      BltModel.forward: 2 calls
      left to transformers: BltModel.forward, 1 time: dropout
    """

    code_base: str
    replaced: dict[str, int]
    fell_back: dict[tuple[str, str], int]
    active: bool

    def __str__(self) -> str:
        head = f"{self.code_base}: {len(self.replaced)} replaced" + ("" if self.active else ", all undone")
        calls = [f"  {name}: {count} call{'s' * (count != 1)}" for name, count in self.replaced.items()]
        stock = self.code_base.split(" ")[0]
        left = [
            f"  left to {stock}: {name}, {count} time{'s' * (count != 1)}: {reason}"
            for (name, reason), count in self.fell_back.items()
        ]
        return "\n".join([head, *calls, *left])


class Applied:
    """Keeps what was replaced in another code base and puts it back.

    A second `apply` of the same thing replaces the stock value anew and does not wrap the first. Its `undo` brings back
    the first, and the first's `undo` leaves the second in place. The stock value is back when the last one is undone.

    Parameters
    ----------
    code_base : str
        Name and version of the code base, for the report.

    Examples
    --------
    >>> class Theirs:
    ...     def size(self):
    ...         return 1
    >>> with Applied("theirs 1.0") as applied:
    ...     applied.replace(Theirs, "size", applied.counted("Theirs.size", lambda self: 2))
    ...     Theirs().size()
    2
    >>> Theirs().size(), applied.report().replaced
    (1, {'Theirs.size': 1})
    """

    def __init__(self, code_base: str) -> None:
        self.code_base = code_base
        self._keys: list[tuple[int, str]] = []
        self._calls: dict[str, int] = {}
        self._fell_back: dict[tuple[str, str], int] = {}
        self._active = True

    # --- what integrations call -----------------------------------------------------------------------------------

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Set an attribute of a module, a class or an object, for as long as this is applied.

        Parameters
        ----------
        owner
            A module, a class or an object. It is not kept alive.
        name : str
        new
            Set as it is: a ``staticmethod`` or a bound method where the owner has one.
        """
        key = id(owner), name
        slot = _SLOTS.get(key)
        if slot is None:
            own = vars(owner).get(name, _MISSING)
            slot = _SLOTS[key] = _Slot(weakref.ref(owner), _held(owner, own))
            weakref.finalize(owner, _SLOTS.pop, key, None).atexit = False
        slot.replacements = [entry for entry in slot.replacements if entry[0] is not self]
        slot.replacements.append((self, _held(owner, new)))
        setattr(owner, name, new)
        if key not in self._keys:
            self._keys.append(key)

    def counted(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function, so that the report counts its calls.

        Parameters
        ----------
        label : str
            The name under which the report counts.
        function

        Returns
        -------
        callable
        """
        self.add_label(label)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count(label)
            return function(*args, **kwargs)

        return call

    def add_label(self, label: str) -> None:
        """List a replacement in the report before its first call.

        Parameters
        ----------
        label : str
        """
        self._calls.setdefault(label, 0)

    def count(self, label: str) -> None:
        """Count one call of a replacement, unless torch.compile traces it.

        Parameters
        ----------
        label : str
        """
        if not torch.compiler.is_compiling():
            self._calls[label] = self._calls.get(label, 0) + 1

    def fell_back(self, label: str, reason: str) -> None:
        """Count a call that was left to the code base, unless torch.compile traces it.

        Parameters
        ----------
        label : str
        reason : str
        """
        if not torch.compiler.is_compiling():
            self._fell_back[label, reason] = self._fell_back.get((label, reason), 0) + 1

    # --- what users call ------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Say what is replaced, how often each replacement was called, and what fell back and why.

        Returns
        -------
        Report
            A copy, which later calls do not change.
        """
        return Report(self.code_base, dict(self._calls), dict(self._fell_back), self._active)

    def undo(self) -> None:
        """Put back what was replaced, the last first. A second call does nothing.

        An attribute that somebody else has set since stays as it is.
        """
        for key in reversed(self._keys):
            slot = _SLOTS.get(key)
            owner = slot and slot.owner()
            if slot is None or owner is None:
                continue
            name, newest = key[1], slot.replacements[-1][1]
            slot.replacements = [entry for entry in slot.replacements if entry[0] is not self]
            if not slot.replacements:
                del _SLOTS[key]
            if not _same(_held(owner, vars(owner).get(name, _MISSING)), newest):
                continue
            left = slot.replacements[-1][1] if slot.replacements else slot.stock
            if left is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, _value(owner, left))
        self._keys.clear()
        self._active = False

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<Applied to {self.report()}>"


def stock(owner: Any, name: str) -> Any:
    """Return an attribute as `getattr` does, but as it is without any replacement."""
    is_class = isinstance(owner, type)
    for place in owner.__mro__ if is_class else (owner, *type(owner).__mro__):
        slot = _SLOTS.get((id(place), name))
        value = vars(place).get(name, _MISSING) if slot is None else slot.stock
        if value is _MISSING:
            continue
        if (place is owner and not is_class) or not hasattr(value, "__get__"):
            return _value(owner, value)
        return value.__get__(None, owner) if is_class else value.__get__(owner, type(owner))
    return getattr(owner, name)


def has_own(module: Any, cls: type, name: str) -> bool:
    """Return whether an object has another method than its class `cls`: that of a subclass, or one set on the object.

    Replacements do not count, nor do functions with `is_replacement`, by which copies of an object keep them.
    """
    value = stock(module, name)
    function = getattr(value, "__func__", value)
    return function is not stock(cls, name) and not getattr(function, "is_replacement", False)


def check_model(model: object) -> None:
    """Raise TypeError unless `model`, an argument of `apply`, is a module or None."""
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module or None, got {model!r}")


Parameters = Sequence[str | tuple[str, ...]]


def check_parameters(function: Callable[..., Any], expected: Parameters, code_base: str) -> None:
    """Raise unless a function takes the parameters that its replacement was written for.

    Parameters
    ----------
    function
        The stock function. Decorators that keep ``__wrapped__`` are looked through.
    expected : sequence of str, or of tuples of str
        The names of its parameters in order, ``self`` included, without ``*args`` and ``**kwargs``. A tuple holds the
        names that one has in several versions.
    code_base : str
        Name and version of the code base.

    Raises
    ------
    TypeError
        The parameters are others; the message names the function, them and the version.
    """
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind not in variadic]
    known = [(name,) if isinstance(name, str) else name for name in expected]
    if len(names) != len(known) or not all(map(contains, known, names)):
        where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
        wanted = f"expected parameters ({', '.join(map('|'.join, known))}), which blt_kernels can replace"
        raise TypeError(f"{where} of {code_base}: {wanted}, got ({', '.join(names)})")


def version_of(module: ModuleType) -> str:
    """Return the version of a package, or "unknown" if it does not say."""
    return str(getattr(module, "__version__", "unknown"))
