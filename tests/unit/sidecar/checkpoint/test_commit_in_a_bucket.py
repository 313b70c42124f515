"""
What a commit costs in a bucket, where each request is a round trip.

Called from: pytest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from pillion.errors import CommitError
from pillion.wire import names
from pillion_sidecar.checkpoint import catalog, commit
from pillion_sidecar.storage import object_client
from pillion_sidecar.storage.objects import ObjectFolder
from support.deadlines import Deadline
from support.object_stores.in_memory import InMemory
from support.parts import write_part

AT_ONCE: Final = 3
"""Requests of the first round trip: the listing of the sessions, the listing of the step, and the put of the manifest."""


def test_the_commit_of_a_new_step_takes_two_round_trips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The first three requests wait for each other, so that they are under way at once; the put of the marker is the fourth and last. The look
    shows every pod's files and that no newer session has begun; the folder of a new step has no document, which is not asked twice.
    """
    requests: list[str] = []
    together = threading.Barrier(AT_ONCE)
    is_counting = False

    def counted(act: Callable[[], Any], conditional: bool) -> Any:
        if not is_counting:
            return act()
        requests.append("conditional put" if conditional else "other")
        if len(requests) <= AT_ONCE:
            together.wait(Deadline.REPLY.s)
        return act()

    client = InMemory({}, counted)
    for make in ("documents", "bulk"):
        monkeypatch.setattr(object_client, make, lambda *_: client)
    root = ObjectFolder.open("s3://bucket/run")
    folder = catalog.step_folder(root, 5)
    write_part(tmp_path, 0, world_size=1)
    for path in tmp_path.iterdir():
        folder.put(path.name, path.read_bytes())
    # What the executor of the coordinator has from its peers: made here by a commit in another bucket's folder.
    elsewhere = catalog.step_folder(ObjectFolder.open("s3://bucket/other"), 5)
    for path in tmp_path.iterdir():
        elsewhere.put(path.name, path.read_bytes())
    made = commit.finish(elsewhere)
    assert made is not None
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    marker = elsewhere.read(names.COMMIT_MARKER)
    is_counting = True
    commit.publish(folder, made, marker, files, is_new=True, fence=lambda: commit.fence(root, 1))
    assert sorted(requests[:AT_ONCE]) == ["conditional put", "other", "other"]
    assert requests[AT_ONCE:] == ["conditional put"]
    is_counting = False
    assert catalog.read(folder, 5).chunks.keys() == {"w"}


def test_a_newer_session_refuses_a_commit_whose_manifest_was_put_beside_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No marker is there; the newer session commits the step over what is left."""
    client = InMemory({})
    for make in ("documents", "bulk"):
        monkeypatch.setattr(object_client, make, lambda *_: client)
    root = ObjectFolder.open("s3://bucket/run")
    folder = catalog.step_folder(root, 5)
    write_part(tmp_path, 0, world_size=1)
    for path in tmp_path.iterdir():
        folder.put(path.name, path.read_bytes())
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    elsewhere = catalog.step_folder(ObjectFolder.open("s3://bucket/other"), 5)
    for path in tmp_path.iterdir():
        elsewhere.put(path.name, path.read_bytes())
    made = commit.finish(elsewhere)
    assert made is not None
    marker = elsewhere.read(names.COMMIT_MARKER)
    commit.generations_folder(root).put("2", b"")
    with pytest.raises(CommitError, match="fenced off"):
        commit.publish(folder, made, marker, files, is_new=True, fence=lambda: commit.fence(root, 1))
    assert not commit.is_committed(folder)
    assert catalog.finish_interrupted(root) == [5]
