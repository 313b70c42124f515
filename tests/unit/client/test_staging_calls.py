"""
The whole of: into how few calls of torch a copy goes; each call gives the interpreter away once, whatever it copies.

Called from: pytest.
Must never: measure a time; on a loaded machine that says nothing.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pillion import leaves, staging
from pillion.wire import arena

NUM_TENSORS = 5000


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
    monkeypatch.setattr(staging, "_copy_one", None)
    state = {f"layer.{number}": torch.full((64,), float(number)) for number in range(NUM_TENSORS)}
    mapping = staging.SegmentMapping(str(segment))
    with contextlib.closing(mapping):
        of = leaves.Collector().collect(state)
        mapping.copy_in(0, of)
        assert sum(batches) == NUM_TENSORS
        assert len(batches) <= 2
        views = mapping.views(0, of.layout)
        assert [float(view[-1]) for view in views] == [float(tensor[0]) for tensor in of.tensors]
