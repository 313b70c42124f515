"""
The whole of: a script of Accelerate with Pillion that is killed and resumes is the script that was never interrupted; and the names of
Accelerate that `pillion.accelerate` reads.

Called from: pytest, in the environment that has Accelerate.
"""

import functools
import inspect
import os
import shutil
from pathlib import Path
from typing import Any, Final

import accelerate
import pytest
import torch
from accelerate import data_loader
from torch.distributed.tensor import DTensor

import pillion
from frameworks import cpu_fsdp, losses
from pillion import checkpointer
from pillion.accelerate import app_state
from process.ranks import Peer, Ranks
from support.deadlines import Deadline
from support.logs import heard

BATCHES: Final = 4
EPOCHS: Final = 3
POLICY: Final[dict[str, Any]] = {"trigger": {"periodSteps": 3, "snapshotSteps": 1, "onTermination": "Skip"}}


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), 1.0 + index)


def run(
    peer: Peer, folder: Path, root: Path | None, *, kill_at: int = -1, seedable: bool = True, shards: bool = False
) -> tuple[Any, ...]:
    """A user's script, with Pillion if there is a root. With `shards` it has FSDP2 rather than DDP."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    if shards:
        cpu_fsdp.allow()
    accelerator = accelerate.Accelerator(
        cpu=True,
        fsdp_plugin=cpu_fsdp.plugin() if shards else None,
        gradient_accumulation_steps=1,
        dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=seedable),
    )
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.1)
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    loader: Any = torch.utils.data.DataLoader(Rows(2 * BATCHES * peer.world_size), batch_size=2, shuffle=True)
    model, optimizer, schedule, loader = accelerator.prepare(net, optimizer, schedule, loader)
    state: Any = {"step": 0, "epoch": 0}
    opened, start = None, None
    if root is not None:
        opened = checkpointer.Checkpointer(root, policy=POLICY)
        state = app_state(accelerator, step=0, epoch=0)
        start = state.load(opened)
    while state["epoch"] < EPOCHS:
        for batch in loader if opened is None else state.batches(loader):
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            state["step"] += 1
            losses.note(folder, peer.rank, state["step"], loss.item())
            if state["step"] == kill_at:
                os._exit(7)
            if opened is not None and opened.due(state["step"]):
                opened.save(state, state["step"]).staged.result(Deadline.STAGED.s)
        state["epoch"] += 1
    assert shards == any(isinstance(each, DTensor) for each in model.parameters())
    losses.note_weights(folder, peer.rank, accelerator.unwrap_model(model).state_dict())
    if opened is None:
        return (None,)
    tier = None if opened.last_load is None else str(opened.last_load.tier)
    opened.close()
    return start, tier


@pytest.mark.parametrize(
    ("num_ranks", "killed_at", "seedable", "shards"),
    [
        (1, 7, True, False),
        (1, 9, False, False),
        (2, 7, True, False),
        (2, 9, False, False),
        (2, 7, True, True),
        (2, 9, False, True),
    ],
)
def test_a_killed_script_resumes_as_the_one_without_pillion_went_on(
    ranks: Ranks, tmp_path: Path, num_ranks: int, killed_at: int, seedable: bool, shards: bool
) -> None:
    """
    Losses and weights, bit for bit: from memory and from storage, within an epoch and behind its last batch, with both of its samplers; with
    one process, DDP, FSDP2.
    """
    root, whole, first = tmp_path / "runs", tmp_path / "whole", tmp_path / "first"
    script = functools.partial(run, seedable=seedable, shards=shards)
    ranks.start(lambda peer: script(peer, whole, None), num_ranks=num_ranks).finish(Deadline.SCRIPT)
    killed = ranks.start(lambda peer: script(peer, first, root, kill_at=killed_at), num_ranks=num_ranks)
    assert [killed[rank].wait(Deadline.SCRIPT) for rank in range(num_ranks)] == [7] * num_ranks
    stored = (killed_at - 1) // 3 * 3
    for tier, step in (("arena", killed_at - 1), ("storage", stored)):
        second = tmp_path / tier
        if tier == "storage":
            ranks.alone()
            for later in range(step + 1, EPOCHS * BATCHES + 1):
                shutil.rmtree(root / f"step-{later}", ignore_errors=True)
        job = ranks.start(lambda peer, folder=second: script(peer, folder, root), num_ranks=num_ranks, attempt=1)  # type: ignore[misc] # a default
        assert job.finish(Deadline.SCRIPT) == [(step, tier)] * num_ranks
        losses.assert_equal(whole, first, second, ranks=num_ranks, killed_at=killed_at, resumed_from=step)


def test_what_the_state_cannot_hold_is_refused_and_a_loop_that_is_not_counted_is_named(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Before `prepare`; a loader of another kind; an optimizer of no model; a name that is taken; and a loop over the loader itself."""

    def refused(peer: Peer) -> list[str]:
        accelerator = accelerate.Accelerator(cpu=True)
        told = []

        def tell(call: Any) -> None:
            with pytest.raises(pillion.UsageError) as caught:
                call()
            told.append(str(caught.value))

        tell(lambda: app_state(accelerator))
        net = torch.nn.Linear(4, 4)
        net, loader = accelerator.prepare(net, torch.utils.data.DataLoader(Rows(4)))
        tell(lambda: app_state(accelerator, rng=1))
        state = app_state(accelerator)
        tell(lambda: next(state.batches([1])))
        with heard() as lines, checkpointer.Checkpointer(tmp_path / "runs") as opened:
            for step, _ in enumerate(loader, 1):
                opened.save(state, step).result(Deadline.COMMITTED.s)
        assert len([line for line in lines if "state.batches(loader)" in line]) == 1
        accelerator.prepare(torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()))
        tell(lambda: app_state(accelerator))
        return told

    told = ranks.start(refused).finish(Deadline.SCRIPT)[0]
    for text, expected in zip(
        told, ("accelerator.prepare", "['rng']", "accelerator.prepare", "no single"), strict=True
    ):
        assert expected in text


