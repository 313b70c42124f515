"""The record of a session: written, read again, and never trusted beyond its types."""

from pathlib import Path

import pytest

from pillion_sidecar.session import record
from pillion_sidecar.session.record import Counts, Record

RECORD = Record(
    session="a" * 32,
    hello={"rank": 0, "pods": [[0], [1]]},
    policy={"retention": {"keepLast": 2}},
    root="/checkpoints",
    generation=7,
    signals=3,
    counts=Counts(loads=2, epoch=1, rescues=4, store_lost=True),
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Also over an older one."""
    record.write(str(tmp_path), Record(session="b" * 32, hello={}, policy={}, root=""))
    record.write(str(tmp_path), RECORD)
    assert record.read(str(tmp_path)) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == [record.FILE]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"session": 1}', "null", '{"session": "a", "hello": 3}', "\x00"])
def test_a_damaged_record_is_none(tmp_path: Path, text: str) -> None:
    """The sidecar starts as if it were the first."""
    (tmp_path / record.FILE).write_text(text)
    assert record.read(str(tmp_path)) is None


def test_there_is_none_in_a_new_runtime_directory(tmp_path: Path) -> None:
    """And that is no problem to be told."""
    assert record.read(str(tmp_path)) is None
