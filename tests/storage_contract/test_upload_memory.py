"""
Tests of how much memory bulk bytes take on their way between arena and bucket.

Called from: pytest.
"""

import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from pillion_sidecar.storage import object_client, object_requests, object_transfer
from pillion_sidecar.storage.stretches import Piece, Run
from storage_contract.buckets import open_bucket
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.operations import Only, Operation
from support.object_stores.places import Place

MIB: Final = 1 << 20
ARENA_BYTES: Final = 192 * MIB
MAX_EXTRA_BYTES: Final = 64 * MIB
"""Limit of anonymous memory beyond what was there: a third of the arena."""
LOOK_S: Final = 0.005


@pytest.fixture
def arena() -> Iterator[mmap.mmap]:
    """Memory as the arena's: a mapped file of a tmpfs, every page of it filled."""
    with tempfile.TemporaryFile(dir="/dev/shm", prefix="pillion-test-") as file:
        os.posix_fallocate(file.fileno(), 0, ARENA_BYTES)
        mapping = mmap.mmap(file.fileno(), ARENA_BYTES)
    for start in range(0, ARENA_BYTES, MIB):
        mapping[start : start + 8] = start.to_bytes(8, "little")
    yield mapping
    # A view that somebody kept would be an error here.
    mapping.close()


def anonymous_bytes() -> int:
    """Anonymous memory of this process: what is mapped from the tmpfs is not in it."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def extra_bytes(act: Callable[[], None]) -> int:
    """The most anonymous memory meanwhile, beyond what was there before."""
    done = threading.Event()
    base = anonymous_bytes()
    most = [base]

    def look() -> None:
        while not done.wait(LOOK_S):
            most.append(max(most.pop(), anonymous_bytes()))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        act()
    finally:
        done.set()
        looking.join()
    return most[0] - base


def test_an_upload_and_a_load_take_little_memory(
    s3_bucket: Place, arena: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes up lies in the arena alone, and what comes down goes into it by small chunks: the extra memory is far below the bytes."""
    step = open_bucket(s3_bucket, monkeypatch).below("step-1")
    half = ARENA_BYTES // 2
    files = {f"__0_{number}.1.distcp": [Run(number * half // 4, half // 4)] for number in range(4)}
    step.files()  # the client's own threads and pools
    assert extra_bytes(lambda: step.write(files, memoryview(arena), num_threads=1)) < MAX_EXTRA_BYTES

    def load() -> None:
        for number, name in enumerate(files):
            step.read_into(name, memoryview(arena), [Piece(0, half + number * half // 4, half // 4)])

    assert extra_bytes(load) < MAX_EXTRA_BYTES
    assert arena[half:] == arena[:half]


def test_an_object_too_large_for_one_request_goes_in_parts(
    s3_proxy: FaultProxy, arena: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is larger than the largest request goes in parts, is whole, and nothing else is sent."""
    size = 96 * MIB
    for module in (object_client, object_transfer):
        monkeypatch.setattr(module, "MAX_OBJECT_BYTES", 32 * MIB)
    for module in (object_requests, object_transfer):
        monkeypatch.setattr(module, "PART_BYTES", 16 * MIB)
    step = open_bucket(s3_proxy.place, monkeypatch, object_size_bytes=MIB).below("step-1")
    told: list[tuple[str, int]] = []

    runs = [Run(0, 50 * MIB), Run(64 * MIB, size - 50 * MIB)]
    step.write({"large": runs}, memoryview(arena), num_threads=1, on_progress=lambda *each: told.append(each))
    assert told[-1] == ("large", size)
    assert len(s3_proxy.seen(Only(operation=Operation.PUT_PART))) == 6
    assert step.read_piece("large", 0, 50 * MIB) == arena[: 50 * MIB]
    assert step.read_piece("large", 50 * MIB, size - 50 * MIB) == arena[64 * MIB : 64 * MIB + size - 50 * MIB]
