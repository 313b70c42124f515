"""
The whole of: that retention removes what Pillion wrote, and nothing else, whatever its name.

Called from: pytest.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pillion.wire import names
from pillion.wire.policy import Retention
from pillion_sidecar.checkpoint import catalog, commit, milestones, retention
from pillion_sidecar.storage.local import REMOVED, LocalFolder
from support.parts import write_part

KEEP_ONE = Retention(keep_last=1)


def committed(root: Path, step: int, generation: str = "1") -> Path:
    folder = root / names.step_directory(step)
    folder.mkdir()
    write_part(folder, 0, world_size=1, generation=generation, step=step)
    assert commit.finish(LocalFolder(str(folder))) is not None
    return folder


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("policy", [Retention(), KEEP_ONE])
@pytest.mark.parametrize("name", ["model.safetensors", "__0_0.distcp", "optimizer.pt", ".metadata.tmp"])
def test_a_directory_without_a_file_of_pillion_is_left_alone(tmp_path: Path, policy: Retention, name: str) -> None:
    """An export, or a save of another program that is on its way: `step-5` is a common name."""
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-5" / name).write_text("mine")
    (tmp_path / "step-6").mkdir()
    committed(tmp_path, 10)
    retention.apply(LocalFolder(str(tmp_path)), policy, current=10, generation=1)
    assert (tmp_path / "step-5" / name).read_text() == "mine"
    assert (tmp_path / "step-6").is_dir()


def test_a_checkpoint_of_another_program_stays_whatever_the_policy_says(tmp_path: Path) -> None:
    """It has a marker, and no manifest of Pillion."""
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-5" / names.COMMIT_MARKER).write_bytes(b"stock")
    (tmp_path / "step-5" / "__0_0.distcp").write_bytes(b"stock")
    committed(tmp_path, 10)
    assert retention.apply(LocalFolder(str(tmp_path)), KEEP_ONE, current=10, generation=1) == []
    assert files(tmp_path / "step-5") == {names.COMMIT_MARKER, "__0_0.distcp"}


def test_files_that_a_user_put_beside_a_checkpoint_stay_when_it_goes(tmp_path: Path) -> None:
    """The checkpoint is gone, its directory holds what is not Pillion's, and the next retention leaves that alone too."""
    folder = committed(tmp_path, 5)
    (folder / "config.json").write_text("mine")
    (folder / "hf").mkdir()
    (folder / "hf" / "weights").write_text("mine")
    committed(tmp_path, 10)
    assert retention.apply(LocalFolder(str(tmp_path)), KEEP_ONE, current=10, generation=1) == [5]
    assert files(folder) == {"config.json", "hf"}
    assert (folder / "hf" / "weights").read_text() == "mine"
    assert not list((tmp_path / names.INTERNAL_DIR / REMOVED).iterdir())
    retention.apply(LocalFolder(str(tmp_path)), KEEP_ONE, current=10, generation=1)
    assert files(folder) == {"config.json", "hf"}


def test_what_a_failed_save_left_goes_and_what_lies_beside_it_stays(tmp_path: Path) -> None:
    """It was never committed."""
    folder = tmp_path / "step-5"
    folder.mkdir()
    write_part(folder, 0, world_size=2)
    (folder / "notes.txt").write_text("mine")
    alone = tmp_path / "step-6"
    alone.mkdir()
    write_part(alone, 0, world_size=2, step=6)
    committed(tmp_path, 10)
    retention.apply(LocalFolder(str(tmp_path)), Retention(), current=10, generation=1)
    assert files(folder) == {"notes.txt"}
    assert not alone.exists()


