"""
The whole of: the arena ahead of a save: every slot is large enough, and on a GPU registered, before the save after the first one; and what
was registered of an arena that is replaced is given back.

Called from: pytest. The GPU is `support.cuda`: the rules of one.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as stock

import pillion
import pillion.dcp
from pillion import dcp_sessions, session, staging
from support import cuda as cuda_module
from support.deadlines import Deadline, eventually

POLICY = {"drain": {"timeoutSeconds": 5}}
DEVICE = 3


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda_module.Cuda]:
    with cuda_module.installed(monkeypatch) as installed:
        installed.set_device(DEVICE)  # as a trainer of local rank 3 does
        yield installed


def within(cuda: cuda_module.Cuda, mapping: staging.SegmentMapping) -> list[int]:
    """How many bytes of each slot are registered, of a mapping that has all of them."""
    first = mapping._bytes.data_ptr()
    found = [0] * mapping.header.num_slots
    for address, length in cuda.registered.items():
        found[(address - first - mapping.header.slot_offset(0)) // mapping.header.stride_bytes] += length
    return found


def mapped(of: session.Session) -> staging.SegmentMapping:
    assert of.mapping is not None
    return of.mapping


def test_every_save_of_a_growing_state_lies_in_registered_memory_of_its_own_arena(
    cuda: cuda_module.Cuda, tmp_path: Path
) -> None:
    """Loaded without an optimizer, saved with one, and saved again in the arena of a sidecar that could not adopt the first."""
    weight, average = torch.arange(50_000.0), torch.arange(400_000.0)
    state = {"w": cuda.tensor(weight, DEVICE)}
    with pillion.Checkpointer(tmp_path, policy=POLICY) as opened:
        assert opened.load(state) is None
        grown = {**state, "average": cuda.tensor(average, DEVICE)}
        opened.save(grown, 1).result(Deadline.COMMITTED.s)
        opened._saver.join(Deadline.SETTLE.s)
        first = mapped(opened._session)
        assert min(within(cuda, first)) > average.nbytes
        for path in Path(opened._session.runtime_dir).glob("segment-*"):
            path.unlink()
        os.kill(opened._session.welcome.pid, signal.SIGKILL)
        eventually(lambda: mapped(opened._session) is not first, Deadline.SETTLE, "another arena")
        eventually(lambda: not opened._session._connection.lost, Deadline.SETTLE, "another sidecar")
        opened.save(grown, 2, overlap=True).result(Deadline.COMMITTED.s)
        opened._saver.join(Deadline.SETTLE.s)
        assert max(within(cuda, mapped(opened._session))) > average.nbytes
    os.kill(opened._session.welcome.pid, signal.SIGTERM)  # one that came back lingers for trainers that may, too
    assert cuda.registered == {}
    assert cuda.contexts == {DEVICE}
    assert cuda.problems == []
    for step in (1, 2):
        found = {"w": torch.zeros_like(weight), "average": torch.zeros_like(average)}
        stock.load(found, checkpoint_id=str(tmp_path / f"step-{step}"))
        assert torch.equal(found["w"], weight)
        assert torch.equal(found["average"], average)


def test_the_first_save_of_stock_calls_prepares_for_the_next(cuda: cuda_module.Cuda, tmp_path: Path) -> None:
    """No load comes before them, which would say how large the state is."""
    state = {"w": cuda.tensor(torch.arange(300_000.0), DEVICE)}
    try:
        pillion.dcp.async_save(state, checkpoint_id=tmp_path / "1").result(Deadline.COMMITTED.s)
        (saves,) = dcp_sessions._open.values()
        saves._saver.join(Deadline.SETTLE.s)
        mapping = mapped(saves._session)
        assert min(within(cuda, mapping)) > 300_000 * 4
        assert set(mapping._populated) == {0, 1}
    finally:
        pillion.dcp.close(Deadline.SETTLE.s)
    assert (cuda.registered, cuda.contexts, cuda.problems) == ({}, {DEVICE}, [])
