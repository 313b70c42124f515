"""
The whole of: when the executor gives way to training.

Called from: pytest.
"""

from pathlib import Path

import pytest

from pillion_sidecar.executor.priority import GROUP_NICE, Priority

LOW = str(GROUP_NICE)


@pytest.fixture
def value(tmp_path: Path) -> Path:
    """What stands in for the kernel's file."""
    file = tmp_path / "autogroup"
    file.write_text("0")
    return file


def test_it_gives_way_for_as_long_as_anything_is_written_beside_training(value: Path) -> None:
    """A save and an upload overlap: the value is low from the first one's begin to the last one's end."""
    priority = Priority(value)
    with priority.beside_training():
        with priority.beside_training():
            assert value.read_text() == LOW
        assert value.read_text() == LOW
    assert value.read_text() == "0"


def test_a_load_beside_an_upload_does_not_give_way(value: Path) -> None:
    """The trainers wait for the load, so nobody trains."""
    priority = Priority(value)
    with priority.beside_training():
        with priority.awaited():
            assert value.read_text() == "0"
        assert value.read_text() == LOW


def test_a_save_whose_trainers_are_gone_does_not_give_way(value: Path) -> None:
    """A drain has a bound, which a busy neighbour must not use up. The next session's saves give way again."""
    priority = Priority(value)
    with priority.beside_training():
        priority.settle(is_urgent=True)
        assert value.read_text() == "0"
        priority.settle(is_urgent=False)
        assert value.read_text() == LOW


def test_a_failed_save_does_not_leave_the_executor_low(value: Path) -> None:
    with pytest.raises(OSError, match="disk"), Priority(value).beside_training():
        raise OSError("disk")
    assert value.read_text() == "0"


def test_a_change_that_the_kernel_refuses_is_made_by_the_next_message(value: Path) -> None:
    """Without CAP_SYS_ADMIN the kernel takes ten changes a second. An executor that stayed low would make a load slow."""
    refusing = Refusing(value)
    priority = Priority(refusing)
    with priority.beside_training():
        refusing.refuses = True
    assert value.read_text() == LOW
    refusing.refuses = False
    priority.settle()
    assert value.read_text() == "0"


def test_a_kernel_without_groups_of_sessions_changes_nothing(tmp_path: Path) -> None:
    with Priority(tmp_path / "missing" / "autogroup").beside_training():
        pass
    assert not (tmp_path / "missing").exists()


class Refusing(type(Path())):  # type: ignore[misc] # Path() makes one of two classes, by the system
    """A file that answers EAGAIN while `refuses`."""

    refuses = False

    def write_text(self, *arguments: object, **named: object) -> int:
        if self.refuses:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return int(super().write_text(*arguments, **named))
