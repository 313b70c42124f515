"""
The whole of: a local disk that does not answer is left alone after its bound, and used again when it answers.

Called from: pytest.
"""

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pillion.wire import home
from pillion_sidecar.copies.disk import About, Disk
from pillion_sidecar.copies.head import Copy
from pillion_sidecar.executor import local_disk
from support.deadlines import Deadline


def test_a_call_that_does_not_come_back_is_given_up_and_no_second_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the directory; progress restarts the time; when the call has come back the disk is used again."""
    monkeypatch.setattr(local_disk, "SILENT_S", 0.2)
    disk = local_disk.LocalDisk(Disk(str(tmp_path), (0,), world_size=1, run_id="run"))
    let_go, moved, ended = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        # Two answers, each within the bound, and then none.
        for _ in range(2):
            moved.wait(0.15)
            disk.moved()
        let_go.wait(Deadline.REPLY.s)
        ended.set()

    for _ in range(2):
        with pytest.raises(OSError, match="it has not answered") as caught:
            disk.run(hang)
        assert (caught.value.errno, caught.value.filename) == (errno.ETIMEDOUT, str(tmp_path))
    assert disk._writing is not None
    let_go.set()
    assert ended.wait(Deadline.REPLY.s)
    disk._writing.join(Deadline.REPLY.s)
    assert disk.run(lambda: 7) == 7


def test_an_error_of_the_disk_is_the_callers(tmp_path: Path) -> None:
    """With errno and file name, as it was raised."""
    disk = local_disk.LocalDisk(Disk(str(tmp_path), (0,), world_size=1, run_id="run"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        disk.run(lambda: (tmp_path / "nowhere").read_bytes())


def test_a_write_that_was_given_up_does_not_read_the_slot_when_the_disk_answers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot holds a newer step by then. A copy of it under the name of the old step would match its own digests."""
    monkeypatch.setattr(local_disk, "SILENT_S", 0.2)
    disk = local_disk.LocalDisk(Disk(str(tmp_path), (0,), world_size=1, run_id="run"))
    let_go, read = threading.Event(), threading.Event()
    slot_image: Any = SimpleNamespace(framed=read.set)
    about = About(run_id="run", wanted=True, started_ns=0, cause=home.Cause.PERIODIC)

    def write() -> None:
        let_go.wait(Deadline.REPLY.s)
        disk.copies.write(Copy((1, 0), 16), {0: slot_image}, about, num_threads=1, on_progress=disk.moved)

    with pytest.raises(OSError, match="it has not answered"):
        disk.run(write)
    assert disk._writing is not None
    let_go.set()
    disk._writing.join(Deadline.REPLY.s)
    assert not disk._writing.is_alive()
    assert not read.is_set()
    assert list((tmp_path / "rank-0").iterdir()) == []
