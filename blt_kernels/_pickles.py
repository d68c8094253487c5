"""Checks pickles and the files of ``torch.save`` before they are unpickled. Nothing here runs what a file says.

`check_pickle` walks over the opcodes of a pickle with a stack of its own, on which only numbers, strings and tuples of
them have values. It refuses opcodes, globals and calls that files of weights do not have, entries of the memo beyond
the length of the pickle, and tuples that hold each other so often that printing or hashing one would not end.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

_STEPS = 1 << 20  # the most members of a tuple, those of its members included
_MARK = object()
_LITERALS = ("BINUNICODE", "LONG1", "BINSTRING", "BINFLOAT", "NEWTRUE", "NEWFALSE", "NONE")
_OTHERS = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "POP", "DUP"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    )
)
_STORAGES = {  # bytes of an element
    "torch.storage.UntypedStorage": 1,
    **{f"torch.{kind}Storage": 1 for kind in ("Bool", "Byte", "Char")},
    **{f"torch.{kind}Storage": 2 for kind in ("Half", "BFloat16", "Short")},
    **{f"torch.{kind}Storage": 4 for kind in ("Float", "Int")},
    **{f"torch.{kind}Storage": 8 for kind in ("Double", "Long", "ComplexFloat")},
    "torch.ComplexDoubleStorage": 16,
}


@dataclass(frozen=True)
class _Item:
    """Describes a value on the stack.

    `value` is that of numbers, strings, tuples of them and the names of globals, `steps` those that walk over it. It
    `allocates` if it is, or has inside, a global that takes memory when it is called.
    """

    value: Any = None
    steps: int = 1
    is_global: bool = False
    allocates: bool = False


def check_pickle(file: Any, size: int, allows: Callable[[str], bool] | None = None) -> dict[str, int]:
    """Check one pickle, leave `file` behind it, and return the bytes of each storage that it names.

    Parameters
    ----------
    file : binary file
    size : int
        Bytes that the file has.
    allows : callable, optional
        Returns whether a global, as ``module.name``, may be in the pickle. If None, all may that do not allocate what a
        number asks for: `torch.load` checks them by its own list.

    Raises
    ------
    ValueError
        The pickle is refused, or is none.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages: dict[str, int] = {}
    try:
        argument: Any  # its type depends on the opcode
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name not in _OTHERS and not name.startswith("BININT") and not name.endswith(_LITERALS):
                raise ValueError(f"the opcode {name}, which files of weights do not have")
            if name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name.endswith("BINPUT"):
                if argument > size:
                    raise ValueError(f"a memo of {argument} entries in {size} bytes")
                memo[argument] = stack[-1]
            elif name.endswith("BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                stack.append(_MARK)
            else:
                taken = _pop(stack, opcode)
                if name == "BINPERSID":
                    key, count = _storage(taken[0].value)
                    storages[key] = max(storages.get(key, 0), count)
                stack += [_made(name, argument, taken, allows)] * len(opcode.stack_after)
    except (LookupError, UnicodeDecodeError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no pickle: {error!r}") from error
    return storages


def _pop(stack: list[Any], opcode: Any) -> list[Any]:
    """Take the operands of an opcode from the stack, those after its mark in order."""
    taken: list[Any] = []
    for kind in reversed(opcode.stack_before):
        if kind.name == "stackslice":
            while stack[-1] is not _MARK:
                taken.append(stack.pop())
        else:
            taken.append(stack.pop())
    return taken[::-1]


def _made(name: str, argument: Any, taken: list[Any], allows: Callable[[str], bool] | None) -> _Item:
    """Return what an opcode puts on the stack."""
    if name in ("GLOBAL", "STACK_GLOBAL"):
        words = argument.split(" ", 1) if name == "GLOBAL" else [item.value for item in taken]
        full = ".".join(words)
        if allows is not None and not allows(full):
            raise ValueError(f"the global {full!r:.100}, which such files do not have")
        return _Item(full, is_global=True, allocates=allows is None and _allocates(full))
    if name == "BUILD" and taken[0].is_global:
        raise ValueError(f"a change of the class {taken[0].value!r:.100}")
    if name in ("REDUCE", "NEWOBJ") and any(item.allocates for item in taken):  # functions call what is among arguments
        raise ValueError(
            f"a call with {taken[0].value!r:.100} that allocates memory, which files of weights do not have"
        )
    if "TUPLE" in name:
        members = [item for item in taken if item is not _MARK]
        steps = 1 + sum(item.steps for item in members)
        if steps > _STEPS:
            raise ValueError(f"tuples in each other with more than {_STEPS:,} members")
        return _Item(tuple(item.value for item in members), steps, allocates=any(item.allocates for item in members))
    return _Item(argument)


def _allocates(name: str) -> bool:
    """Return whether a call of a global that torch allows, with a number, takes that much memory."""
    module, _, what = name.rpartition(".")
    is_type = module.partition(".")[0] == "torch" and what.endswith(("Tensor", "Storage"))
    return is_type or name == "builtins.bytearray"


def _storage(value: Any) -> tuple[str, int]:
    """Return key and bytes of the storage that torch names as ("storage", type, key, location, elements, ...)."""
    if isinstance(value, tuple) and len(value) >= 5 and value[0] == "storage":
        _, kind, key, _, count, *_ = value
        known = isinstance(key, str) and isinstance(count, int) and count >= 0 and isinstance(kind, str)
        if known and kind in _STORAGES:
            return key, count * _STORAGES[kind]
    raise ValueError(f"no storage of tensors: {value!r:.100}")


def check_torch_file(file: Any, size: int) -> None:
    """Check an archive that ``torch.save`` may have written, before `torch.load` reads it.

    It may not be compressed, as those of torch are not, so that it takes no more memory than it has bytes, and every
    storage that its pickle names has to be there in full.

    Raises
    ------
    ValueError
        The file is no such archive, or is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members.values()):
                raise ValueError("a compressed archive, and torch writes none")
            if sum(member.file_size for member in archive.infolist()) > size:
                raise ValueError(f"an archive whose members have more than its {size:,} bytes")
            names = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
            if len(names) != 1 or len(members) != len(archive.infolist()):
                raise ValueError(f"an archive with {len(names)} data.pkl, or with two members of one name")
            content = archive.read(names[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError, LookupError) as error:
        raise ValueError(f"a damaged archive: {error}") from error
    for key, expected in check_pickle(io.BytesIO(content), len(content)).items():
        member = members.get(f"{names[0].removesuffix('data.pkl')}data/{key}")
        if member is None or member.file_size < expected:
            found = 0 if member is None else member.file_size
            raise ValueError(f"storage {key!r:.40} has {found:,} bytes in the archive, expected {expected:,}")


def check_torch_stream(file: BinaryIO, size: int) -> None:
    """Check a file without an archive that ``torch.save`` may have written, as it did before version 1.6.

    Raises
    ------
    ValueError
        The file is none, or is damaged.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:  # reads no more than there is
        for _ in range(5):  # a magic number, a version, sizes of C types, the object, and the keys of storages
            storages = check_pickle(mapped, size)
            if sum(storages.values()) > size:
                raise ValueError(f"storages of {sum(storages.values()):,} bytes in a file of {size:,}")


class Slice:
    """Bytes ``[start, start + length)`` of a file, as a file to read."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; OSError for a negative one."""
        place = offset + (0, self.position, self.length)[whence]
        if place < 0:
            raise OSError(f"a negative place in a file: {place}")
        self.position = place
        return place

    def tell(self) -> int:
        """Return the position."""
        return self.position

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, or all if it is negative, as far as they are there."""
        left = max(self.length - self.position, 0)
        self.file.seek(self.start + self.position)
        content = self.file.read(left if size < 0 else min(size, left))
        self.position += len(content)
        return content
