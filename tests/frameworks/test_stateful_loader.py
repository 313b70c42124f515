"""
The whole of: torchdata's StatefulDataLoader with workers: a run that is killed and resumes has had each sample once, in the same order.

Called from: pytest, in the environment that has torchdata.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from frameworks import interrupted, own_script
from frameworks.own_script import BATCHES, EPOCHS, Parts
from process.ranks import Peer, Ranks

WORKERS: Final = 2
BATCH_ROWS: Final = 4


class Numbered(own_script.Rows):
    """Each row with its number."""

    def __getitem__(self, index: int) -> Any:
        return index, super().__getitem__(index)


class Drawn(Numbered):
    """Rows that a worker changes by random numbers, and as its state that worker's generator."""

    def __getitem__(self, index: int) -> Any:
        number, row = super().__getitem__(index)
        return number, row + torch.rand(own_script.WIDTH)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["torch"])


class Stream(torch.utils.data.IterableDataset[Any]):
    """The same rows as a stream: each worker reads its part, and knows how far it is."""

    def __init__(self, num_rows: int, peer: Peer) -> None:
        self._rows, self._num_rows, self._peer, self._next = Numbered(num_rows), num_rows, peer, 0

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        readers = WORKERS * self._peer.world_size
        own = range(self._num_rows)[self._peer.rank * WORKERS + (worker.id if worker is not None else 0) :: readers]
        while self._next < len(own):
            self._next += 1
            yield self._rows[own[self._next - 1]]
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def loader_of(kind: str, peer: Peer) -> Any:
    num_rows = BATCH_ROWS * BATCHES * peer.world_size
    if kind != "stream":
        rows = Drawn(num_rows) if kind == "drawn" else Numbered(num_rows)
        return own_script.loader_of(peer, rows, num_workers=WORKERS)
    return StatefulDataLoader(Stream(num_rows, peer), batch_size=BATCH_ROWS, num_workers=WORKERS)


def make(kind: str, peer: Peer, folder: Path) -> Parts:
    model = own_script.parallel(own_script.net_of(), peer)

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        numbers, rows = batch
        with (folder / f"samples.{peer.rank}").open("a") as file:
            file.write(json.dumps(numbers.tolist()) + "\n")
        loss: torch.Tensor = model(rows).square().mean()
        return loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Parts(model=model, optimizer=optimizer, loader=loader_of(kind, peer), loss_of=loss_of)


def samples_of(folder: Path, rank: int) -> list[list[int]]:
    return [json.loads(line) for line in (folder / f"samples.{rank}").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "num_ranks", "killed_at"),
    [("map", 1, 8), ("map", 1, 9), ("map", 2, 8), ("drawn", 1, 8), ("stream", 1, 8), ("stream", 2, 8)],
)
def test_a_loader_with_workers_goes_on_behind_the_last_sample_of_the_save(
    ranks: Ranks, tmp_path: Path, kind: str, num_ranks: int, killed_at: int
) -> None:
    """Each epoch has each sample once; killed within one and resumed, from memory and from storage, a run has the same ones in the same batches."""
    script = functools.partial(own_script.run, functools.partial(make, kind))
    interrupted.assert_resumes(ranks, tmp_path, script, num_ranks=num_ranks, killed_at=killed_at)
    whole = [samples_of(tmp_path / "whole", rank) for rank in range(num_ranks)]
    for epoch in range(EPOCHS):
        of_epoch = slice(epoch * BATCHES, (epoch + 1) * BATCHES)
        assert sorted(number for each in whole for batch in each[of_epoch] for number in batch) == list(
            range(BATCH_ROWS * BATCHES * num_ranks)
        )
    for rank in range(num_ranks):
        assert samples_of(tmp_path / "first", rank) == whole[rank][:killed_at]
        assert samples_of(tmp_path / "arena", rank) == whole[rank][killed_at - 1 :]
        assert samples_of(tmp_path / "storage", rank) == whole[rank][(killed_at - 1) // 3 * 3 :]
