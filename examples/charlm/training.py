"""
The whole of: model, optimizer and schedule under DDP or FSDP2, and their state as one state dict.

Called from: train.py (to train) and verify.py (to load what train.py saved into another world).
Must never: know how the state is saved.
"""

import dataclasses
import os
from typing import Any, Literal

import torch
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import model as charmodel

Parallel = Literal["fsdp", "ddp", "none"]


@dataclasses.dataclass(kw_only=True, slots=True)
class Training:
    """
    Everything that changes from step to step.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0

    def state_dict(self, rank: int) -> dict[str, Any]:
        """
        All that a run needs to go on, with the names that the model has without DDP or FSDP.

        The tensors are the live ones. torch's generator differs from rank to rank, so each rank adds its own.
        """
        model_state, optimizer_state = dcp_state_dict.get_state_dict(self.network, self.optimizer)
        return {
            "model": model_state,
            "optimizer": optimizer_state,
            "schedule": self.schedule.state_dict(),
            "generator": {f"rank{rank}": torch.get_rng_state()},
            "step": self.step,
        }

    def load_state_dict(self, state_dict: dict[str, Any], rank: int) -> None:
        """
        Goes on from what `state_dict` gave, in this run or an earlier one.
        """
        dcp_state_dict.set_state_dict(
            self.network,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.schedule.load_state_dict(state_dict["schedule"])
        torch.set_rng_state(state_dict["generator"][f"rank{rank}"])
        self.step = state_dict["step"]

    def whole(self) -> dict[str, Any]:
        """
        Weights and optimizer state as plain tensors, on rank 0; empty on the others. For comparing runs.

        Ranks: all, same order (it gathers).
        """
        options = dcp_state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        model_state, optimizer_state = dcp_state_dict.get_state_dict(self.network, self.optimizer, options=options)
        return {"model": model_state, "optimizer": optimizer_state}


def join() -> int:
    """
    Joins the process group that torchrun describes; gives this process's rank.

    Like `init_process_group("gloo")`, with the restart count in front of the store's keys where the store is torchrun's own: it
    outlives a restart, with gloo's addresses of the ranks that died in it (seen in torch 2.15): a rank that is quicker than the
    rest would read one of those, and fail with "Connection refused". Across nodes the counts differ, as each torchrun has its
    own; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 then gives every start a store of its own (examples/cluster/job.yaml).

    Blocks: until all ranks are there, up to torch's own default timeout.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        distributed.init_process_group("gloo")
        return distributed.get_rank()
    store, rank, world_size = next(distributed.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"attempt-{attempt}", store)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    return int(rank)


def be_deterministic() -> None:
    """
    Makes a step give the same bits each time: one thread, and only operations that promise it.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def build(parallel: Parallel, *, seed: int, num_steps: int) -> Training:
    """
    A training at step 0, equal on all ranks.

    Ranks: all, same order, with a process group (parallel="none": one process without a group).
    """
    network: nn.Module = charmodel.build(seed)
    if parallel == "fsdp":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        assert isinstance(network, charmodel.CharModel)
        for block in network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
    elif parallel == "ddp":
        network = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps, eta_min=1e-4)
    if distributed.is_initialized():
        # From here on the generator drives the dropout, which should differ from rank to rank.
        torch.manual_seed(seed + 1 + distributed.get_rank())
    return Training(network=network, optimizer=optimizer, schedule=schedule)
