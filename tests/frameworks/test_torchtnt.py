"""
The whole of: a loop of TorchTNT with the callback that the guide shows.

Called from: pytest, in the environment that has TorchTNT.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.callback import Callback
from torchtnt.framework.train import train
from torchtnt.framework.unit import TrainUnit

from frameworks import interrupted, own_script
from pillion import checkpointer
from pillion.state import Whole, app_state
from process.ranks import Peer, Ranks

LR: Final = 0.01


class PillionCallback(Callback):  # type: ignore[misc] # the types are checked without TorchTNT
    """As the guide writes it."""

    def __init__(self, checkpointer: Any, state: Any) -> None:
        self.checkpointer, self.state = checkpointer, state

    def on_train_epoch_start(self, state: Any, unit: Any) -> None:
        self.state.rng.put_back()

    def on_train_step_start(self, state: Any, unit: Any) -> None:
        self.state.rng.put_back()

    def on_train_step_end(self, state: Any, unit: Any) -> None:
        step = unit.train_progress.num_steps_completed
        if self.checkpointer.due(step):
            self.checkpointer.save(self.state, step)


class Telling(Callback):  # type: ignore[misc] # as above
    """Tells each loss, and kills the process at a step, before the other callback saves it."""

    def __init__(self, told: interrupted.Told) -> None:
        self._told = told

    def on_train_step_end(self, state: Any, unit: Any) -> None:
        self._told.step({}, unit.train_progress.num_steps_completed, unit.loss)


class Plain(TrainUnit[torch.Tensor]):  # type: ignore[misc] # as above
    """A unit that steps by itself."""

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self.module = own_script.parallel(own_script.net_of(), peer)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LR)
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, gamma=0.5)
        self.loss = 0.0

    def train_step(self, state: Any, data: torch.Tensor) -> None:
        loss = self.module(data).square().mean()
        loss.backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.loss = loss.item()


class Automatic(AutoUnit[torch.Tensor]):  # type: ignore[misc] # as above
    """TorchTNT's own steps. It takes no batch ahead, as the guide says."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(
            module=own_script.net_of(), strategy="ddp" if peer.world_size > 1 else None, step_lr_interval="step"
        )
        self.loss = 0.0

    def configure_optimizers_and_lr_scheduler(self, module: torch.nn.Module) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=LR)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)

    def compute_loss(self, state: Any, data: torch.Tensor) -> Any:
        loss = self.module(data).square().mean()
        self.loss = loss.item()
        return loss, None

    def get_next_train_batch(self, state: Any, data_iter: Iterator[torch.Tensor]) -> Any:
        return self.move_data_to_device(state, next(data_iter), False)


def run(kind: Any, peer: Peer, folder: Path, root: Path | None, kill_at: int) -> Any:
    """A script of TorchTNT, with Pillion if there is a root."""
    unit, loader = kind(peer), own_script.loader_of(peer)
    callbacks: list[Any] = []
    opened = None
    if root is not None:
        opened = checkpointer.Checkpointer(root, policy=interrupted.POLICY)
        state = app_state(
            unit.module,
            unit.optimizer,
            schedulers=unit.lr_scheduler,
            dataloader=loader,
            progress=Whole(unit.train_progress),
        )
        state.load(opened)
        callbacks.append(PillionCallback(opened, state))
    told = interrupted.Told(peer, folder, None, kill_at)
    train(unit, loader, max_epochs=own_script.EPOCHS, callbacks=[Telling(told), *callbacks])
    told.end(unit.module.state_dict())
    if opened is None:
        return None
    opened.close()
    return None if opened.last_load is None else (opened.last_load.step, str(opened.last_load.tier))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", [Plain, Automatic])
def test_a_killed_loop_resumes_as_the_one_without_pillion_went_on(
    ranks: Ranks, tmp_path: Path, kind: Any, num_ranks: int
) -> None:
    """Losses and weights, bit for bit, from memory and from storage; with one process and with DDP; for a unit of one's own and an AutoUnit."""
    interrupted.assert_resumes(ranks, tmp_path, functools.partial(run, kind), num_ranks=num_ranks)


def test_a_run_that_was_killed_behind_the_last_batch_of_an_epoch_goes_on_in_the_next(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The generators come back before the next epoch's order is drawn."""
    interrupted.assert_resumes(ranks, tmp_path, functools.partial(run, Plain), killed_at=9)
