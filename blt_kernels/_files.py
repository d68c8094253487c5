"""Files that are written whole or not at all, and directories that one process at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces `path` at the end of the block.

    If the block or the replacement raises, a full disk included, `path` stays as it was and nothing is left beside it.
    Links are followed. What is no regular file, such as ``/dev/stdout``, is written in place.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
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
