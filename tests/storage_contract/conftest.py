"""
The folders that have to keep one contract: a directory, on file systems of several kinds under `--file-system`, and a prefix of a bucket of
each kind of store.

Called from: pytest.
Must never: let a test know which of them it has.
"""

from pathlib import Path
from typing import Final

import pytest

from pillion_sidecar.storage import object_client
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.storage.objects import ObjectFolder
from storage_contract.buckets import open_bucket
from support import on_file_systems
from support.object_stores.in_memory import InMemory

KINDS: Final = ("local", "s3", "gcs", "azure", "memory")
"""The last one is the bucket that the model of commits runs on: it may claim nothing that the servers do not do."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """
    A root of each kind; where the command line names file systems, a directory on each of them.
    """
    if "root" in metafunc.fixturenames:
        kinds = ("local",) if on_file_systems.asked_for(metafunc.config) else KINDS
        metafunc.parametrize("root", kinds, indirect=True)


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A root that holds nothing yet."""
    if request.param == "local":
        return LocalFolder(str(tmp_path))
    if request.param == "memory":
        client = InMemory({})
        for make in ("documents", "bulk"):
            monkeypatch.setattr(object_client, make, lambda *_: client)
        return ObjectFolder.open("s3://bucket/runs/one")
    return open_bucket(request.getfixturevalue(f"{request.param}_bucket"), monkeypatch).below("runs/one")


@pytest.fixture
def step(root: Folder) -> Folder:
    """The folder of a step in it, made as a save makes it."""
    folder = root.below("step-1")
    folder.make()
    return folder
