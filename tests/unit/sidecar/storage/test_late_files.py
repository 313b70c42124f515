"""Tests of a client that has cached that a file or folder is not there, and refuses its name all the same."""

import os
from pathlib import Path

import pytest

from pillion_sidecar.storage import late_names
from pillion_sidecar.storage.local import LocalFolder


@pytest.fixture
def hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that storage has, and does not show under its name `7`."""
    file = tmp_path / "hidden"

    def refuse(source: str, name: str) -> None:
        raise FileExistsError(17, "File exists", name)

    monkeypatch.setattr(os, "link", refuse)
    return file


@pytest.mark.parametrize(("there", "ours"), [(b"mine", True), (b"other", False)])
def test_a_file_that_shows_up_late_is_compared(
    hidden: Path, monkeypatch: pytest.MonkeyPatch, there: bytes, *, ours: bool
) -> None:
    """It appears between two looks: then its bytes say whose it is."""
    hidden.write_bytes(there)
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        os.rename(hidden, hidden.with_name("7"))

    monkeypatch.setattr("time.sleep", pause)
    assert LocalFolder(str(hidden.parent)).create("7", b"mine") is ours
    assert len(pauses) == 1
    assert [path.name for path in hidden.parent.iterdir()] == ["7"]


def test_a_file_that_never_shows_up_is_somebody_elses(hidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage has said that it exists: nobody is told that it is his, and nothing is left."""
    monkeypatch.setattr(late_names, "LATE_S", 0.0)
    assert not LocalFolder(str(hidden.parent)).create("7", b"mine")
    assert list(hidden.parent.iterdir()) == []


@pytest.mark.parametrize("shows_up", [True, False])
def test_a_folder_that_another_pod_has_made_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, shows_up: bool
) -> None:
    """It appears between two looks, and is as good as our own; one that never does is an error with its name, and ends."""
    folder, hidden = tmp_path / "step-1", tmp_path / "hidden"
    hidden.mkdir()

    def refuse(path: str, *_: object) -> None:
        if not os.path.isdir(path):
            raise FileExistsError(17, "File exists", path)

    monkeypatch.setattr("os.makedirs", lambda path, exist_ok: refuse(path))
    monkeypatch.setattr("time.sleep", lambda _: os.rename(hidden, folder))
    if shows_up:
        LocalFolder(str(folder)).make()
        assert folder.is_dir()
    else:
        monkeypatch.setattr(late_names, "LATE_S", 0.0)
        with pytest.raises(FileExistsError) as caught:
            LocalFolder(str(folder)).make()
        assert caught.value.filename == str(folder)


def test_a_file_in_a_folders_place_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a file to become a folder."""
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it was waited for"))
    (tmp_path / "step-1").write_bytes(b"")
    with pytest.raises(FileExistsError):
        LocalFolder(str(tmp_path / "step-1")).make()
