"""
The whole of: into how few calls of torch a copy goes (each call gives the interpreter away once, whatever it copies), and from
how many threads its parts may be asked for.

Called from: pytest.
Must never: measure a time, which means nothing on a loaded machine.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pillion import host_copies, leaves, staging
from pillion.wire import arena
from support.deadlines import Deadline

NUM_TENSORS = 5000
ROUNDS = 300


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    path = tmp_path / "segment"
    header = arena.SegmentHeader(num_slots=2, stride_bytes=16 * 1024**2)
    path.write_bytes(header.pack())
    os.truncate(path, header.segment_bytes)
    return path


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_thousands_of_tensors_are_copied_in_one_call_a_thread(segment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one call a tensor: beside a busy interpreter each would wait for its turn."""
    batches: list[int] = []
    copy_all = torch._foreach_copy_

    def counted(targets: list[torch.Tensor], sources: list[torch.Tensor], *rest: Any) -> Any:
        batches.append(len(targets))
        return copy_all(targets, sources, *rest)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    monkeypatch.setattr(host_copies, "copy_one", None)
    state = {f"layer.{number}": torch.full((64,), float(number)) for number in range(NUM_TENSORS)}
    mapping = staging.SegmentMapping(str(segment))
    with contextlib.closing(mapping):
        collected = leaves.Collector().collect(state)
        mapping.copy_in(0, collected)
        assert sum(batches) == NUM_TENSORS
        assert len(batches) <= 2
        views = mapping.views(0, collected.layout)
        assert [float(view[-1]) for view in views] == [float(tensor[0]) for tensor in collected.tensors]


@pytest.mark.usefixtures("two_threads")
def test_threads_that_save_and_prepare_at_once_get_the_tensors_of_their_own_layout(segment: Path) -> None:
    """After a load a thread prepares both slots while the trainer may save into one already, perhaps another state."""
    layouts = [
        leaves.Collector().collect({f"{name}.{number}": torch.zeros(count) for number in range(8)}).layout
        for name, count in (("weight", 3), ("bias", 5))
    ]
    mapping = staging.SegmentMapping(str(segment))
    failures: list[object] = []

    def make(slot: int, first: int) -> None:
        try:
            for number in range(ROUNDS):
                own = layouts[(first + number) % 2]
                mapping.warm(slot, own)
                if any(
                    view.shape != item.sizes for view, item in zip(mapping.views(slot, own), own.items, strict=True)
                ):
                    failures.append(own.digest)
        except Exception as err:  # a failed thread's error is what the test is about
            failures.append(err)

    threads = [threading.Thread(target=make, args=(number % 2, number // 2)) for number in range(4)]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with contextlib.closing(mapping):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(Deadline.SETTLE.s)
            copiers = [thread for thread in threading.enumerate() if thread.name.startswith("pillion-copy")]
            assert len(copiers) <= 2
    finally:
        sys.setswitchinterval(interval_s)
    assert failures == []
