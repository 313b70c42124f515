"""
The whole of: what the campaign's job trains, with all that a real trainer keeps: every number of it can be told without Pillion.

Called from: `campaign.job` (one object a rank), `campaign.runs` (compares).
Must never: know of Pillion, run a backward pass (its threads do not survive a fork), or draw from any random state but its own.

An optimizer whose state begins with its first step, a schedule, a scaler of the loss that now and then skips a step, an average of the
weights that is changed through `.data`, a random state and a position in the data for each rank, under names of their own, and a
history that grows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, Dataset

WORLD: Final = 2
STEPS: Final = 100
NUMEL: Final = 50_000
INFINITE_EACH: Final = 17
"""Every so many steps a gradient is infinite: the scaler skips the optimizer's step, and halves its scale."""
ROW_EACH: Final = 10
"""Steps between two rows of the history."""
STUCK_S: Final = 8.0
"""How long a worker is stuck: longer than a killed trainer's successor takes to come."""
STUCK_POLL_S: Final = 0.02
ENDED: Final = "ended"
"""The file that lets stuck workers go."""


class Items(Dataset[torch.Tensor]):
    """The data: an item for each step."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index * 7)


class Stuck(Dataset[torch.Tensor]):
    """Data that storage does not give: whoever asks waits, until the job has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        until = time.monotonic() + STUCK_S
        while time.monotonic() < until and not (self._folder / ENDED).exists():
            time.sleep(STUCK_POLL_S)
        os._exit(0)


def stuck(folder: Path) -> Iterator[torch.Tensor]:
    """A data loader whose one worker is stuck; it is kept, and asked for nothing."""
    return iter(DataLoader(Stuck(folder), batch_size=None, num_workers=1, multiprocessing_context="fork"))


class Position:
    """Where a rank is in its data; a `Stateful`, as data loaders are."""

    def __init__(self) -> None:
        self.step = 0

    def items(self) -> Iterator[torch.Tensor]:
        """The items from here on, made by a forked worker."""
        rest = range(self.step + 1, STEPS + 1)
        return iter(DataLoader(Items(), batch_size=None, sampler=rest, num_workers=1, multiprocessing_context="fork"))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


class Training:
    """One rank of the job."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.weights = torch.nn.Parameter(torch.arange(NUMEL, dtype=torch.float32) / NUMEL)
        self.average = self.weights.detach().clone()
        self.optimizer = torch.optim.SGD([self.weights], lr=0.01, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=2 * STEPS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=7)
        self.scaler.scale(torch.ones(()))
        self.random = torch.Generator().manual_seed(1000 + rank)
        self.position = Position()
        self.history: list[dict[str, float]] = []

    def gradient(self, item: torch.Tensor) -> torch.Tensor:
        """Of this rank's batch: elementwise, so that it is the same bit for bit wherever it is computed."""
        batch = ((torch.arange(NUMEL) * (self.rank + 2) + item) % 13).to(torch.float32)
        noise = torch.rand(NUMEL, generator=self.random)
        self.position.step += 1
        return self.weights.detach() - batch + 0.01 * noise

    def update(self, total: torch.Tensor) -> float:
        """One step with the sum of all ranks' gradients; the loss."""
        step = self.position.step
        loss = float((total * total).sum())
        self.weights.grad = total * self.scaler.get_scale()
        if step % INFINITE_EACH == 0:
            self.weights.grad[step] = float("inf")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.average.data.mul_(0.95).add_(self.weights.data, alpha=0.05)
        if step % ROW_EACH == 0:
            self.history.append({"step": float(step), "loss": loss})
        return loss

    def state_dict(self) -> dict[str, Any]:
        """All of it. What is a rank's own has a name of its own."""
        return {
            "model": {"weights": self.weights, "average": self.average},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            f"random{self.rank}": self.random.get_state(),
            f"position{self.rank}": self.position,
            "history": [dict(row) for row in self.history],
            "log": json.dumps(self.history),
            "step": self.position.step,
        }

    def template(self) -> dict[str, Any]:
        """What a load fills: the optimizer's state is not there before its first step, and the history is as long as it was."""
        state = self.state_dict()
        state["optimizer"]["state"] = {0: {"momentum_buffer": torch.zeros(NUMEL)}}
        del state["history"]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a load has filled; weights, average and position are filled in place."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.random.set_state(state[f"random{self.rank}"])
        self.history = json.loads(state["log"])
        assert state["step"] == self.position.step

    def mark(self) -> dict[str, torch.Tensor]:
        """A copy of all that a checkpoint of this step must hold, as tensors, by name."""
        momentum = self.optimizer.state[self.weights].get("momentum_buffer") if self.optimizer.state else None
        return {
            "model.weights": self.weights.detach().clone(),
            "model.average": self.average.clone(),
            "optimizer.state.0.momentum_buffer": torch.zeros(NUMEL) if momentum is None else momentum.clone(),
            f"random{self.rank}": self.random.get_state(),
            "scaler.scale": torch.tensor(self.scaler.get_scale()),
            "schedule.last_epoch": torch.tensor(self.schedule.last_epoch),
        }


def marks_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same of a state dict that stock DCP has loaded."""
    own = {name: value for name, value in state.items() if name.startswith("random")}
    return own | {
        "model.weights": state["model"]["weights"],
        "model.average": state["model"]["average"],
        "optimizer.state.0.momentum_buffer": state["optimizer"]["state"][0]["momentum_buffer"],
        "scaler.scale": torch.tensor(state["scaler"]["scale"]),
        "schedule.last_epoch": torch.tensor(state["schedule"]["last_epoch"]),
    }


def stock_template() -> dict[str, Any]:
    """What stock DCP is to load of a checkpoint, of all ranks."""
    state: dict[str, Any] = {f"random{rank}": torch.zeros_like(torch.Generator().get_state()) for rank in range(WORLD)}
    return state | {
        "model": {"weights": torch.zeros(NUMEL), "average": torch.zeros(NUMEL)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(NUMEL)}}},
        "scaler": {"scale": 0.0},
        "schedule": {"last_epoch": -1},
    }


def reference() -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Loss and marks after each step of a run that nothing interrupts, without Pillion; index 0 is the beginning."""
    ranks = [Training(rank) for rank in range(WORLD)]

    def marks() -> dict[str, torch.Tensor]:
        return {name: value for each in ranks for name, value in each.mark().items()}

    found = [(0.0, marks())]
    items = Items()
    for step in range(1, STEPS + 1):
        first, second = (each.gradient(items[step]) for each in ranks)
        losses = [each.update(first + second) for each in ranks]
        assert losses[0] == losses[1]
        found.append((losses[0], marks()))
    return found
