"""
The whole of: a pod looks for the checkpoint that the coordinator has found.

Called from: pytest.
"""

import threading
from pathlib import Path

import pytest

from pillion.errors import LoadError
from pillion.wire import names
from pillion_sidecar.executor.load import restore
from pillion_sidecar.storage import reading
from pillion_sidecar.storage.local import LocalFolder


def test_a_pod_that_does_not_see_the_checkpoint_says_so_and_calls_it_not_corrupt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another storage is mounted there. One that is shown late by a network file system is waited for."""
    monkeypatch.setattr(reading, "RETRY_AFTER_S", (0.01,) * 3)
    with pytest.raises(LoadError, match=r"ranks \[2, 3\] it is not there: all pods of a job need one storage"):
        restore.await_checkpoint(LocalFolder(str(tmp_path)), [2, 3])
    monkeypatch.setattr(reading, "RETRY_AFTER_S", (0.05,) * 100)
    late = threading.Timer(0.02, (tmp_path / names.COMMIT_MARKER).touch)
    late.start()
    restore.await_checkpoint(LocalFolder(str(tmp_path)), [2, 3])
    late.join()
