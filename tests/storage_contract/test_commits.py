"""
Tests of what every folder promises of commits and of their removal.

Called from: pytest.
"""

import threading
from concurrent import futures
from typing import Final

import pytest

from pillion.errors import CommitError
from pillion.wire import names
from pillion_sidecar.storage import generation as generations
from pillion_sidecar.storage.folder import Folder
from storage_contract.documents import PUBLISHED, documents, generation_of

ATTEMPTS: Final = ("1", "2", "3", "4-1")
ROUNDS: Final = 4
"""Rounds of the race: the interleavings differ by chance."""


def publish(folder: Folder, generation: str) -> None:
    folder.publish(documents(generation), generation=generation, generation_of=generation_of)


def committed(folder: Folder) -> list[str | None]:
    """The generations of both documents."""
    return [generation_of(folder.read(name)) for name in PUBLISHED]


def take_down(folder: Folder, by: int) -> Folder | None:
    return folder.take_down(by=by, generation_of=generation_of, marker=names.COMMIT_MARKER)


def test_a_newer_attempt_takes_the_place_of_an_older_one(step: Folder) -> None:
    """A commit is both documents; a newer generation's and the same one's again take their place, an older one's is refused."""
    for generation in ("3", "5", "5", "5-1"):
        publish(step, generation)
        assert committed(step) == [generation, generation]
    for generation in ("4", "5"):
        with pytest.raises(CommitError, match=r"5-1"):
            publish(step, generation)
    assert committed(step) == ["5-1", "5-1"]
    assert step.files().keys() == set(PUBLISHED)


def test_what_is_looked_at_before_a_commit_can_prevent_it(step: Folder) -> None:
    """`before` is called while nothing is visible, `between` when all but the marker is; what either raises ends the commit there."""
    publish(step, "1")
    seen: list[list[str | None]] = []

    def look() -> None:
        seen.append(committed(step))

    step.publish(documents("2"), generation="2", generation_of=generation_of, before=look, between=look)
    assert seen == [["1", "1"], ["2", "1"]]

    def refuse() -> None:
        raise CommitError("files are missing")

    with pytest.raises(CommitError, match="files are missing"):
        step.publish(documents("3"), generation="3", generation_of=generation_of, before=refuse)
    assert committed(step) == ["2", "2"]
    assert step.files().keys() == set(PUBLISHED)


def test_attempts_at_once_end_with_the_newest(root: Folder) -> None:
    """Of attempts that commit one step at once, whoever was told that it committed stands, or a newer one does; the newest always does."""
    for number in range(ROUNDS):
        folder = root.below(f"step-{number}")
        folder.make()
        barrier = threading.Barrier(len(ATTEMPTS))

        def go(generation: str, folder: Folder = folder, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                publish(folder, generation)
            except CommitError:
                return False
            return True

        with futures.ThreadPoolExecutor(len(ATTEMPTS)) as pool:
            said = dict(zip(ATTEMPTS, pool.map(go, ATTEMPTS), strict=True))
        assert said[ATTEMPTS[-1]], said
        assert committed(folder) == [ATTEMPTS[-1], ATTEMPTS[-1]]


def test_a_checkpoint_is_taken_down_by_one_step(root: Folder, step: Folder) -> None:
    """What was taken down is no checkpoint any more for whoever looks where it was, and its files can be removed one by one."""
    step.put("__0_0.1.distcp", b"data")
    publish(step, "1")
    aside = take_down(step, by=1)
    assert aside is not None
    assert names.COMMIT_MARKER not in step.files()
    assert step.entry(names.COMMIT_MARKER) is None
    with pytest.raises(FileNotFoundError):
        step.read(names.COMMIT_MARKER)
    assert {"__0_0.1.distcp", names.MANIFEST} <= aside.files().keys()
    aside.delete(sorted(aside.files()))
    assert aside.give_back() == []
    aside.remove_if_empty()
    assert root.folders() in ([], [names.INTERNAL_DIR])
    assert root.taken_down() == []


def test_what_is_left_of_a_removal_is_where_it_was(step: Folder) -> None:
    """A file that stays, as Pillion did not write it, is back in the folder, which stays with it."""
    step.put("notes.txt", b"mine")
    publish(step, "1")
    aside = take_down(step, by=1)
    assert aside is not None
    aside.delete([name for name in aside.files() if name != "notes.txt"])
    assert aside.give_back() == ["notes.txt"]
    aside.remove_if_empty()
    assert step.read("notes.txt") == b"mine"


def test_a_removal_can_be_undone(step: Folder) -> None:
    """What was taken down and nothing was removed of is a checkpoint again."""
    publish(step, "1")
    aside = take_down(step, by=1)
    assert aside is not None
    aside.put_up()
    assert committed(step) == ["1", "1"]


def test_a_newer_attempts_checkpoint_stays(step: Folder) -> None:
    """A session that is not the newest any more takes nothing down that a newer one has committed."""
    publish(step, "5-1")
    assert take_down(step, by=4) is None
    assert committed(step) == ["5-1", "5-1"]


def test_there_is_nothing_to_take_down_twice(root: Folder, step: Folder) -> None:
    """What is not there, or not there any more, is a FileNotFoundError."""
    with pytest.raises(FileNotFoundError):
        take_down(root.below("step-9"), by=1)
    publish(step, "1")
    aside = take_down(step, by=1)
    assert aside is not None
    aside.delete(list(aside.files()))
    aside.remove_if_empty()
    with pytest.raises(FileNotFoundError):
        take_down(step, by=1)


def test_a_step_is_committed_again_after_its_removal(root: Folder, step: Folder) -> None:
    """A step that a rollback brings back is committed where an earlier one was taken down, also while that is being removed."""
    publish(step, "1")
    aside = take_down(step, by=1)
    assert aside is not None
    step.make()
    publish(step, "1-2")
    assert committed(step) == ["1-2", "1-2"]
    aside.remove_if_empty()
    assert committed(step) == ["1-2", "1-2"]
    assert generations.order("1-2") > generations.order("1")
    assert "step-1" in root.folders()
