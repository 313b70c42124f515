"""The record of a session: written, read again, and never trusted beyond its types."""

import dataclasses
import json
from pathlib import Path

import pytest

from pillion.wire.control import Hello, MeetingStore
from pillion_sidecar.session import record
from pillion_sidecar.session.record import Counts, Record

HELLO = Hello(session="a" * 32, run_id="run", rank=0, world_size=2, pods=((0,), (1,)), store_mode=MeetingStore.PREFIX)
RECORD = Record(
    session="a" * 32,
    hello=HELLO,
    policy={"retention": {"keepLast": 2}},
    root="/checkpoints",
    generation=7,
    signals=3,
    counts=Counts(loads=2, epoch=1, rescues=4, store_lost=True),
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Also over an older one."""
    record.write(str(tmp_path), Record(session="b" * 32, hello=HELLO, policy={}, root=""))
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


OLDER = {
    "session": "a" * 32,
    "hello": {
        "session": "a" * 32,
        "run_id": "run",
        "attempt": 0,
        "rank": 0,
        "world_size": 2,
        "pods": [[0], [1]],
        "placement": "",
        "store_mode": "prefix",
        "store": ["10.0.0.1", 29500],
    },
    "policy": {"retention": {"keepLast": 2}},
    "root": "/checkpoints",
    "before": [],
    "trainers": [[12, 3400]],
    "generation": 7,
    "signals": None,
    "counts": {"loads": 2, "epoch": 1, "rescues": 4, "store_lost": False},
}
"""What the sidecar before the classes of this file wrote."""


def test_a_record_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """An image is updated under trainers that go on; what it did not know yet has its default, and what only it knew is passed over."""
    of = dataclasses.replace(
        RECORD,
        hello=dataclasses.replace(HELLO, store=("10.0.0.1", 29500)),
        trainers=((12, 3400),),
        signals=None,
        counts=Counts(loads=2, epoch=1, rescues=4),
    )
    (tmp_path / record.FILE).write_text(json.dumps(OLDER | {"weather": "fine"}))
    assert record.read(str(tmp_path)) == of
    still_older = {name: value for name, value in OLDER.items() if name not in ("before", "trainers")}
    (tmp_path / record.FILE).write_text(json.dumps(still_older | {"counts": {"loads": 2}}))
    assert record.read(str(tmp_path)) == dataclasses.replace(of, trainers=(), counts=Counts(loads=2))
