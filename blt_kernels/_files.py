"""Files that are read within limits and written whole or not at all; directories that one process writes to."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO

# The most bytes of a JSON file, which takes up to 30 times as much memory. Configurations have kilobytes, the index of
# the largest checkpoints 10 MB. Lists of the files of a corpus may be larger.
CONFIG_BYTES, LIST_BYTES = 1 << 25, 1 << 30
_DEPTH = 100
_TOO_DEEP = f"objects and lists in each other more than {_DEPTH} deep"
_PART = re.compile(r".+\.[a-z0-9_]{8}\.part")  # matches the folders of `_own_folder`


def check_regular(path: Path) -> None:
    """Raise ValueError for a file that is there, but no regular one: reading a pipe or device may have no end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a regular file")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read. Errors of reading have its name too, as those of opening do."""
    with naming(path), path.open("rb") as file:
        yield file


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
    """Yield a path to write to. The file there replaces `path` at the end of the block, once it is on the disk.

    If the block or the replacement raises, a full disk included, `path` stays as it was and nothing is left beside it.
    A process that is killed leaves a folder, which the next one that writes `path` removes. Links are followed. What is
    no regular file, such as ``/dev/stdout``, is written in place. An OSError names `path`.
    """
    with naming(path):
        if path.exists() and not path.is_file():
            yield path
            return
        try:
            path = path.resolve()
        except RuntimeError:  # before Python 3.13 it is no OSError
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
        remove_abandoned(path.parent, path.name)
        with _own_folder(path) as folder:  # libraries that write the file may have temporary files beside it
            yield folder / path.name
            with (folder / path.name).open("rb") as file:
                os.fsync(file.fileno())
            os.replace(folder / path.name, path)
        sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError of the block name `path`, if it names no file, as after a write, or one of `whole_file`."""
    try:
        yield
    except OSError as error:
        parts = Path(os.fsdecode(error.filename or "")).parts[-2:] if not isinstance(error.filename, int) else ()
        if error.errno is not None and (error.filename is None or any(map(_PART.fullmatch, parts))):
            error.filename, error.filename2 = str(path), None
        raise


def sync_folder(folder: Path) -> None:
    """Put what was created, renamed and removed in a folder on the disk, where the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # this user may write to the folder, but not list it
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _own_folder(path: Path) -> Iterator[Path]:
    """Make a locked folder beside `path`, and remove it at the end of the block."""
    descriptor = None
    while descriptor is None:
        folder = Path(tempfile.mkdtemp(".part", f"{path.name}.", path.parent))
        descriptor = _lock_new(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _lock_new(folder: Path) -> int | None:
    """Return a descriptor that locks a new folder; None if `remove_abandoned` of another process was faster."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError):
        _lock(descriptor)
        if folder.exists():
            return descriptor
    os.close(descriptor)
    return None


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left in `whole_file`, for one file of a folder or for all."""
    for part in folder.glob(f"{glob.escape(name) if name else '*'}.*.part"):
        if _PART.fullmatch(part.name) and part.is_dir() and not part.is_symlink():
            with suppress(OSError):
                descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if _lock(descriptor):
                        shutil.rmtree(part)
                finally:
                    os.close(descriptor)


def _lock(file: int | IO[str]) -> bool:
    """Lock an open file or folder; BlockingIOError if another process has, False if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all. Names of files that are no UTF-8 keep their bytes."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Make a directory, if there is none, and keep other processes from it by a lock on its file ``lock``.

    What killed processes have left of `whole_file` in it is removed. The kernel releases the lock when the process
    ends, however it does. The file stays: removing it could give two processes a lock each. On a file system that has
    no locks, none is taken.

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
            _lock(file)
        except BlockingIOError:
            raise ValueError(
                f"{name}: another process is writing to {folder}: wait for it, or choose another directory"
            ) from None
        remove_abandoned(folder)
        yield
