"""
The whole of: the age and the quota of a root's checkpoints, on a directory: what goes, what is read, and what is told.

Called from: pytest.
"""

import dataclasses
from pathlib import Path

import pytest

from pillion.wire import manifest, names
from pillion.wire.policy import Retention
from pillion_sidecar.checkpoint import catalog, commit, facts, pins, retention
from pillion_sidecar.storage.local import LocalFolder
from support.parts import write_part

HOUR_NS = 3600 * 10**9


def add(root: LocalFolder, step: int, *, size_bytes: int) -> None:
    """Commit a step of the hour `step`, with a manifest that gives it a size."""
    assert root.path is not None
    folder = Path(root.path) / names.step_directory(step)
    folder.mkdir()
    write_part(folder, 0, world_size=1, step=step)
    assert commit.finish(LocalFolder(str(folder))) is not None
    path = folder / names.MANIFEST
    made = manifest.decode_manifest(path.read_bytes())
    path.write_bytes(dataclasses.replace(made, created_ns=step * HOUR_NS, size_bytes=size_bytes).encode())


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    """A root with the steps 1 to 4, an hour apart, of 100 bytes each."""
    made = LocalFolder(str(tmp_path))
    for step in (1, 2, 3, 4):
        add(made, step, size_bytes=100)
    return made


def test_age_and_quota_are_taken_from_the_manifests(root: LocalFolder) -> None:
    """Older than the newest by more than 2 h goes; then the oldest goes, until 250 bytes are enough. Neither needs keepLast."""
    assert retention.apply(root, Retention(max_age_seconds=7200), current=4, generation=1) == [1]
    assert retention.apply(root, Retention(max_bytes=300), current=4, generation=1) == []
    assert retention.apply(root, Retention(max_bytes=250), current=4, generation=1) == [2]


def test_pinned_and_verified_checkpoints_stay_and_count(root: LocalFolder) -> None:
    """The quota has room for two: the pinned one, and the newest."""
    pins.pin(root, 1)
    assert retention.apply(root, Retention(max_bytes=200), current=4, generation=1) == [2, 3]
    assert retention.apply(root, Retention(max_age_seconds=1, max_bytes=1), current=4, generation=1) == []


def resize(root: LocalFolder, step: int, size_bytes: int) -> None:
    """Give a committed step another size behind everybody's back."""
    assert root.path is not None
    path = Path(root.path) / names.step_directory(step) / names.MANIFEST
    made = manifest.decode_manifest(path.read_bytes())
    path.write_bytes(dataclasses.replace(made, size_bytes=size_bytes).encode())


def test_a_session_reads_each_manifest_once_and_is_told_what_cannot_be_kept(root: LocalFolder) -> None:
    """What was read is not read again; the text is there as long as the quota is exceeded."""
    known = facts.Known()

    def tidy(most_bytes: int, current: int) -> None:
        for _ in retention.tidy(root, Retention(max_bytes=most_bytes), current=current, generation=1, known=known):
            pass

    tidy(1000, 4)
    assert (known.steps, known.over_quota) == ({1, 2, 3, 4}, "")
    resize(root, 3, 10**9)
    tidy(250, 4)
    assert (known.steps, known.over_quota) == ({3, 4}, "")
    tidy(99, 4)
    assert "the checkpoints that must stay have 100: step 4 (100, the newest)" in known.over_quota
    assert known.steps == {4}
    add(root, 5, size_bytes=50)
    tidy(99, 5)
    assert (known.steps, known.over_quota) == ({5}, "")
    assert sorted(catalog.committed(root)) == [5]


def test_a_step_that_is_saved_again_has_its_new_size(root: LocalFolder) -> None:
    """`forget` is what a commit calls; without it the old size would count."""
    known = facts.Known()
    assert facts.sizes(known.read(root, [4])) == {4: 100}
    resize(root, 4, 7)
    assert facts.sizes(known.read(root, [4])) == {4: 100}
    known.forget(4)
    assert facts.sizes(known.read(root, [4])) == {4: 7}


def test_a_full_disk_makes_room_for_a_save_as_large_as_the_newest(root: LocalFolder) -> None:
    """A quota of three: before the fourth and the fifth are together on the disk, the oldest two go."""
    for _ in retention.make_room(root, Retention(max_bytes=300), current=5, generation=1):
        pass
    assert sorted(catalog.committed(root)) == [3, 4]


def test_what_another_program_wrote_has_no_age_and_counts_nothing(root: LocalFolder) -> None:
    """Its times and sizes are not in a manifest, and retention could not remove it."""
    assert root.path is not None
    stock = Path(root.path) / "step-0"
    stock.mkdir()
    (stock / names.COMMIT_MARKER).write_bytes(b"\x80" + b"x" * 500)
    assert retention.apply(root, Retention(max_age_seconds=1, max_bytes=400), current=4, generation=1) == [1, 2, 3]
    assert stock.is_dir()
