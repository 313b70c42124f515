"""
The whole of: which arenas in memory a new sidecar removes: those that nobody holds, and that nobody comes for any more.

Called from: pytest.
"""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pillion.wire import names
from pillion_sidecar.arena import leftovers
from pillion_sidecar.arena.segment import Segment

HOLD = [f"{names.RUNTIME_PREFIX}{os.getuid()}-{letter * 16}" for letter in "abc"]


def arena(base: Path, name: str) -> Path:
    """What a killed sidecar leaves."""
    folder = base / name
    folder.mkdir(mode=0o700)
    (folder / names.SIDECAR_LOCK).touch()
    (folder / names.SIDECAR_LOG).write_text("ends with step 7 not on storage")
    Segment.create(str(folder / names.segment_file(0)), num_slots=2, stride_bytes=2**20).close()
    return folder


def later() -> float:
    return time.time() + leftovers.KEPT_S + 60


def test_an_arena_that_nobody_has_is_removed_once_nobody_comes_for_it(tmp_path: Path) -> None:
    """Until then trainers that start again adopt it; the caller's own stays, and so does what has another name or another owner's."""
    old, own = arena(tmp_path, HOLD[0]), arena(tmp_path, HOLD[1])
    other = arena(tmp_path, f"{names.RUNTIME_PREFIX}{os.getuid() + 1}-{'d' * 16}")
    stray = arena(tmp_path, "somebody-else")
    assert leftovers.remove(str(tmp_path), but=str(own)) == []
    assert leftovers.remove(str(tmp_path), but=str(own), now_s=later()) == [str(old)]
    assert [old.exists(), own.exists(), other.exists(), stray.exists()] == [False, True, True, True]


def locked(folder: Path) -> Callable[[], None]:
    """As a living sidecar has it."""
    fd = os.open(folder / names.SIDECAR_LOCK, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return lambda: os.close(fd)


def leased(folder: Path) -> Callable[[], None]:
    """As the executor of a killed sidecar still has it."""
    return Segment.attach(str(folder / names.segment_file(0))).close


@pytest.mark.parametrize("hold", [locked, leased])
def test_an_arena_that_a_process_holds_stays_however_old_it_is(
    tmp_path: Path, hold: Callable[[Path], Callable[[], None]]
) -> None:
    """A job of weeks is not younger than what a dead one left."""
    folder = arena(tmp_path, HOLD[0])
    release = hold(folder)
    assert leftovers.remove(str(tmp_path), but="", now_s=later()) == []
    release()
    assert leftovers.remove(str(tmp_path), but="", now_s=later()) == [str(folder)]


def test_a_link_in_the_place_of_an_arena_is_left_alone(tmp_path: Path) -> None:
    """Its target is no arena of ours."""
    target = tmp_path / "precious"
    target.mkdir()
    (target / "file").touch()
    (tmp_path / HOLD[0]).symlink_to(target)
    assert leftovers.remove(str(tmp_path), but="", now_s=later()) == []
    assert (target / "file").exists()
    assert leftovers.remove(str(tmp_path / "nowhere"), but="") == []
