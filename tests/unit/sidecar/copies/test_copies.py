"""
The whole of: the names and heads of local copies, which of them go, and to which root they belong.

Called from: pytest.
"""

from pathlib import Path

import pytest

from pillion.wire import home
from pillion_sidecar.copies import head
from pillion_sidecar.copies.disk import Disk, Marks, surplus
from pillion_sidecar.copies.head import Copy, Head, HeadError

HEAD = Head(
    rank=3,
    world_size=8,
    run_id="run",
    image_bytes=4096,
    layout="{}",
    opaque_lengths=(7, 0),
    digests=("ab", "cd"),
    wanted=True,
    started_ns=5,
    cause=home.Cause.ON_DEMAND,
    remarks={"metrics": {"loss": 1.5}},
)


def copy(step: int, epoch: int = 0, generation: int = 1) -> Copy:
    return Copy((generation, epoch), step)


def found(*steps: int, stored: tuple[int, ...] = ()) -> dict[Copy, Marks]:
    return {copy(step): Marks(held=True, stored=step in stored) for step in steps}


def test_a_copy_is_named_and_ordered_as_checkpoints_are() -> None:
    """By the session's generation, then the loads in it, then the step; another name is no copy's."""
    assert head.parse_stem(copy(20, 1, 3).stem) == copy(20, 1, 3)
    assert sorted([copy(9, 1), copy(30), copy(1, 0, 2), copy(20)]) == [copy(20), copy(30), copy(9, 1), copy(1, 0, 2)]
    assert [head.parse_stem(each) for each in ("step-20", "step-a-1-1", "lineage", "step-1-2-3-4")] == [None] * 4


def test_a_head_comes_back_and_a_damaged_one_is_refused() -> None:
    """Every field; a flipped bit, a cut end, and a form of another release are each an error that says so."""
    data = HEAD.encode()
    assert head.decode(data) == HEAD
    for damaged in (data[:-1], data.replace(b'"rank":3', b'"rank":2'), b"", b"\n"):
        with pytest.raises(HeadError):
            head.decode(damaged)


@pytest.mark.parametrize(
    ("there", "waiting", "gone"),
    [
        (found(10), [], []),
        (found(10, 20), [], []),
        (found(10, 20, 30), [], [10]),
        (found(10, 20, 30), [10], []),
        (found(10, 20, 30, 40), [10, 20], [10]),
        (found(10, 20, 30, 40), [40], [10, 20]),
    ],
)
def test_the_newest_two_stay_and_the_newest_that_waits_for_storage(
    there: dict[Copy, Marks], waiting: list[int], gone: list[int]
) -> None:
    """Older ones that wait were passed over."""
    assert surplus(there, [copy(step) for step in waiting]) == [copy(step) for step in gone]


def disk(folder: Path, *ranks: int) -> Disk:
    return Disk(str(folder), ranks, world_size=8, run_id="run")


def lay_down(folder: Path, rank: int, stem: str) -> None:
    for end in ("image", "head"):
        path = folder / f"rank-{rank}" / f"{stem}.{end}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")


def test_copies_belong_to_the_line_of_their_root_or_are_removed(tmp_path: Path) -> None:
    """A root that was emptied, and one that another training had meanwhile, both have another line."""
    own = disk(tmp_path, 0, 1)
    assert own.belong_to("first"), "there is nothing that could be another's"
    for rank in own.ranks:
        lay_down(tmp_path, rank, copy(10).stem)
    assert own.belong_to("first")
    assert list(own.copies()) == [copy(10)]
    assert not own.belong_to("second")
    assert own.copies() == {}


def test_a_copy_counts_when_every_rank_of_the_pod_has_it(tmp_path: Path) -> None:
    """One without a head, and one of another rank alone, are none; what a killed write has left goes."""
    own = disk(tmp_path, 0, 1)
    for rank in own.ranks:
        lay_down(tmp_path, rank, copy(10).stem)
    lay_down(tmp_path, 0, copy(20).stem)
    lay_down(tmp_path, 0, copy(30).stem)
    (tmp_path / "rank-0" / f"{copy(30).stem}.head").unlink()
    assert list(own.copies()) == [copy(10)]
    own.tidy()
    assert not (tmp_path / "rank-0" / f"{copy(30).stem}.image").exists()
    assert list(own.copies()) == [copy(10)]


def test_room_is_made_of_what_is_on_storage_and_not_in_use(tmp_path: Path) -> None:
    """The oldest such copy goes first; when there is none, nothing goes."""
    own = disk(tmp_path, 0)
    for step in (10, 20, 30):
        lay_down(tmp_path, 0, copy(step).stem)
    own.mark(copy(10), "stored")
    own.mark(copy(20), "stored")
    with own.using(copy(10)):
        assert own.make_room()
        assert list(own.copies()) == [copy(10), copy(30)]
        assert not own.make_room()
    assert own.make_room()
    assert not own.make_room()
    assert list(own.copies()) == [copy(30)]
