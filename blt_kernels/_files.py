"""Files that are read within limits and written whole or not at all; directories that one process writes to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

# The most bytes of a JSON file, which takes up to 30 times as much memory. Configurations have kilobytes, the index of
# the largest checkpoints 10 MB. Lists of the files of a corpus may be larger.
CONFIG_BYTES, LIST_BYTES = 1 << 25, 1 << 30
_DEPTH = 100
_TOO_DEEP = f"objects and lists in each other more than {_DEPTH} deep"


def check_regular(path: Path) -> None:
    """Raise ValueError for a file that is there, but no regular one: reading a pipe or device may have no end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a regular file")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read. Errors of reading have its name too, as those of opening do."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a file.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is no regular file, or has more than `limit` bytes; the message begins with the path.
    """
    check_regular(path)
    with opened(path) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if content is None or len(content) > limit:
        raise ValueError(f"{path}: expected at most {limit:,} bytes")
    return content


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; ValueError if it is none, or has values in each other more than 100 deep."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value]
    for _ in range(_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = list(chain.from_iterable(inner))
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def read_json(path: Path, limit: int = CONFIG_BYTES) -> Any:
    """Return the value in a JSON file; OSError and ValueError as `read_bytes`, or if it is no JSON."""
    content = read_bytes(path, limit)
    try:
        return parse_json(content.decode())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error


def shortened(value: object, limit: int = 200) -> str:
    """Return how Python prints a value, without its middle if that is longer than `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 4) :]}"


def listed(items: Sequence[str], separator: str = ", ", limit: int = 10) -> str:
    """Return items with a separator between them, and the number of those beyond `limit`."""
    text = separator.join(shortened(item)[1:-1] for item in items[:limit])
    return text if len(items) <= limit else f"{text}{separator}and {len(items) - limit} more"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces `path` at the end of the block.

    If the block or the replacement raises, a full disk included, `path` stays as it was and nothing is left beside it.
    Links are followed. What is no regular file, such as ``/dev/stdout``, is written in place.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    try:
        path = path.resolve()
    except RuntimeError:  # before Python 3.13 it is no OSError
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may write the same file
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Make a directory, if there is none, and keep other processes from it by a lock on its file ``lock``.

    The kernel releases the lock when the process ends, however it does. The file stays: removing it could give two
    processes a lock each. On a file system that has no locks, none is taken.

    Parameters
    ----------
    folder : Path
    name : str
        Of the option that `folder` is from.

    Raises
    ------
    ValueError
        Another process holds the lock, or `folder` cannot be a directory; the message begins with `name`.
    OSError
        The file cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}: expected a directory, or a place for one, got {folder}: {error.strerror}") from None
    check_regular(folder / "lock")
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{name}: another process is writing to {folder}: wait for it, or choose another directory"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
        yield