def test_a_removal_that_is_left_in_the_middle_is_finished_by_the_next(tmp_path: Path) -> None:
    """Retention works in slices; at no moment is a checkpoint half there."""
    folder = committed(tmp_path, 5)
    (folder / "config.json").write_text("mine")
    committed(tmp_path, 10)
    slices = 0
    while catalog.steps(LocalFolder(str(tmp_path))).get(5) or list((tmp_path / names.INTERNAL_DIR / REMOVED).iterdir()):
        before = retention.tidy(LocalFolder(str(tmp_path)), KEEP_ONE, current=10, generation=1)
        next(before, None)
        assert not (folder / names.COMMIT_MARKER).exists() or catalog.read(LocalFolder(str(folder)), 5).native
        slices += 1
        assert slices < 20
    assert slices > 3
    assert files(folder) == {"config.json"}


def test_the_checkpoint_that_a_load_has_verified_last_stays(tmp_path: Path) -> None:
    """Until another has been verified, or it was written again."""
    for step in (1, 2, 3):
        committed(tmp_path, step)
    milestones.note_verified(LocalFolder(str(tmp_path)), 1)
    assert retention.apply(LocalFolder(str(tmp_path)), KEEP_ONE, current=3, generation=1) == [2]
    milestones.note_verified(LocalFolder(str(tmp_path)), 3)
    assert retention.apply(LocalFolder(str(tmp_path)), KEEP_ONE, current=3, generation=1) == [1]


def test_a_plug_in_writers_checkpoint_goes_by_the_list_of_what_it_wrote(tmp_path: Path) -> None:
    """What came into the directory later stays, and so does a checkpoint that is on no list."""
    for step in (1, 2):
        folder = tmp_path / names.step_directory(step)
        folder.mkdir()
        (folder / names.COMMIT_MARKER).write_bytes(b"stock")
        (folder / "data.bin").write_bytes(b"stock")
    milestones.note_written(LocalFolder(str(tmp_path)), 1, "3-1", files(tmp_path / "step-1"))
    assert catalog.committed(LocalFolder(str(tmp_path))) == {1: (3, 0), 2: (3, 0)}
    (tmp_path / "step-1" / "eval.json").write_text("mine")
    for step in (1, 2):
        for _ in retention.remove_written(LocalFolder(str(tmp_path)), step):
            pass
    assert files(tmp_path / "step-1") == {"eval.json"}
    assert files(tmp_path / "step-2") == {names.COMMIT_MARKER, "data.bin"}


def test_a_marker_says_whether_a_checkpoint_is_anothers_also_when_the_manifest_is_lost(tmp_path: Path) -> None:
    """Part files of a save that was refused there prove nothing."""
    ours = committed(tmp_path, 1)
    assert not commit.is_strangers(LocalFolder(str(ours)))
    (ours / names.MANIFEST).unlink()
    assert not commit.is_strangers(LocalFolder(str(ours)))
    theirs = tmp_path / "step-2"
    theirs.mkdir()
    assert not commit.is_strangers(LocalFolder(str(theirs)))
    dcp.save({"w": torch.ones(3)}, checkpoint_id=theirs, no_dist=True)
    write_part(theirs, 0, world_size=1, step=2)
    assert commit.is_strangers(LocalFolder(str(theirs)))
    before = (theirs / names.COMMIT_MARKER).read_bytes()
    assert commit.finish(LocalFolder(str(theirs))) is None
    assert not catalog.read(LocalFolder(str(theirs)), 2).native
    assert catalog.finish_interrupted(LocalFolder(str(tmp_path))) == []
    assert (theirs / names.COMMIT_MARKER).read_bytes() == before


def test_a_link_in_a_steps_place_stays(tmp_path: Path) -> None:
    """Its target is none of this root's."""
    (tmp_path / "elsewhere").mkdir()
    elsewhere = committed(tmp_path / "elsewhere", 5)
    (tmp_path / "step-5").symlink_to(elsewhere)
    committed(tmp_path, 10)
    assert retention.apply(LocalFolder(str(tmp_path)), KEEP_ONE, current=10, generation=1) == []
    assert (tmp_path / "step-5").is_symlink()
    assert commit.committed_as(LocalFolder(str(elsewhere))) == "1"
