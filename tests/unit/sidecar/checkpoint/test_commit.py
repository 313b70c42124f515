"""Commits, fences and interrupted commits on a real directory."""

import dataclasses
import errno
import itertools
import os
import re
import threading
from pathlib import Path

import pytest

import pillion
from pillion.wire import names
from pillion_sidecar.checkpoint import catalog, commit, retention
from pillion_sidecar.storage import durable, folders, late_names, temporary_names
from pillion_sidecar.storage import generation as generation_module
from pillion_sidecar.storage.local import LocalFolder
from support.parts import begin_session, write_part


def test_a_save_whose_every_part_was_written_is_committed_by_whoever_finds_it(tmp_path: Path) -> None:
    """Its job and coordinator are gone; the parts say by themselves that they are complete."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    for rank in range(3):
        write_part(folder, rank, world_size=3)
    assert catalog.steps(LocalFolder(str(tmp_path))) == {5: False}
    assert catalog.finish_interrupted(LocalFolder(str(tmp_path))) == [5]
    assert catalog.steps(LocalFolder(str(tmp_path))) == {5: True}
    assert len(catalog.read(LocalFolder(str(folder)), 5).chunks["w"]) == 3


@pytest.mark.parametrize("fault", ["a rank is missing", "a file is short", "another plan", "another generation"])
def test_a_save_with_anything_missing_is_never_committed(tmp_path: Path, fault: str) -> None:
    """No manifest and no marker appear."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    write_part(folder, 0, world_size=2)
    if fault != "a rank is missing":
        write_part(
            folder,
            1,
            world_size=2,
            plan_id="q" if fault == "another plan" else "p",
            generation="2" if fault == "another generation" else "1",
        )
    if fault == "a file is short":
        file = folder / names.data_file(1, 0, "1")
        file.write_bytes(file.read_bytes()[:-1])
    assert catalog.finish_interrupted(LocalFolder(str(tmp_path))) == []
    assert not (folder / names.COMMIT_MARKER).exists()
    assert not (folder / names.MANIFEST).exists()


def test_the_newest_complete_generation_wins_in_a_directory_that_two_attempts_wrote(tmp_path: Path) -> None:
    """Generations are numbers: 10 is newer than 9."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    for generation in ("9", "10"):
        for rank in range(2):
            write_part(folder, rank, world_size=2, generation=generation)
    made = commit.finish(LocalFolder(str(folder)))
    assert made is not None
    assert made.generation == "10"


def test_a_lost_manifest_is_made_again_from_the_parts_and_the_digests_still_count(tmp_path: Path) -> None:
    """A load without digests would be a load that finds no flip."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    for rank in range(2):
        write_part(folder, rank, world_size=2)
    commit.finish(LocalFolder(str(folder)))
    (folder / names.MANIFEST).unlink()
    assert all(chunk.digest for chunk in catalog.read(LocalFolder(str(folder)), 5).chunks["w"])
    (folder / names.MANIFEST).unlink()
    (folder / names.part_file(1, "1")).unlink()
    with pytest.raises(catalog.Damaged, match=names.MANIFEST):
        catalog.read(LocalFolder(str(folder)), 5)


def test_generations_grow_and_an_older_attempt_is_fenced_off(tmp_path: Path) -> None:
    """From the moment that a newer one has begun, the older one's commit is refused."""
    first = begin_session(str(tmp_path))
    commit.fence(LocalFolder(str(tmp_path)), first)
    second = begin_session(str(tmp_path))
    assert second > first
    commit.fence(LocalFolder(str(tmp_path)), second)
    with pytest.raises(pillion.CommitError, match="fenced off"):
        commit.fence(LocalFolder(str(tmp_path)), first)


@pytest.mark.parametrize("fault", ["a data file is elsewhere", "a part is elsewhere", "a data file is short"])
def test_a_commit_is_looked_at_and_not_believed(tmp_path: Path, fault: str) -> None:
    """What a pod reported and what is not in the directory with its length ends the commit, by name; what was there stays."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    for rank in range(2):
        write_part(folder, rank, world_size=2, generation="1")
    before = commit.finish(LocalFolder(str(folder)))
    for rank in range(2):
        write_part(folder, rank, world_size=2, generation="2")
    files = {path.name: path.stat().st_size for path in folder.iterdir() if ".2." in path.name}
    assert len(files) == 4
    lost = names.part_file(1, "2") if fault == "a part is elsewhere" else names.data_file(1, 0, "2")
    if fault == "a data file is short":
        (folder / lost).write_bytes(b"short")
    else:
        (folder / lost).unlink()
    assert before is not None
    newer = dataclasses.replace(before, generation="2")
    with pytest.raises(commit.FilesMissing, match=re.escape(lost)) as raised:
        commit.publish(LocalFolder(str(folder)), newer, b"metadata", files, late_s=0.0)
    assert set(raised.value.files) == {lost}
    assert commit.committed_as(LocalFolder(str(folder))) == "1"
    assert catalog.read(LocalFolder(str(folder)), 5).chunks["w"][1].file == names.data_file(1, 0, "1")
    assert not [path for path in folder.iterdir() if path.name.endswith(temporary_names.COMMIT_SUFFIX)]


def test_a_file_that_a_network_file_system_shows_late_is_waited_for(tmp_path: Path) -> None:
    """It appears between two looks."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    write_part(folder, 0, world_size=1)
    made = commit.finish(LocalFolder(str(folder)))
    assert made is not None
    late = folder / names.data_file(9, 0, "1")
    appears = threading.Timer(late_names.PAUSE_FIRST_S, late.write_bytes, (b"late",))
    appears.start()
    commit.publish(LocalFolder(str(folder)), made, b"metadata", {late.name: 4})
    appears.join()
    assert (folder / names.COMMIT_MARKER).read_bytes() == b"metadata"


