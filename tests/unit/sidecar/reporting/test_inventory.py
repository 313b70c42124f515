"""What storage holds, as reports tell it, and what a look at it costs."""

import dataclasses
import math
import os
from pathlib import Path

import pytest

from pillion.wire import home, manifest, names, remarks
from pillion_sidecar.checkpoint import pins
from pillion_sidecar.reporting import inventory
from pillion_sidecar.storage.local import LocalFolder


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
    found = look(inventory.Inventory(LocalFolder(str(root))))
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


def test_a_report_has_room_for_the_first_metrics_with_short_names(tmp_path: Path) -> None:
    """A thousand checkpoints of four metrics fit into a report; NaN is a text there."""
    folder = commit(tmp_path, 1)
    decoded = manifest.decode_manifest((folder / names.MANIFEST).read_bytes())
    said = {"n" * 65: 1.0, "loss": math.nan, **{f"metric{number}": float(number) for number in range(9)}}
    made = dataclasses.replace(decoded, remarks=remarks.Remarks(metrics=said, metadata={"a": 1}))
    (folder / names.MANIFEST).write_bytes(made.encode())
    (found,) = look(inventory.Inventory(LocalFolder(str(tmp_path))))
    assert found.metrics == {"loss": "nan", "metric0": 0.0, "metric1": 1.0, "metric2": 2.0}
    name = "\u00e9" * ((home.MAX_METRIC_NAME_BYTES - 3) // 6)
    longest = {f"{name}{number}": -1.2345678901234567e-300 for number in range(home.MAX_METRICS)}
    (folder / names.MANIFEST).write_bytes(dataclasses.replace(made, remarks=remarks.Remarks(metrics=longest)).encode())
    (found,) = look(inventory.Inventory(LocalFolder(str(tmp_path))))
    assert found.metrics == longest
    entry = dataclasses.replace(
        found, step=10**9, path="p" * 100, started="2026-01-01T00:00:00.000000Z", metrics=longest
    )
    report = home.Report(
        namespace="n",
        pod="p",
        pod_uid="u",
        policy="p",
        job_kind="Job",
        job_name="j",
        job_id="j",
        checkpoints=(entry,) * home.MAX_CHECKPOINTS,
        listed=True,
    )
    assert len(home.encode(report)) <= home.MAX_REPORT_BYTES


def test_what_stock_dcp_or_an_older_release_wrote_is_listed_with_what_is_known(tmp_path: Path) -> None:
    """No manifest: the size of the files, the time of the marker, no ranks. One without the new fields is periodic."""
    stock = tmp_path / "step-1"
    stock.mkdir()
    (stock / names.COMMIT_MARKER).write_bytes(b"1234")
    os.utime(stock / names.COMMIT_MARKER, (100.0, 100.0))
    commit(tmp_path, 2, started_ns=0, cause="")
    newer, older = look(inventory.Inventory(LocalFolder(str(tmp_path))))
    assert (older.size_bytes, older.world_size, older.completed) == (4, 0, "1970-01-01T00:01:40.000Z")
    assert (newer.started, newer.cause) == ("", "Periodic")


def test_a_second_look_reads_nothing_that_it_knows(tmp_path: Path) -> None:
    """A manifest that is gone is not missed until the next minute, or until this sidecar has written the step anew."""
    of = inventory.Inventory(LocalFolder(str(tmp_path)))
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
    of = inventory.Inventory(LocalFolder(str(tmp_path)))
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
    of = inventory.Inventory(LocalFolder(str(tmp_path)))
    found = look(of)
    assert len(found) == len(of._known) == home.MAX_CHECKPOINTS
    assert (found[0].step, found[-1].step) == (home.MAX_CHECKPOINTS + 4, 5)


def test_a_root_that_is_not_there_yet_is_empty_and_one_that_is_none_is_an_error(tmp_path: Path) -> None:
    """The probe makes the root; a file in its place cannot be listed."""
    assert look(inventory.Inventory(LocalFolder(str(tmp_path / "new")))) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        inventory.Inventory(LocalFolder(str(tmp_path / "file"))).look(0.0, frozenset())


def test_pins_of_the_cluster_are_set_and_removed_and_shown_with_those_of_people(tmp_path: Path) -> None:
    """The next look has them; a step that is gone is passed over, and a pin of people stays."""
    for step in (1, 2):
        commit(tmp_path, step)
    root = LocalFolder(str(tmp_path))
    of = inventory.Inventory(root)
    assert [each.pinned_by for each in look(of)] == ["", ""]
    of.pin([1, 9], [])
    of.pin([1], [])
    assert pins.pinned(root) == {1: ("cluster",)}
    pins.pin(root, 1)
    assert [(each.step, each.pinned_by) for each in look(of, 100.0)] == [(2, ""), (1, "cluster,people")]
    of.pin([2], [1, 9])
    assert [(each.step, each.pinned_by) for each in look(of, 100.0)] == [(2, "cluster"), (1, "people")]
