"""
The whole of: a training under torchrun that is sharded by FSDP2, and goes on bit for bit after a crash:

    torchrun --nproc-per-node=2 examples/fsdp2.py --die-at 7     # rank 1 kills itself at step 7
    torchrun --nproc-per-node=2 examples/fsdp2.py                # goes on at step 7, and ends at step 12

It needs a torch that is newer than 2.6 where there is no GPU.

Must never: do more for its checkpoints than the lines marked with "Pillion" show; they are what a user has to write.
"""

import argparse
import hashlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DistributedSampler

import pillion
from pillion.state import app_state

WIDTH = 32
BATCH = 4
STEPS_PER_EPOCH = 4
EPOCHS = 3
POLICY = {"trigger": {"periodSteps": 4, "snapshotSteps": 2}, "retention": {"keepLast": 2}}


class Batches:
    """
    A loader of one's own: the rows of a tensor, and how far it is. It stands here for torchdata's `StatefulDataLoader`.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.sampler: DistributedSampler[torch.Tensor] = DistributedSampler(rows)  # type: ignore[arg-type] # it asks for a length alone
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = list(self.sampler)
        while self.at < len(order):
            batch = self.rows[order[self.at : self.at + BATCH]]
            self.at += BATCH
            yield batch
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def main() -> None:
    """
    One attempt of one rank.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default="checkpoints/fsdp2", help="directory of the checkpoints, or URL of a bucket")
    parser.add_argument("--die-at", type=int, default=0, help="step at which rank 1 kills itself in its first attempt")
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(args.root, args.die_at)
    distributed.destroy_process_group()


def train(root: str, die_at: int = 0) -> str:
    """
    Trains up to the last step, from wherever the run is. Gives a digest of the weights.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)  # the same weights and rows on every rank
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1)) for _ in range(3)))
    rows = torch.randn(BATCH * STEPS_PER_EPOCH * world_size, WIDTH)
    torch.manual_seed(1 + rank)  # another dropout on every rank
    model.to(device)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, STEPS_PER_EPOCH, gamma=0.5)
    loader = Batches(rows)

    # Pillion: after fully_shard and the optimizer, whose sharded tensors it saves.
    state = app_state(model, optimizer, schedulers=schedule, dataloader=loader, step=0, epoch=0)
    with pillion.Checkpointer(root, policy=POLICY) as checkpointer:  # Pillion
        state.load(checkpointer)  # Pillion
        while state["epoch"] < EPOCHS:
            loader.sampler.set_epoch(state["epoch"])  # after the load, which brings the epoch
            for batch in state.batches():  # Pillion
                rows_BW = batch.to(device)
                loss = (model(rows_BW) - rows_BW).square().mean()
                loss.backward()
                state["step"] += 1
                if (rank, state["step"]) == (1, die_at) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    os.kill(os.getpid(), signal.SIGKILL)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if rank == 0:
                    print(f"step {state['step']}: loss {loss.item()}", flush=True)
                if checkpointer.due(state["step"]):  # Pillion
                    checkpointer.save(state, state["step"])  # Pillion
            state["epoch"] += 1
    digest = digest_of(model)
    if rank == 0:
        print(f"trained up to step {state['step']}, weights {digest}", flush=True)
    return digest


def digest_of(model: nn.Module) -> str:
    """
    Gives the digest of the whole weights, to compare two runs. A collective.
    """
    digest = hashlib.sha256()
    for weight in model.parameters():
        assert isinstance(weight, DTensor)
        digest.update(weight.full_tensor().detach().cpu().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
