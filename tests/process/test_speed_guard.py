"""
That a save and a load take about as long as their copies: a path that polls, waits or copies twice is noticed here, a slow machine is not.

Called from: pytest. `make bench` has the numbers and the goals; the limits here are twice the goals and more, and the best of several samples counts.
"""

import ctypes
import time
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from pillion import checkpointer
from process.ranks import Peer, Ranks
from support.deadlines import Deadline

NUM_TENSORS: Final = 32
TENSOR_BYTES: Final = 4 * 1024**2
SAMPLES: Final = 6
SAVE_LIMIT: Final = 3.0
"""Of the best save to the best copy of the same tensors, by one thread. The goal is 1.1, by as many threads as torch uses."""
OVERLAPPED_LIMIT: Final = 1.0
"""Of an overlapped save's call. The goal is 0.05; but on a busy machine its thread may not begin at once."""
LOAD_LIMIT: Final = 6.0
"""Of the best load from memory. It is a round trip of two processes and the copy; the goal for large states is 1.1."""


def state() -> dict[str, Any]:
    """128 MiB of tensors."""
    return {f"w{number}": torch.randn(TENSOR_BYTES // 4) for number in range(NUM_TENSORS)}


def copy_s(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> float:
    """Seconds to copy the tensors one after another."""
    begun = time.perf_counter()
    for target, source in zip(targets, sources, strict=True):
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    return time.perf_counter() - begun


@pytest.mark.parametrize("overlap", [False, True])
def test_a_save_holds_training_up_for_about_its_copy(ranks: Ranks, tmp_path: Path, overlap: bool) -> None:
    """With and without overlap; what an optimizer steps is copied beside the training."""

    def train(peer: Peer) -> tuple[float, float]:
        values = state()
        optimizer = torch.optim.SGD(list(values.values()), lr=0.0)
        targets = [torch.zeros_like(each) for each in values.values()]
        stalls, copies = [], []
        with checkpointer.Checkpointer(tmp_path) as opened:
            opened.load(values)
            optimizer.step()
            for step in range(1, SAMPLES + 1):
                copies.append(copy_s(targets, list(values.values())))
                handle = opened.save(values, step, overlap=overlap)
                stalls.append(handle.stall_s)
                handle.result(Deadline.COMMITTED.s)
        return min(stalls), min(copies)

    [(stall_s, floor_s)] = ranks.start(train).finish()
    assert stall_s / floor_s < (OVERLAPPED_LIMIT if overlap else SAVE_LIMIT), (stall_s, floor_s)


def test_a_load_from_memory_takes_about_its_copy(ranks: Ranks, tmp_path: Path) -> None:
    """The best of several, by a trainer that lives, so that each is verified."""

    def train(peer: Peer) -> tuple[float, float]:
        values = state()
        targets = [torch.zeros_like(each) for each in values.values()]
        loads, copies = [], []
        with checkpointer.Checkpointer(tmp_path) as opened:
            opened.save(values, 1).result(Deadline.COMMITTED.s)
            for _ in range(SAMPLES):
                copies.append(copy_s(targets, list(values.values())))
                opened.load(values)
                assert opened.last_load is not None
                assert opened.last_load.tier == "arena"
                loads.append(opened.last_load.elapsed_s)
        return min(loads), min(copies)

    [(load_s, floor_s)] = ranks.start(train).finish()
    assert load_s / floor_s < LOAD_LIMIT, (load_s, floor_s)
