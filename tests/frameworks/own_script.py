"""
The whole of: the script of the guide's "A script of your own", which each recipe changes by a few lines.

Called from: the tests of recipes, in their ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.parallel import DistributedDataParallel
from torchdata.stateful_dataloader import StatefulDataLoader

from frameworks import interrupted
from pillion import checkpointer
from pillion.state import app_state
from process.ranks import Peer

BATCHES: Final = 4
EPOCHS: Final = interrupted.STEPS // BATCHES
WIDTH: Final = 64
"""A square matrix of it has 4096 elements: from there on torchao's optimizers keep low bits."""


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """Rows that differ by their number."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


def net_of() -> torch.nn.Module:
    """Return the same new model on each rank."""
    generator = torch.get_rng_state()
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH),
        torch.nn.BatchNorm1d(WIDTH),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(WIDTH, WIDTH),
        torch.nn.Linear(WIDTH, 1),
    )
    torch.set_rng_state(generator)
    return net


def parallel(net: torch.nn.Module, peer: Peer) -> torch.nn.Module:
    """Return the model as a script wraps it."""
    return DistributedDataParallel(net) if peer.world_size > 1 else net


def loader_of(peer: Peer, rows: torch.utils.data.Dataset[Any] | None = None, **more: Any) -> Any:
    """Return a loader of BATCHES batches of four rows on each rank."""
    rows = Rows(4 * BATCHES * peer.world_size) if rows is None else rows
    if peer.world_size > 1:
        more["sampler"] = torch.utils.data.DistributedSampler(rows, peer.world_size, peer.rank)
    else:
        more["shuffle"] = True
    return StatefulDataLoader(rows, batch_size=4, **more)


@dataclass(kw_only=True)
class Parts:
    """What a recipe makes."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loader: Any
    more: dict[str, Any] = field(default_factory=dict)
    """What it gives to `app_state` by name."""
    stepped: Callable[[], object] = lambda: None
    """What it does behind each optimizer step."""
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor] = lambda model, batch: model(batch).square().mean()
    told: Callable[[], Mapping[str, torch.Tensor]] = dict
    """Tensors that are compared beside the weights at the end."""


def run(
    make: Callable[[Peer, Path], Parts], peer: Peer, folder: Path, root: Path | None, kill_at: int
) -> tuple[int | None, str | None]:
    """The script, with Pillion if there is a root. Without it, it calls nothing of Pillion."""
    parts = make(peer, folder)
    model, optimizer, loader = parts.model, parts.optimizer, parts.loader
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    state: Any = {"step": 0, "epoch": 0}
    opened = None
    if root is not None:
        opened = checkpointer.Checkpointer(root, policy=interrupted.POLICY)
        state = app_state(model, optimizer, schedulers=schedule, dataloader=loader, step=0, epoch=0, **parts.more)
        state.load(opened)
    told = interrupted.Told(peer, folder, opened, kill_at)
    while state["epoch"] < EPOCHS:
        if isinstance(loader.sampler, torch.utils.data.DistributedSampler):
            loader.sampler.set_epoch(state["epoch"])
        for batch in loader if opened is None else state.batches():
            loss = parts.loss_of(model, batch)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            parts.stepped()
            state["step"] += 1
            told.step(state, state["step"], loss.item())
        state["epoch"] += 1
    return told.end({**model.state_dict(), **parts.told()})
