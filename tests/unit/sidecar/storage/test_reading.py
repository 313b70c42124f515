"""
The whole of: reading a storage that fails for a moment, and what counts as damage.

Called from: pytest.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pillion.errors import LoadError
from pillion.wire import names
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.storage import reading
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.storage.stretches import TruncatedFile


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "RETRY_AFTER_S", (0.0, 0.0, 0.0))


class Flaky:
    """Reads that fail so many times, and then answer."""

    def __init__(self, failures: int, number: int = errno.EIO) -> None:
        self.left = failures
        self.number = number
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.left:
            raise OSError(self.number, os.strerror(self.number))
        return "answer"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_a_read_that_fails_for_a_moment_is_tried_again(no_pauses: None, number: int) -> None:
    """Whatever the error is, as long as it does not say that the file is bad."""
    read = Flaky(3, number)
    assert reading.retried("f", read) == "answer"
    assert read.calls == 4


def test_a_storage_that_fails_each_time_ends_the_load_and_names_file_and_error(no_pauses: None) -> None:
    """It is no proof that the checkpoint is corrupt, and no reason to take an older one."""
    with pytest.raises(LoadError, match=r"/r/step-2/data.*Input/output error.*4 tries") as caught:
        reading.retried("/r/step-2/data", Flaky(99))
    assert type(caught.value) is LoadError


def test_a_file_that_is_missing_or_short_says_so_at_once(no_pauses: None, tmp_path: Path) -> None:
    """That says something about the file."""
    missing = Flaky(99, errno.ENOENT)
    with pytest.raises(FileNotFoundError):
        reading.retried("f", missing)
    assert missing.calls == 1
    short = tmp_path / "short"
    short.write_bytes(b"12345")
    with pytest.raises(TruncatedFile):
        LocalFolder(str(tmp_path)).read_piece("short", 2, 4)


def test_a_piece_is_read_whole_however_little_one_call_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One read gives at most 2 GiB less a page; an opaque leaf may be longer."""
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    whole = os.preadv

    def preadv(fd: int, views: Sequence[Any], offset: int) -> int:
        return whole(fd, [view[:7] for view in views], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert LocalFolder(str(tmp_path)).read_piece(path.name, 10, 60) == bytes(range(10, 70))


def test_a_checkpoint_whose_storage_does_not_answer_is_not_called_damaged(
    no_pauses: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One whose manifest cannot be read for a moment is read; for good, the load ends; without its marker, it is damaged."""
    with pytest.raises(catalog.Damaged, match=names.COMMIT_MARKER):
        catalog.read(LocalFolder(str(tmp_path)), 1)
    (tmp_path / names.COMMIT_MARKER).write_bytes(b"")
    (tmp_path / names.MANIFEST).symlink_to(names.MANIFEST)  # ELOOP: neither there nor missing
    with pytest.raises(LoadError, match=names.MANIFEST):
        catalog.read(LocalFolder(str(tmp_path)), 1)
