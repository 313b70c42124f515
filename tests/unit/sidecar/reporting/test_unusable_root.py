"""
The whole of: a root that cannot be opened at all is in the report, and no report is missed for it.

Called from: pytest. tests/process/test_calling_home.py has roots that open and cannot be read.
"""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pillion.wire.object_store import ObjectStore
from pillion_sidecar import settings
from pillion_sidecar.reporting import reporter
from pillion_sidecar.storage import opening
from pillion_sidecar.storage.folder import Folder


def test_a_bucket_without_an_account_is_told_as_the_state_of_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is missing in the pod reaches the policy's condition with its name, before a trainer has begun."""
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)

    def open_root(root: str) -> Folder:
        return opening.open_folder(root, ObjectStore())

    supervisor: Any = SimpleNamespace(
        settings=settings.Settings(runtime_dir="/nowhere", root="az://container/run", home_url="https://127.0.0.1:1"),
        sidecar_status=SimpleNamespace(listen=lambda call: None, commit=None),
        open_root=open_root,
    )
    reports = reporter.Reporter(supervisor)
    try:
        state = asyncio.run(reports._storage(1.0))
    finally:
        reports.close()
    assert not state.listed
    assert "AZURE_STORAGE_ACCOUNT_NAME" in state.problem
