"""
Tests of folders that one process opens by path or URL.

Called from: pytest.
"""

from pathlib import Path
from typing import Any

import pytest

from pillion_sidecar.storage import object_client
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.storage.opening import Opener
from support.object_stores.in_memory import InMemory


def test_folders_of_one_bucket_share_their_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients for each bucket, of which the second has a store of its own; a directory needs none."""
    made: list[Any] = []

    def make(place: object_client.Place, *_: object) -> InMemory:
        made.append(str(place))
        return stores[str(place)]

    stores = {f"s3://{name}": InMemory({}) for name in ("one", "two")}
    monkeypatch.setattr(object_client, "documents", make)
    monkeypatch.setattr(object_client, "bulk", make)
    opener = Opener()
    root = opener.open("s3://one/team/run")
    root.put("a", b"1")
    for _ in range(3):
        assert opener.open("s3://one/team").below("run").read("a") == b"1"
    assert opener.open("s3://one").below("team/run").read("a") == b"1"
    assert made == ["s3://one"] * 2
    assert opener.open("s3://two/team/run").files() == {}
    assert made == ["s3://one"] * 2 + ["s3://two"] * 2
    assert str(opener.open("s3://one/team/run")) == str(root) == "s3://one/team/run"
    assert opener.open(str(tmp_path)) == LocalFolder(str(tmp_path))
