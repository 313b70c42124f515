"""
CUDA tensors through the arena: registered memory, a side stream, and no value of a later step in an earlier snapshot.

Run where a GPU is lent (`pytest -m gpu`); elsewhere each test is skipped with the reason.
What the path calls is held without a GPU by `tests/unit/client/test_device_copies.py` and `test_prepared.py`; here is what they cannot say.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import pillion
from support import deadlines
from support.deadlines import Deadline, eventually

pytestmark = pytest.mark.gpu

SAVE = deadlines.Deadline.COMMITTED.s
POLICY = {"trigger": {"periodSteps": 1}}


def state(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "weight": torch.randn(1024, 1024, generator=generator).to(device),
        "half": torch.randn(333, generator=generator).to(torch.bfloat16).to(device),
        "transposed": torch.randn(64, 32, generator=generator).to(device).t(),
        "host": torch.randn(17, generator=generator),
    }


def test_a_cuda_state_dict_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    """What was on the device comes back to the device, from the arena, equal."""
    saved, loaded = state("cuda"), {k: torch.zeros_like(v) for k, v in state("cuda").items()}
    with pillion.Checkpointer(tmp_path, policy=POLICY) as checkpointer:
        assert checkpointer.load(loaded) is None
        checkpointer.save(saved, 1).result(SAVE)
        assert checkpointer.load(loaded) == 1
        assert checkpointer.last_load is not None
        assert checkpointer.last_load.tier == "arena"
    for name, tensor in saved.items():
        assert torch.equal(tensor, loaded[name]), name


def test_kernels_queued_after_a_save_do_not_reach_its_snapshot(tmp_path: Path) -> None:
    """The copy waits for what was queued before the save, and for nothing queued after it."""
    saved = state("cuda")
    with pillion.Checkpointer(tmp_path, policy=POLICY) as checkpointer:
        handles = []
        for step in range(1, 6):
            saved["weight"].fill_(step)
            handles.append(checkpointer.save(saved, step))
            saved["weight"].fill_(-step)
        for step, handle in enumerate(handles, start=1):
            handle.result(SAVE)
            found = {"weight": torch.zeros(1024, 1024)}
            dcp.load(found, checkpoint_id=str(tmp_path / f"step-{step}"))
            assert bool((found["weight"] == step).all())


def test_an_overlapped_save_on_cuda_holds_the_values_of_its_own_step(tmp_path: Path) -> None:
    """The optimizer's step waits for the copy, so the snapshot has the parameters from before it."""
    model = torch.nn.Linear(2048, 2048, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pillion.Checkpointer(tmp_path, policy=POLICY) as checkpointer:
        optimizer.step()  # without gradients: it only makes the optimizer known
        before = model.weight.detach().clone()
        handle = checkpointer.save({"model": model.state_dict()}, 1, overlap=True)
        model(torch.ones(8, 2048, device="cuda")).sum().backward()
        optimizer.step()
        handle.result(SAVE)
        found = {"model": {"weight": torch.zeros(2048, 2048), "bias": torch.zeros(2048)}}
        dcp.load(found, checkpoint_id=str(tmp_path / "step-1"))
    assert torch.equal(found["model"]["weight"], before.cpu())
    assert not torch.equal(model.weight.detach(), before)


def test_a_state_that_grows_behind_the_load_is_saved_into_registered_memory(tmp_path: Path) -> None:
    """The first save has the optimizer's state, for which nothing was prepared; then the sidecar dies, and its arena is another one."""
    model = {f"w{number}": torch.randn(512, 512, device="cuda") for number in range(4)}
    full = {**model, **{f"m{number}": torch.randn(1024, 1024, device="cuda") for number in range(8)}}
    with pillion.Checkpointer(tmp_path, policy=POLICY) as checkpointer:
        assert checkpointer.load(model) is None
        for step in (1, 2):
            checkpointer.save(full, step).result(SAVE)
        first = checkpointer._session.mapping
        for path in Path(checkpointer._session.runtime_dir).glob("segment-*"):
            path.unlink()
        os.kill(checkpointer._session.welcome.pid, signal.SIGKILL)
        eventually(lambda: checkpointer._session.mapping is not first, Deadline.SETTLE, "another arena")
        eventually(lambda: not checkpointer._session._connection.lost, Deadline.SETTLE, "another sidecar")
        checkpointer.save(full, 3).result(SAVE)
    os.kill(checkpointer._session.welcome.pid, signal.SIGTERM)  # one that came back lingers for trainers that may, too
    for step in (1, 2, 3):
        found = {name: torch.zeros(tensor.shape) for name, tensor in full.items()}
        dcp.load(found, checkpoint_id=str(tmp_path / f"step-{step}"))
        assert all(torch.equal(found[name], tensor.cpu()) for name, tensor in full.items())


def test_a_conjugated_tensor_is_saved_as_what_it_says(tmp_path: Path) -> None:
    """It is a flag over the memory of another tensor, which torch would apply beside the copy."""
    numbers = torch.randn(1 << 22, dtype=torch.complex64, device="cuda")
    with pillion.Checkpointer(tmp_path, policy=POLICY) as checkpointer:
        for step in (1, 2):
            checkpointer.save({"z": numbers.conj()}, step).result(SAVE)
    found = {"z": torch.zeros(1 << 22, dtype=torch.complex64)}
    dcp.load(found, checkpoint_id=str(tmp_path / "step-2"))
    assert torch.equal(found["z"], numbers.conj().resolve_conj().cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_state_on_two_devices_holds_what_both_had_to_do(tmp_path: Path) -> None:
    """Each has a stream and an event of its own; a kernel that is queued behind the save reaches neither snapshot."""
    saved = {f"on{index}": torch.zeros(1 << 24, device=f"cuda:{index}") for index in range(2)}
    with pillion.Checkpointer(tmp_path, policy=POLICY) as checkpointer:
        handles = []
        for step in range(1, 4):
            for tensor in saved.values():
                tensor.fill_(step)
            handles.append(checkpointer.save(saved, step))
            for tensor in saved.values():
                tensor.fill_(-step)
        for step, handle in enumerate(handles, start=1):
            handle.result(SAVE)
            found = {name: torch.zeros(1 << 24) for name in saved}
            dcp.load(found, checkpoint_id=str(tmp_path / f"step-{step}"))
            assert all(bool((tensor == step).all()) for tensor in found.values())
