"""
The whole of: that a pin keeps its step from retention, in whatever moment it is set, and that each holder removes its own pin only.

Called from: pytest.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pillion.wire import names
from pillion.wire.policy import Retention
from pillion_sidecar.checkpoint import catalog, commit, pins, retention
from pillion_sidecar.storage.local import LocalFolder
from support.parts import write_part

KEEP_ONE = Retention(keep_last=1)


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    """A root with the committed steps 1 to 4."""
    for step in (1, 2, 3, 4):
        folder = tmp_path / names.step_directory(step)
        folder.mkdir()
        write_part(folder, 0, world_size=1, step=step)
        assert commit.finish(LocalFolder(str(folder))) is not None
    return LocalFolder(str(tmp_path))


def steps(root: LocalFolder) -> list[int]:
    return sorted(step for step, committed in catalog.steps(root).items() if committed)


def test_a_pinned_step_stays_until_it_is_unpinned(root: LocalFolder) -> None:
    """The others go; after the pin is gone the step goes with the next retention."""
    assert pins.pin(root, 2, reason="for the paper")
    assert not pins.pin(root, 2, reason="again")
    assert retention.apply(root, KEEP_ONE, current=4, generation=1) == [1, 3]
    [pin] = pins.read(root)[2]
    assert (pin.holder, pin.reason) == (pins.PEOPLE, "for the paper")
    assert pins.unpin(root, 2)
    assert not pins.unpin(root, 2)
    assert retention.apply(root, KEEP_ONE, current=4, generation=1) == [2]


def test_a_full_disk_does_not_take_a_pinned_step(root: LocalFolder) -> None:
    """Room is made of what is not pinned."""
    pins.pin(root, 1)
    for _ in retention.make_room(root, KEEP_ONE, current=5, generation=1):
        pass
    assert steps(root) == [1, 4]


def test_a_holder_removes_only_its_own_pin(root: LocalFolder) -> None:
    """The step is free when nobody holds it any more."""
    pins.pin(root, 1)
    pins.pin(root, 1, holder="cluster")
    assert pins.pinned(root) == {1: ("cluster", pins.PEOPLE)}
    assert pins.unpin(root, 1, holder="cluster")
    assert pins.pinned(root) == {1: (pins.PEOPLE,)}
    assert retention.apply(root, KEEP_ONE, current=4, generation=1) == [2, 3]


@pytest.mark.parametrize("step", [9, 5])
def test_what_is_not_committed_cannot_be_pinned(root: LocalFolder, step: int) -> None:
    """Neither a step that is not there nor one without a commit; no pin is left."""
    root.below("step-5").make()
    with pytest.raises(FileNotFoundError, match=f"step-{step} holds no committed checkpoint"):
        pins.pin(root, step)
    assert pins.pinned(root) == {}


@pytest.mark.parametrize("holder", ["", "Two words", "a/b", "../x", "a.b"])
def test_a_holder_that_cannot_be_the_name_of_a_file_is_refused(root: LocalFolder, holder: str) -> None:
    """The text has the name and what is allowed."""
    with pytest.raises(ValueError, match="lower-case letters, digits and dashes are allowed"):
        pins.pin(root, 1, holder=holder)


def test_a_pin_with_damaged_content_still_holds(root: LocalFolder) -> None:
    """Somebody has pinned it; why is lost."""
    folder = root.below(f"{names.INTERNAL_DIR}/{pins.PINS}")
    folder.make()
    folder.put("step-1.people.json", b"{")
    folder.put("step-2.txt", b"no pin")
    folder.put("step-03.people.json", b"no pin")
    assert retention.apply(root, KEEP_ONE, current=4, generation=1) == [2, 3]
    [pin] = pins.read(root)[1]
    assert (pin.reason, pin.created_ns) == ("", 0)


def test_a_pin_that_comes_while_the_step_becomes_invisible_puts_it_back(
    root: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention looks again after it has taken the checkpoint down."""
    original = LocalFolder.take_down

    def pinned_just_before(self: LocalFolder, **given: object) -> object:
        pins.pin(root, 1)
        return original(self, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalFolder, "take_down", pinned_just_before)
    for _ in retention.remove(root.below("step-1"), generation=1, is_pinned=lambda: 1 in pins.pinned(root)):
        pass
    assert steps(root) == [1, 2, 3, 4]


def test_a_pin_that_comes_too_late_is_an_error(root: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint went between the look and the pin: the caller hears it, and no pin without a checkpoint stays."""
    removal: Iterator[None] = retention.remove(root.below("step-1"), generation=1)
    original = LocalFolder.create

    def removed_just_before(self: LocalFolder, name: str, data: bytes) -> bool:
        next(removal)
        return original(self, name, data)

    monkeypatch.setattr(LocalFolder, "create", removed_just_before)
    with pytest.raises(FileNotFoundError):
        pins.pin(root, 1)
    assert pins.pinned(root) == {}
    for _ in removal:
        pass
    assert steps(root) == [2, 3, 4]


def test_a_pinned_step_whose_removal_was_killed_comes_back(root: LocalFolder) -> None:
    """The process ended between the rename and its second look; a removal that has deleted something is finished."""
    pins.pin(root, 1)
    next(retention.remove(root.below("step-1"), generation=1))
    half = retention.remove(root.below("step-2"), generation=1)
    pins.pin(root, 2)
    next(half)
    next(half)
    assert steps(root) == [3, 4]
    assert retention.apply(root, KEEP_ONE, current=4, generation=1) == [3]
    assert steps(root) == [1, 4]


def test_storage_that_does_not_tell_the_pins_removes_nothing(
    root: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the retention's, which is tried again after the next commit."""

    def fail(_: object) -> dict[int, tuple[str, ...]]:
        raise OSError(5, "Input/output error", "pins")

    monkeypatch.setattr(pins, "pinned", fail)
    with pytest.raises(OSError, match="Input/output"):
        retention.apply(root, KEEP_ONE, current=4, generation=1)
    monkeypatch.undo()
    assert steps(root) == [1, 2, 3, 4]
