"""
Tests of a process that is killed in the middle of an upload, and its successor.

Called from: pytest.
"""

from pathlib import Path
from typing import Final

import pytest

from pillion_sidecar.storage.stretches import Run
from storage_contract.buckets import open_bucket
from support import deadlines
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.faults import Fault
from support.object_stores.operations import Only, Operation
from support.processes import Processes

OBJECTS: Final = 6
OBJECT_BYTES: Final = 1 << 20
CONTENT: Final = bytes(range(256)) * (OBJECTS * OBJECT_BYTES // 256)
FILES: Final = {f"__0_{number}.1.distcp": [Run(number * OBJECT_BYTES, OBJECT_BYTES)] for number in range(OBJECTS)}

UPLOAD: Final = """
import sys
from pillion.wire.object_store import ObjectStore
from pillion_sidecar.storage.objects import ObjectFolder
from storage_contract.test_upload_killed import CONTENT, FILES
url, endpoint = sys.argv[1:]
ObjectFolder.open(url, ObjectStore(endpoint=endpoint)).write(FILES, memoryview(CONTENT), num_threads=1)
"""


def test_a_killed_upload_leaves_whole_objects_and_is_gone_on_with(
    proxy: FaultProxy, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there after a SIGKILL is whole, nothing of what was on its way is; the successor sends only what is not there."""
    step = open_bucket(proxy.place, monkeypatch).below("step-1")
    stalled = proxy.arm(Fault.STALL_UPLOAD, Only(operation=Operation.PUT, key="__0_[345]"), times=None)
    upload = processes.python(
        "-c", UPLOAD, str(step), proxy.place.endpoint, env={"PYTHONPATH": str(Path(__file__).parents[1])}
    )
    deadlines.eventually(
        lambda: len(stalled.struck) > 0 and len(step.files()) == 3, deadlines.Deadline.PROCESS_START, "half is there"
    )
    upload.popen.kill()
    upload.wait(deadlines.Deadline.PROCESS_EXIT)
    proxy.disarm()
    proxy.release()
    there = step.files()
    assert there.keys() == set(list(FILES)[:3])
    assert {entry.length for entry in there.values()} == {OBJECT_BYTES}
    proxy.forget()
    step.write(FILES, memoryview(CONTENT), num_threads=1)
    sent = [each.key.rpartition("/")[2] for each in proxy.seen(Only(operation=Operation.PUT))]
    assert sorted(sent) == list(FILES)[3:]
    assert all(step.read(name) == CONTENT[runs[0].slot_offset :][:OBJECT_BYTES] for name, runs in FILES.items())