def test_no_two_saves_of_a_step_have_a_name_in_common(tmp_path: Path) -> None:
    """Not after a load of an older one, not beside the rescue of a snapshot, not in another session; and the later one is the newer."""
    made = [
        generation_module.text(generation, generation_module.save_number(epoch, rescued=rescued))
        for generation in (1, 2)
        for epoch in (0, 1, 2)
        for rescued in (True, False)
    ]
    assert len(set(made)) == len(made)
    assert made == sorted(made, key=generation_module.order)
    assert [generation_module.order_of(each) for each in made] == [
        (g, e) for g in (1, 2) for e in (0, 1, 2) for _ in range(2)
    ]


def test_a_manifest_of_its_old_name_is_read_and_a_users_file_of_that_name_is_not(tmp_path: Path) -> None:
    """Checkpoints of releases before stay readable; `manifest.json` is a common name."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    write_part(folder, 0, world_size=1)
    commit.finish(LocalFolder(str(folder)))
    (folder / names.MANIFEST).rename(folder / names.OLD_MANIFEST)
    assert commit.committed_as(LocalFolder(str(folder))) == "1"
    assert catalog.read(LocalFolder(str(folder)), 5).native
    (folder / names.OLD_MANIFEST).write_text('{"weights": "mine"}')
    assert commit.committed_as(LocalFolder(str(folder))) is None
    write_part(folder, 0, world_size=1, generation="2")
    assert commit.finish(LocalFolder(str(folder))) is not None
    retention.remove_older_files(LocalFolder(str(folder)), "2")
    assert (folder / names.OLD_MANIFEST).read_text() == '{"weights": "mine"}'


def test_a_file_of_a_steps_name_is_no_checkpoint_and_in_nobodys_way(tmp_path: Path) -> None:
    """Neither a listing nor the look for interrupted commits fails by it."""
    (tmp_path / "step-7").write_text("notes")
    write(tmp_path / "step-5")
    assert catalog.steps(LocalFolder(str(tmp_path))) == {5: False}
    assert catalog.finish_interrupted(LocalFolder(str(tmp_path))) == [5]
    assert catalog.newest(LocalFolder(str(tmp_path))) is not None


def write(folder: Path) -> None:
    folder.mkdir()
    write_part(folder, 0, world_size=1)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_commit_on_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """What it lays down has a new name at each try, so that nobody would ever remove it."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    write_part(folder, 0, world_size=1)
    before = sorted(folder.iterdir())
    calls = itertools.count(1)

    def full(_: int) -> None:
        if next(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        commit.finish(LocalFolder(str(folder)))
    assert sorted(folder.iterdir()) == before


def test_the_newest_generation_that_has_written_to_a_place_is_found(tmp_path: Path) -> None:
    """Committed or not; a place that is not there has none."""
    folder = tmp_path / "latest"
    assert commit.newest_written(LocalFolder(str(folder))) == 0
    folder.mkdir()
    assert commit.newest_written(LocalFolder(str(folder))) == 0
    write_part(folder, 0, world_size=1, generation="7-3")
    commit.finish(LocalFolder(str(folder)))
    assert commit.newest_written(LocalFolder(str(folder))) == 7
    write_part(folder, 0, world_size=2, generation="11-1")
    (folder / "model.safetensors").touch()
    assert commit.newest_written(LocalFolder(str(folder))) == 11


def test_every_folder_that_is_made_for_a_checkpoint_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint_id may name folders that are not there yet; the nearest alone was synced."""
    synced: list[str] = []
    monkeypatch.setattr(durable, "fsync_directory", lambda path: synced.append(str(path)))
    folders.make(str(tmp_path / "runs" / "today" / "latest"))
    assert synced == [str(tmp_path), str(tmp_path / "runs"), str(tmp_path / "runs" / "today")]
    folders.make(str(tmp_path / "runs" / "today" / "latest"))
    assert len(synced) == 3
