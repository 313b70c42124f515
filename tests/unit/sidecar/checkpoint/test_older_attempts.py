"""
The whole of: that an older attempt can neither commit over nor delete from a newer one, wherever it was stopped in between.

Called from: pytest.
"""

from pathlib import Path

import pytest

from pillion import fault_points
from pillion.errors import CommitError
from pillion.fault_points import FaultPoint
from pillion.wire import names
from pillion.wire.policy import Retention
from pillion_sidecar.checkpoint import catalog, commit, retention
from pillion_sidecar.storage.local import REMOVED, LocalFolder
from support.parts import write_part


def write(folder: Path, generation: str, *, world_size: int = 1) -> None:
    """What the pods of one attempt leave: data and part files, no commit."""
    folder.mkdir(exist_ok=True)
    for rank in range(world_size):
        write_part(
            folder, rank, world_size=world_size, generation=generation, step=int(folder.name.removeprefix("step-"))
        )


def test_an_older_attempt_that_was_stopped_before_its_commit_finds_that_a_newer_one_has_made_its_own(
    tmp_path: Path,
) -> None:
    """It was stopped between its look and its commit, for as long as the newer attempt took to commit the same step."""
    folder = tmp_path / "step-5"
    write(folder, "1")
    write(folder, "2")

    def meanwhile(phase: FaultPoint, *_: object) -> None:
        if phase is FaultPoint.PUBLISH:
            fault_points.observe(None)
            assert commit.finish(LocalFolder(str(folder)), generation="2") is not None

    fault_points.observe(meanwhile)
    try:
        with pytest.raises(CommitError, match="generation 1 is fenced off"):
            commit.finish(LocalFolder(str(folder)), generation="1")
    finally:
        fault_points.observe(None)
    assert catalog.read(LocalFolder(str(folder)), 5).chunks["w"][0].file == names.data_file(0, 0, "2")


def test_an_older_attempt_that_comes_late_is_refused_before_it_writes(tmp_path: Path) -> None:
    """The manifest of the newer one stays as it is."""
    folder = tmp_path / "step-5"
    write(folder, "1")
    write(folder, "2")
    commit.finish(LocalFolder(str(folder)), generation="2")
    before = (folder / names.MANIFEST).read_bytes()
    with pytest.raises(CommitError):
        commit.finish(LocalFolder(str(folder)), generation="1")
    assert (folder / names.MANIFEST).read_bytes() == before


def test_two_that_find_the_same_save_complete_commit_it_once(tmp_path: Path) -> None:
    """The second one finds the marker of its own generation, and is content."""
    folder = tmp_path / "step-5"
    write(folder, "3")
    assert commit.finish(LocalFolder(str(folder))) is not None
    assert commit.finish(LocalFolder(str(folder))) is not None
    assert catalog.steps(LocalFolder(str(tmp_path))) == {5: True}


def test_what_a_newer_attempt_has_written_into_is_put_back(tmp_path: Path) -> None:
    """The retention of an older attempt takes it aside, looks, and lets it be."""
    for step, generation in ((1, "1"), (2, "2"), (3, "1")):
        write(tmp_path / f"step-{step}", generation)
        commit.finish(LocalFolder(str(tmp_path / f"step-{step}")))
    assert retention.apply(LocalFolder(str(tmp_path)), Retention(keep_last=1), current=3, generation=1) == [1]
    for _ in retention.remove(LocalFolder(str(tmp_path / "step-2")), generation=1):
        pytest.fail("something of a newer attempt was removed")
    assert catalog.steps(LocalFolder(str(tmp_path))) == {2: True, 3: True}
    assert catalog.read(LocalFolder(str(tmp_path / "step-2")), 2).step == 2


def test_files_of_a_newer_attempt_stay_in_a_directory_that_an_older_one_has_written_again(tmp_path: Path) -> None:
    """Only what is older goes."""
    folder = tmp_path / "step-5"
    for generation in ("1", "2", "3"):
        write(folder, generation)
    retention.remove_older_files(LocalFolder(str(folder)), "2")
    left = {names.parse_data_file(path.name) for path in folder.glob("*.distcp")}
    assert left == {(0, 0, "2"), (0, 0, "3")}


@pytest.mark.parametrize(
    ("keep_last", "left"),
    [(1, {30}), (2, {30}), (3, {20, 30})],
)
def test_a_full_disk_is_pruned_to_what_the_policy_keeps_after_the_save(
    tmp_path: Path, keep_last: int, left: set[int]
) -> None:
    """The newest committed one stays whatever the policy says, and so does nothing of a save that failed."""
    for step in (10, 20, 30):
        write(tmp_path / f"step-{step}", "1")
        commit.finish(LocalFolder(str(tmp_path / f"step-{step}")))
    write(tmp_path / "step-35", "1", world_size=2)
    for _ in retention.make_room(LocalFolder(str(tmp_path)), Retention(keep_last=keep_last), current=40, generation=1):
        pass
    assert {step for step, done in catalog.steps(LocalFolder(str(tmp_path))).items() if done} == left
    assert not (tmp_path / "step-35").exists()


def test_what_a_killed_attempt_had_taken_aside_from_a_newer_one_is_put_back(tmp_path: Path) -> None:
    """It died between its rename and its look; the next look for the newest checkpoint finds it again."""
    write(tmp_path / "step-5", "2")
    commit.finish(LocalFolder(str(tmp_path / "step-5")))
    aside = tmp_path / ".pillion" / REMOVED / "step-5.1.abcd"
    aside.parent.mkdir(parents=True)
    (tmp_path / "step-5").rename(aside)
    assert retention.put_back(LocalFolder(str(tmp_path))) == [5]
    assert catalog.steps(LocalFolder(str(tmp_path))) == {5: True}


def test_what_a_removal_of_its_own_left_aside_goes_with_the_next(tmp_path: Path) -> None:
    """A killed removal of what was to go is finished by the next one."""
    write(tmp_path / "step-5", "2")
    aside = tmp_path / ".pillion" / REMOVED / "step-5.2.abcd"
    aside.parent.mkdir(parents=True)
    (tmp_path / "step-5").rename(aside)
    assert retention.put_back(LocalFolder(str(tmp_path))) == []
    retention.apply(LocalFolder(str(tmp_path)), Retention(keep_last=1), current=9, generation=2)
    assert list(aside.parent.iterdir()) == []
