"""Commits, fences and interrupted commits on a real directory."""

from pathlib import Path

import pytest

import pillion
from pillion.wire import names
from pillion_sidecar import catalog, commit
from support.parts import write_part


def test_a_save_whose_every_part_was_written_is_committed_by_whoever_finds_it(tmp_path: Path) -> None:
    """Its job and coordinator are gone; the parts say by themselves that they are complete."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    for rank in range(3):
        write_part(folder, rank, world_size=3)
    assert catalog.steps(str(tmp_path)) == {5: False}
    assert catalog.finish_interrupted(str(tmp_path)) == [5]
    assert catalog.steps(str(tmp_path)) == {5: True}
    assert len(catalog.read(str(folder), 5).chunks["w"]) == 3


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
    assert catalog.finish_interrupted(str(tmp_path)) == []
    assert not (folder / names.COMMIT_MARKER).exists()
    assert not (folder / names.MANIFEST).exists()


def test_the_newest_complete_generation_wins_in_a_directory_that_two_attempts_wrote(tmp_path: Path) -> None:
    """Generations are numbers: 10 is newer than 9."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    for generation in ("9", "10"):
        for rank in range(2):
            write_part(folder, rank, world_size=2, generation=generation)
    made = commit.finish(str(folder))
    assert made is not None
    assert made.generation == "10"


def test_a_lost_manifest_is_made_again_from_the_parts_and_the_digests_still_count(tmp_path: Path) -> None:
    """A load without digests would be a load that finds no flip."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    for rank in range(2):
        write_part(folder, rank, world_size=2)
    commit.finish(str(folder))
    (folder / names.MANIFEST).unlink()
    assert all(chunk.digest for chunk in catalog.read(str(folder), 5).chunks["w"])
    (folder / names.MANIFEST).unlink()
    (folder / names.part_file(1, "1")).unlink()
    with pytest.raises(catalog.Damaged, match=names.MANIFEST):
        catalog.read(str(folder), 5)


def test_generations_grow_and_an_older_attempt_is_fenced_off(tmp_path: Path) -> None:
    """From the moment that a newer one has begun, the older one's commit is refused."""
    first = commit.claim_generation(str(tmp_path))
    commit.fence(str(tmp_path), first)
    second = commit.claim_generation(str(tmp_path))
    assert second > first
    commit.fence(str(tmp_path), second)
    with pytest.raises(pillion.CommitError, match="fenced off"):
        commit.fence(str(tmp_path), first)
