"""
Small files that survive a crash of the machine: made new, or put in the place of others, each with its name.

Called from: `checkpoint.commit`, `checkpoint.ownership`, `checkpoint.milestones`, `executor.save.write`, `executor.exchange.storage`, and for
folders `storage.folders`. Bulk data go through `storage.directio`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path


def put_name(err: OSError, path: str | os.PathLike[str]) -> None:
    """Put a file's name on an error of a call that knew only a descriptor."""
    if err.filename is None:
        err.filename = os.fspath(path)


def write_new(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """
    Write a file that did not exist. Its bytes are durable afterwards; its name is after an `fsync_directory`.

    On an error, of a full disk for example, nothing is left at `path`.

    Blocks: until the storage answers.

    Raises:
        FileExistsError: there is a file; it stays as it is.
        OSError: with errno and filename.
    """
    with open(path, "xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException as err:  # also of Ctrl-C: no half file stays
            with contextlib.suppress(OSError):
                os.unlink(path)
            if isinstance(err, OSError):
                put_name(err, path)
            raise


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """
    Make the names in a directory durable: a file that was fsynced can still lose its name in a crash.

    Blocks: until the storage answers. Raises: OSError with errno and filename.
    Source: fsync(2). EINVAL is a file system that cannot sync a directory; no more can be done on it.
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
    Publish a small file atomically and durably: whoever opens `path` sees the old content or the new, never a part.

    The temporary name is `.<name>.<pid>.<random>.tmp` in the same directory, and is removed on any error. The pid says
    who left it after a SIGKILL; the random part keeps pods apart that share a volume and count processes from one.
    An error of the last step (syncing the directory) leaves the new content in place, though a crash may still undo it.

    Blocks: until the storage answers. Raises: OSError with errno and filename.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write_new(temporary, data)
        temporary.replace(target)
    except BaseException as err:  # as above: no temporary name stays
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(err, OSError):
            put_name(err, path)
        raise
    fsync_directory(target.parent)
