"""
The whole of: that what a trainer puts into the runtime directory leads the sidecar nowhere else.

Called from: pytest.
"""

import asyncio
import os
import stat
from pathlib import Path

import pytest

from pillion_sidecar import shared_files
from pillion_sidecar.arena import segment
from pillion_sidecar.supervisor import server as server_module


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A file that only the sidecar reaches."""
    path = tmp_path / "elsewhere"
    path.write_text("credentials")
    path.chmod(0o600)
    return path


def assert_untouched(elsewhere: Path) -> None:
    assert elsewhere.read_text() == "credentials"
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o600


def test_a_file_is_made_in_the_place_of_a_link_and_not_through_it(tmp_path: Path, elsewhere: Path) -> None:
    """The link is replaced, and what it led to stays as it is; the new file has its mode, whatever the umask."""
    path = tmp_path / "session-record.new"
    path.symlink_to(elsewhere)
    before = os.umask(0o077)
    try:
        os.close(shared_files.create(str(path), 0o666))
    finally:
        os.umask(before)
    assert_untouched(elsewhere)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o666


def test_a_segment_is_neither_made_nor_adopted_through_a_link(tmp_path: Path, elsewhere: Path) -> None:
    """Links at a segment's name, and at the name that it has while it is made, are replaced; one is never opened as a segment."""
    path = tmp_path / "segment-0"
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        segment.Segment.attach(str(path))
    (tmp_path / f"segment-0.{os.getpid()}.tmp").symlink_to(elsewhere)
    segment.Segment.create(str(path), num_slots=2, stride_bytes=2 * 1024**2).close()
    assert path.is_file()
    assert not path.is_symlink()
    assert_untouched(elsewhere)


def test_the_control_socket_is_open_to_the_trainers_user_from_its_first_moment(tmp_path: Path) -> None:
    """Whatever the umask, and without a change by name that a link could catch; the process's umask is as it was."""

    class Nobody:
        async def hello(self, *_: object) -> None: ...
        async def message(self, *_: object) -> None: ...
        def observed(self, *_: object) -> None: ...
        async def lost(self, *_: object) -> None: ...

    path = tmp_path / "control"

    async def scenario() -> int:
        server = server_module.ControlServer(str(path), Nobody())
        await server.start()
        mode = stat.S_IMODE(path.stat().st_mode)
        await server.close()
        return mode

    before = os.umask(0o077)
    try:
        assert asyncio.run(scenario()) == 0o666
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    assert not path.exists()
