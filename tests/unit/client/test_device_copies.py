"""
The whole of: how the staging path calls CUDA, on a machine without a GPU: which memory is registered when, which copies are cut where,
what each device's copies wait for, and on which device our threads are.

Called from: pytest. `support.cuda` knows the rules.
Must never: say that the path works on a GPU; `tests/process/test_gpu_staging.py` does, where there is one.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pillion import devices, leaves, preparing, registration, staging
from pillion.errors import SidecarUnavailable
from pillion.wire import arena, layout
from support import cuda as cuda_module
from support.deadlines import Deadline, eventually

MIB = 1024**2
STRIDE_BYTES = 8 * MIB


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda_module.Cuda]:
    with cuda_module.installed(monkeypatch) as installed:
        yield installed


@pytest.fixture
def mapping(tmp_path: Path) -> Iterator[staging.SegmentMapping]:
    path = tmp_path / "segment"
    header = arena.SegmentHeader(num_slots=2, stride_bytes=STRIDE_BYTES)
    path.write_bytes(header.pack())
    os.truncate(path, header.segment_bytes)
    with contextlib.closing(staging.SegmentMapping(str(path))) as made:
        yield made


def on_device(cuda: cuda_module.Cuda, state: dict[str, torch.Tensor], **where: int) -> leaves.Leaves:
    """The leaves of a state whose tensors are on device 3, or on the device in `where`."""
    collected = leaves.Collector().collect(state)
    names = [item.fqn for item in collected.layout.items]
    moved = [cuda.tensor(tensor, where.get(fqn, 3)) for fqn, tensor in zip(names, collected.tensors, strict=True)]
    return leaves.Leaves(collected.layout, moved, [])


def floats(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)


STATES = {
    "of each kind": {
        "float": floats(20_000),
        "transposed": floats(30_000).view(100, 300).t(),
        "half": floats(5000).to(torch.bfloat16),
        "flags": floats(9000) > 100,
        "complex": torch.complex(floats(4000), -floats(4000)),
        "conjugated": torch.complex(floats(4000), floats(4000)).conj(),
        "number": torch.tensor(7),
        "empty": torch.empty(0, 3),
    },
    "of one tensor": {"weight": floats(300_000)},
}


def test_a_copy_is_cut_where_registered_memory_begins_or_ends() -> None:
    """Within an item only: what lies on one side of every edge is copied as a whole."""
    items = tuple(layout.Item(fqn, "float32", (1024,), (0,), (1024,)) for fqn in "abc")
    made = layout.Layout(items, (), {})
    first, second, _ = made.payload_starts
    edges = [first, first + 4096, second - 1, second + 64, second + 4032]
    assert registration.cuts(made, edges) == {1: (64, 4032)}


@pytest.mark.parametrize("state", STATES)
def test_registered_pieces_are_smaller_than_what_is_copied(
    cuda: cuda_module.Cuda, mapping: staging.SegmentMapping, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """No copy lies in two of them, on the way there and back, whatever dtype or order a tensor has."""
    monkeypatch.setattr(registration, "PIECE_BYTES", 4 * arena.PAGE_BYTES)
    saved = on_device(cuda, STATES[state])
    mapping.copy_in(0, saved, capacity_bytes=2 * MIB)
    views = mapping.views(0, saved.layout)
    assert all(torch.equal(view, tensor) for view, tensor in zip(views, STATES[state].values(), strict=True))
    assert sum(cuda.registered.values()) == 2 * MIB
    targets = on_device(cuda, {name: torch.zeros_like(tensor) for name, tensor in STATES[state].items()})
    mapping.copy_out(0, leaves.Leaves(saved.layout, targets.tensors, []), 0, len(targets.tensors))
    for target, tensor in zip(targets.tensors, STATES[state].values(), strict=True):
        assert torch.equal(cuda.values(target), tensor)
    assert cuda.problems == []


def test_a_slot_that_has_grown_is_registered_before_it_is_copied_into(
    cuda: cuda_module.Cuda, mapping: staging.SegmentMapping
) -> None:
    """Prepared for a state without its optimizer; the first save has that as well."""
    small, large = on_device(cuda, {"w": floats(1000)}), on_device(cuda, {"w": floats(1000), "m": floats(400_000)})
    mapping.populate(0, 64 * 1024, devices.used_by(small.tensors))
    mapping.copy_in(0, large, capacity_bytes=2 * MIB)
    start = mapping._bytes.data_ptr() + mapping.header.slot_offset(0)
    assert cuda.registered == {start: 64 * 1024, start + 64 * 1024: 2 * MIB - 64 * 1024}
    assert torch.equal(mapping.views(0, large.layout)[1], floats(400_000))
    assert cuda.problems == []


def test_memory_that_cuda_refuses_is_copied_to_all_the_same(
    cuda: cuda_module.Cuda, mapping: staging.SegmentMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a slot registered is no failed save, and the error of the driver is not left with the trainer's thread."""
    monkeypatch.setattr(registration, "PIECE_BYTES", 64 * 1024)
    cuda.lockable_bytes = 256 * 1024
    state = on_device(cuda, STATES["of one tensor"])
    for _ in range(2):
        mapping.copy_in(0, state, capacity_bytes=2 * MIB)
        assert torch.equal(mapping.views(0, state.layout)[0], floats(300_000))
    assert sum(cuda.registered.values()) == 256 * 1024
    assert list(cuda.errors) == ["pillion-register"]
    assert cuda.problems == []


