"""
The whole of: the log file of a sidecar without a cluster: where it is, how large it gets, where it goes at the end.

Called from: pytest.
Must never: write to this process's own stdout and stderr.
"""

import os
import threading
from pathlib import Path

import pytest

from pillion_sidecar import log
from support import deadlines
from support.deadlines import Deadline


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def test_a_log_that_grows_is_turned_over_where_it_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of the bound at most; whoever has it open goes on writing to the new one."""
    monkeypatch.setattr(log, "MAX_BYTES", 1000)
    fd = os.open(folder / "sidecar.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        for number in range(100):
            os.write(fd, b"%099d\n" % number)
            log.tend(str(folder), (fd,))
    finally:
        os.close(fd)
    newest = (folder / "sidecar.log").read_text().split()
    older = (folder / "sidecar.log.1").read_text().split()
    assert [int(each) for each in older + newest] == list(range(100 - len(older + newest), 100))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * 1100


def test_a_log_whose_folder_the_sidecar_before_removed_is_begun_again(folder: Path) -> None:
    """Else everything that this one says would be in a file without a name."""
    fd = os.open(folder / "sidecar.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        (folder / "sidecar.log").unlink()
        log.tend(str(folder), (fd,))
        os.write(fd, b"found\n")
    finally:
        os.close(fd)
    assert (folder / "sidecar.log").read_text() == "found\n"


def test_at_a_clean_end_the_log_is_appended_to_the_one_on_the_root(folder: Path, tmp_path: Path) -> None:
    """One file a pod, which outlives the runs; a root without Pillion's folder is left as it is."""
    (folder / "sidecar.log").write_text("run\n")
    root = tmp_path / "root"
    root.mkdir()
    log.keep(str(folder), str(root), 0)
    assert list(root.iterdir()) == []
    (root / ".pillion").mkdir()
    log.keep(str(folder), str(root), 4)
    log.keep(str(folder), str(root), 4)
    assert (root / ".pillion" / "sidecar-4.log").read_text() == "run\nrun\n"


def test_the_log_is_handed_over_for_a_root_that_is_no_directory_and_a_store_that_hangs_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket has no append, so that whoever knows it does it; the end waits for its bound alone, also where the store refuses."""
    (folder / "sidecar.log").write_text("run\n")
    taken: list[bytes] = []
    log.hand_over(str(folder), taken.append)
    assert taken == [b"run\n"]

    def refuses(_: bytes) -> None:
        raise PermissionError("the credentials have expired")

    log.hand_over(str(folder), refuses)
    monkeypatch.setattr(log, "KEEP_TIMEOUT_S", 0.05)
    goes_on = threading.Event()
    log.hand_over(str(folder), lambda _: taken.append(b"late" if goes_on.wait(10.0) else b"never"))
    assert taken == [b"run\n"], "it is still in the store's hands"
    goes_on.set()
    deadlines.eventually(lambda: taken[1:] == [b"late"], Deadline.SETTLE, "the thread ends by itself")


def test_a_storage_that_hangs_does_not_hold_the_end_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody reads holds whoever opens it, as a dead file server does: the end waits for its bound alone."""
    monkeypatch.setattr(log, "KEEP_TIMEOUT_S", 0.05)
    (folder / "sidecar.log").write_text("run\n")
    (tmp_path / ".pillion").mkdir()
    target = tmp_path / ".pillion" / "sidecar-0.log"
    os.mkfifo(target)
    log.keep(str(folder), str(tmp_path), 0)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(target.read_text()))
    reader.start()
    reader.join(10.0)
    assert said == ["run\n"], "the process that wrote it was left, not ended"