def test_a_save_between_two_updates_is_warned_of_once_and_an_evaluation_is_not(ranks: Ranks, tmp_path: Path) -> None:
    """What was summed of the gradients is in no checkpoint. An evaluation iterates over its loader, and no resume needs that position."""

    def told(peer: Peer) -> list[str]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        net: Any = torch.nn.Linear(4, 4)
        optimizer: Any = torch.optim.AdamW(net.parameters())
        loaders = [torch.utils.data.DataLoader(Rows(8), batch_size=2) for _ in range(2)]
        net, optimizer, loader, held_out = accelerator.prepare(net, optimizer, *loaders)
        state = app_state(accelerator, step=0)
        found = []
        with heard() as lines, checkpointer.Checkpointer(tmp_path / "runs") as opened:
            for step, batch in enumerate(state.batches(loader), 1):
                with accelerator.accumulate(net):
                    accelerator.backward(net(batch).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
                if step % 2 == 0:
                    assert accelerator.sync_gradients
                    assert len(list(held_out)) == 4
                    opened.save(state, step).result(Deadline.COMMITTED.s)
            found.append(len(lines))
            for step, batch in enumerate(state.batches(loader), 5):
                with accelerator.accumulate(net):
                    accelerator.backward(net(batch).square().mean())
                opened.save(state, step).result(Deadline.COMMITTED.s)
        return [*map(str, found), *[line for line in lines if "position" in line or "between two updates" in line]]

    [[before, *lines]] = ranks.start(told).finish(Deadline.SCRIPT)
    assert before == "0"
    assert [line.split(":")[1] for line in lines] == [" saved between two updates of the weights"]


def test_accelerate_has_the_names_that_are_read(ranks: Ranks) -> None:
    """What `prepare` and `register_for_checkpointing` collect, and what a loader knows of its epoch."""

    def missing(peer: Peer) -> list[str]:
        accelerator = accelerate.Accelerator(cpu=True)
        net: Any = torch.nn.Linear(4, 4)
        optimizer: Any = torch.optim.AdamW(net.parameters())
        loader: Any = torch.utils.data.DataLoader(Rows(4), shuffle=True)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        net, optimizer, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)
        kept: Any = torch.optim.swa_utils.AveragedModel(net)
        accelerator.register_for_checkpointing(kept)
        found = (accelerator._models, accelerator._optimizers, accelerator._dataloaders, accelerator._schedulers)
        assert found == ([net], [optimizer], [loader], [schedule])
        assert accelerator._custom_objects == [kept]
        assert isinstance(optimizer.optimizer, torch.optim.AdamW)
        names = ("iteration", "set_epoch", "gradient_state", "synchronized_generator", "use_stateful_dataloader")
        return [
            *[name for name in names if not hasattr(loader, name)],
            *[name for name in ("scaler", "distributed_type", "state") if not hasattr(accelerator, name)],
            *[name for name in ("active_dataloader", "sync_gradients") if not hasattr(loader.gradient_state, name)],
        ]

    assert ranks.start(missing).finish(Deadline.SCRIPT) == [[]]
    assert tuple(inspect.signature(accelerate.Accelerator.skip_first_batches).parameters) == (
        "self",
        "dataloader",
        "num_batches",
    )
    assert inspect.isgeneratorfunction(data_loader.DataLoaderShard.__iter__)
    assert {"DEEPSPEED", "MEGATRON_LM", "FSDP"} <= set(accelerate.utils.DistributedType.__members__)
