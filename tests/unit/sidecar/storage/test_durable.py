"""
The whole of: small files on storage: whole at every moment, and nothing left behind by what fails.

Called from: pytest.
"""

import os
import threading
from pathlib import Path

import pytest

from pillion_sidecar.storage import durable


def test_a_new_file_never_takes_the_place_of_another_and_leaves_nothing_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that make one name at once cannot both have made it; of a full disk no half file is left."""
    path = tmp_path / "7"
    durable.write_new(path, b"one")
    with pytest.raises(FileExistsError):
        durable.write_new(path, b"two")
    assert path.read_bytes() == b"one"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        durable.write_new(tmp_path / "8", b"three")
    assert caught.value.filename == str(tmp_path / "8")
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_a_file_shows_the_old_content_or_the_new_at_every_moment(tmp_path: Path) -> None:
    """A reader beside the writer never meets a part, an empty file, or none; no temporary name is left."""
    path = tmp_path / "manifest.json"
    contents = [bytes([n]) * 10_000 for n in range(20)]
    durable.replace_file(path, contents[0])
    seen: list[bytes] = []
    is_over = threading.Event()

    def read_on() -> None:
        while not is_over.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        for content in contents:
            durable.replace_file(path, content)
    finally:
        is_over.set()
        reader.join()
    assert path.read_bytes() == contents[-1]
    assert set(seen) <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


def test_a_replacement_that_fails_leaves_the_old_and_no_temporary_name(tmp_path: Path) -> None:
    """The temporary name carries the pid, so that one left by a SIGKILL can be traced; an error leaves none."""
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        durable.replace_file(target, b"new")
    assert f".{os.getpid()}." in str(caught.value.filename)
    assert Path(str(caught.value.filename)).parent == tmp_path
    assert list(tmp_path.iterdir()) == [target]


def test_syncing_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Durability is never claimed for a name that does not exist."""
    durable.fsync_directory(tmp_path)
    with pytest.raises(FileNotFoundError):
        durable.fsync_directory(tmp_path / "none")