def test_each_device_is_waited_for(cuda: cuda_module.Cuda, mapping: staging.SegmentMapping) -> None:
    """A state on two devices holds what both had to do before the save, and nothing of behind it."""
    state = on_device(cuda, {"w": torch.zeros(5000), "v": torch.zeros(5000)}, w=1, v=3)
    w, v = state.tensors
    cuda.launch(1, lambda: w.fill_(1.0))
    cuda.launch(3, lambda: v.fill_(1.0))
    mapping.populate(0, MIB, devices.used_by(state.tensors))
    mapping.copy_in(0, state, capacity_bytes=MIB)
    cuda.launch(1, lambda: w.fill_(2.0))
    cuda.launch(3, lambda: v.fill_(2.0))
    assert [float(view.sum()) for view in mapping.views(0, state.layout)] == [5000.0, 5000.0]
    assert cuda._copying == []
    assert cuda.problems == []


def test_a_later_copy_holds_what_the_devices_had_to_do_before_it_was_marked(
    cuda: cuda_module.Cuda, mapping: staging.SegmentMapping
) -> None:
    """An overlapped save copies beside the next pass, on each device from its own mark on."""
    state = on_device(cuda, {"w": torch.zeros(5000), "v": torch.zeros(5000)}, w=1, v=3)
    w, v = state.tensors
    cuda.launch(1, lambda: w.fill_(1.0))
    cuda.launch(3, lambda: v.fill_(1.0))
    ready = devices.marks(devices.used_by(state.tensors))
    cuda.launch(1, lambda: pytest.fail("the copy waited for the next pass"))
    mapping.populate(0, MIB, devices.used_by(state.tensors))
    mapping.copy_in(0, state, ready=ready, capacity_bytes=MIB)
    assert [float(view.sum()) for view in mapping.views(0, state.layout)] == [5000.0, 5000.0]


def test_a_mapping_that_is_replaced_is_unregistered_when_the_last_copy_is_done(
    cuda: cuda_module.Cuda, mapping: staging.SegmentMapping
) -> None:
    """Otherwise the driver would use the next mapping at that address. A later caller is refused, and gets no unmapped memory."""
    state = on_device(cuda, {"w": floats(5000)})
    mapping.populate(0, MIB, devices.used_by(state.tensors))
    gate = threading.Event()
    cuda.launch(3, lambda: gate.wait(Deadline.REPLY.s))
    copying = threading.Thread(target=lambda: mapping.copy_in(0, state, capacity_bytes=MIB))
    copying.start()
    eventually(lambda: cuda._copying, Deadline.REPLY, "the copy is queued")
    mapping.close()
    assert cuda.registered
    with pytest.raises(SidecarUnavailable, match="replaced"):
        mapping.copy_in(0, state)
    gate.set()
    copying.join(Deadline.REPLY.s)
    assert cuda.registered == {}
    assert cuda.problems == []


class Ready:
    """A session whose slots are large enough."""

    def __init__(self, mapping: staging.SegmentMapping) -> None:
        self.mapping = mapping

    def reserve(self, room_bytes: int) -> list[int]:
        return [room_bytes, room_bytes]


def test_no_thread_makes_a_context_on_a_device_that_the_state_is_not_on(
    cuda: cuda_module.Cuda, mapping: staging.SegmentMapping
) -> None:
    """New threads are on device 0: each rank of a node would take 500 MiB there."""
    cuda.set_device(3)
    state = on_device(cuda, {"w": floats(5000)})
    ahead = preparing.Preparer(Ready(mapping))  # type: ignore[arg-type] # all that it asks of a session
    ahead.begin(preparing.Need(MIB, state.layout, devices.used_by(state.tensors)))
    ahead.join(Deadline.REPLY.s)
    assert sum(cuda.registered.values()) == 2 * MIB

    def stage() -> None:
        devices.use(devices.used_by(state.tensors))
        mapping.copy_in(1, state, ready=devices.marks(devices.used_by(state.tensors)), capacity_bytes=2 * MIB)

    staged = threading.Thread(target=stage)
    staged.start()
    staged.join(Deadline.REPLY.s)
    closing = threading.Thread(target=mapping.close)
    closing.start()
    closing.join(Deadline.REPLY.s)
    assert cuda.registered == {}
    assert cuda.contexts == {3}
    assert cuda.problems == []


def test_a_state_on_the_host_registers_nothing(cuda: cuda_module.Cuda, mapping: staging.SegmentMapping) -> None:
    """Page-locked memory that no device copies to is taken from the node for nothing."""
    state = leaves.Collector().collect({"w": floats(5000)})
    mapping.populate(0, MIB, devices.used_by(state.tensors))
    mapping.copy_in(0, state, capacity_bytes=MIB)
    assert (cuda.registered, cuda.contexts) == ({}, set())
