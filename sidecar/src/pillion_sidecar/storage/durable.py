"""
Durable small files, which survive a crash of the machine: new files, or replacements, each with a durable name.

Called from: `checkpoint.commit`, `checkpoint.ownership`, `checkpoint.milestones`, `executor.save.write`, `executor.exchange.storage`, and for
folders `storage.folders`. Bulk data go through `storage.directio`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def put_name(err: OSError, path: str | os.PathLike[str]) -> None:
    """Set the filename of an OSError from a call that knew only a descriptor."""
    if err.filename is None:
        err.filename = os.fspath(path)


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give every OSError of calls that know only a descriptor the file's name."""
    try:
        yield
    except OSError as err:
        put_name(err, path)
        raise


def write_new(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """
    Write a file that does not exist yet. Its bytes are durable on return. Its name is durable after `fsync_directory`.

    After an error, such as a full disk, nothing is left at `path`.

    Blocks: until the storage answers.

    Raises:
        FileExistsError: the file exists. It stays as it is.
        OSError: with errno and filename.
    """
    with open(path, "xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException as err:  # also after Ctrl-C no partial file may stay
            with contextlib.suppress(OSError):
                os.unlink(path)
            if isinstance(err, OSError):
                put_name(err, path)
            raise


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """
    Make the names in a directory durable. Without this, a file that was fsynced can still lose its name in a crash.

    Blocks: until the storage answers. Raises: OSError with errno and filename.
    Source: fsync(2). EINVAL shows a file system that cannot sync a directory. It is ignored, as nothing more can be done.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as err:
        if err.errno != errno.EINVAL:
            put_name(err, path)
            raise
    finally:
        os.close(fd)


def replace_file(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """
    Replace a small file atomically and durably. A reader of `path` sees the old content or the new, never a part.

    The temporary name is `.<name>.<pid>.<random>.tmp` in the same directory. It is removed after any error. The pid shows which process left it
    after a SIGKILL. The random part separates pods that share a volume and have the same pids. After an error of the last step (the sync of the
    directory) the new content is in place, but a crash may still undo it.

    Blocks: until the storage answers. Raises: OSError with errno and filename.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write_new(temporary, data)
        temporary.replace(target)
    except BaseException as err:  # as above: no temporary file may stay
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(err, OSError):
            put_name(err, path)
        raise
    fsync_directory(target.parent)
