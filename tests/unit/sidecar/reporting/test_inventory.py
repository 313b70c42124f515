"""What storage holds, as reports tell it, and what a look at it costs."""

import os
from pathlib import Path

import pytest

from pillion.wire import home, manifest, names
from pillion_sidecar.reporting import inventory


def commit(root: Path, step: int, *, size: int = 10, started_ns: int = 10**18, cause: str = "OnDemand") -> Path:
    folder = root / names.step_directory(step)
    folder.mkdir(parents=True, exist_ok=True)
    of = manifest.Manifest(
        step=step,
        generation="1",
        run_id="run",
        world_size=4,
        plan_id="p",
        started_ns=started_ns,
        created_ns=10**18 + 5 * 10**9,
        cause=cause,
        size_bytes=size,
        digest_algorithm="x",
        metadata_digest="x",
        parts=(),
    )
    (folder / names.MANIFEST).write_bytes(of.encode())
    (folder / names.COMMIT_MARKER).write_bytes(b"x")
    return folder


def look(of: inventory.Inventory, now_s: float = 0.0, *stale: int) -> list[home.CommittedCheckpoint]:
    found, problem = of.look(now_s, frozenset(stale))
    assert problem == ""
    return list(found)


def test_every_committed_checkpoint_is_listed_newest_first(tmp_path: Path) -> None:
    """With size, ranks, times and cause of its manifest; what is not committed, or no checkpoint, is not."""
    root = tmp_path / "llm-0"
    for step in (5, 100, 20):
        commit(root, step)
    (root / "step-200").mkdir()
    (root / "notes").mkdir()
    found = look(inventory.Inventory(str(root), "llm-0"))
    assert [each.step for each in found] == [100, 20, 5]
    assert found[0] == home.CommittedCheckpoint(
        step=100,
        path="llm-0/step-100",
        size_bytes=10,
        world_size=4,
        started="2001-09-09T01:46:40.000Z",
        completed="2001-09-09T01:46:45.000Z",
        cause="OnDemand",
    )


def test_what_stock_dcp_or_an_older_release_wrote_is_listed_with_what_is_known(tmp_path: Path) -> None:
    """No manifest: the size of the files, the time of the marker, no ranks. One without the new fields is periodic."""
    stock = tmp_path / "step-1"
    stock.mkdir()
    (stock / names.COMMIT_MARKER).write_bytes(b"1234")
    os.utime(stock / names.COMMIT_MARKER, (100.0, 100.0))
    commit(tmp_path, 2, started_ns=0, cause="")
    newer, older = look(inventory.Inventory(str(tmp_path), "run"))
    assert (older.size_bytes, older.world_size, older.completed) == (4, 0, "1970-01-01T00:01:40.000Z")
    assert (newer.started, newer.cause) == ("", "Periodic")


def test_a_second_look_reads_nothing_that_it_knows(tmp_path: Path) -> None:
    """A manifest that is gone is not missed until the next minute, or until this sidecar has written the step anew."""
    of = inventory.Inventory(str(tmp_path), "run")
    commit(tmp_path, 1)
    folder = commit(tmp_path, 2)
    before = look(of)
    (folder / names.MANIFEST).write_bytes(b"unreadable")
    assert look(of, 1.0) == before
    commit(tmp_path, 2, size=77)
    os.utime(folder / names.COMMIT_MARKER, (100.0, 100.0))
    assert look(of, 2.0) == before
    assert look(of, 3.0, 2)[0].size_bytes == 77
    commit(tmp_path, 1, size=88)
    os.utime(tmp_path / "step-1" / names.COMMIT_MARKER, (100.0, 100.0))
    assert look(of, 4.0)[1].size_bytes == 10
    assert look(of, inventory.AGAIN_S)[1].size_bytes == 88


def test_what_is_removed_is_gone_from_the_next_look(tmp_path: Path) -> None:
    """By its directory at once; by its marker alone within a minute."""
    of = inventory.Inventory(str(tmp_path), "run")
    for step in (1, 2):
        commit(tmp_path, step)
    assert len(look(of)) == 2
    (tmp_path / "step-1" / names.COMMIT_MARKER).unlink()
    (tmp_path / "step-2").rename(tmp_path / "elsewhere")
    assert [each.step for each in look(of, 1.0)] == [1]
    assert look(of, inventory.AGAIN_S) == []


def test_the_newest_are_listed_where_there_are_too_many(tmp_path: Path) -> None:
    """A report has a bound, and so has what is kept in memory."""
    for step in range(home.MAX_CHECKPOINTS + 5):
        commit(tmp_path, step)
    of = inventory.Inventory(str(tmp_path), "run")
    found = look(of)
    assert len(found) == len(of._known) == home.MAX_CHECKPOINTS
    assert (found[0].step, found[-1].step) == (home.MAX_CHECKPOINTS + 4, 5)


def test_a_root_that_is_not_there_yet_is_empty_and_one_that_is_none_is_an_error(tmp_path: Path) -> None:
    """The probe makes the root; a file in its place cannot be listed."""
    assert look(inventory.Inventory(str(tmp_path / "new"), "run")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        inventory.Inventory(str(tmp_path / "file"), "run").look(0.0, frozenset())
