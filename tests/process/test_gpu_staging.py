"""
CUDA tensors through the arena: registered memory, a side stream, and no value of a later step in an earlier snapshot.

Run where a GPU is lent (`pytest -m gpu`); elsewhere each test is skipped with the reason.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import pillion
from support import deadlines

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
