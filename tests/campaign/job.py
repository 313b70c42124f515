"""
The whole of: a small job of two ranks under torchrun's agent, in one pod or two, whose every step can be told by arithmetic.

Called from: `campaign.runs` (starts it, ends it, reads its journal).
Must never: import torch anew for each run; workers are forked from a process that has it, by torchrun's own start method `fork`.

The job's store lives in rank 0's trainer, as in a cluster, and dies with it. What a rank does is in journal.<rank>, one JSON line each:
started, step, done.
"""

import datetime
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import pillion
from pillion_sidecar import faults

WORLD: Final = 2
STEPS: Final = 100
SNAPSHOT_STEPS: Final = 2
PERIOD_STEPS: Final = 10
KEEP_LAST: Final = 3
STEP_S: Final = 0.01
NUMEL: Final = 50_000
GROUP_TIMEOUT_S: Final = 20.0
"""Bound for a collective: a peer that is stopped for longer ends the attempt."""
MAX_RESTARTS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job."""

    folder: Path
    pods: int

    @property
    def root(self) -> Path:
        return self.folder / "checkpoints"

    def journal(self, rank: int) -> Path:
        return self.folder / f"journal.{rank}"

    def environment(self, pod: int) -> dict[str, str]:
        return {"PILLION_POD": f"{self.folder.name}-{pod}"}


def begin() -> dict[str, torch.Tensor]:
    """The state before the first step."""
    return {"weights": torch.arange(NUMEL, dtype=torch.float32) / NUMEL, "momentum": torch.zeros(NUMEL)}


def gradient(weights: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    """Of one rank's batch: elementwise, so that it is the same bit for bit wherever it is computed."""
    return weights - ((torch.arange(NUMEL) * (rank + 2) + step * 7) % 13).to(torch.float32)


def update(state: dict[str, torch.Tensor], total: torch.Tensor) -> float:
    """One optimizer step with the sum of all ranks' gradients; the loss."""
    loss = float((total * total).sum())
    state["momentum"].mul_(0.9).add_(total)
    state["weights"].sub_(state["momentum"], alpha=0.01)
    return loss


def reference() -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Loss and state after each step of a run that nothing interrupts; index 0 is the beginning."""
    state = begin()
    told = [(0.0, {name: tensor.clone() for name, tensor in state.items()})]
    for step in range(1, STEPS + 1):
        loss = update(state, gradient(state["weights"], step, 0) + gradient(state["weights"], step, 1))
        told.append((loss, {name: tensor.clone() for name, tensor in state.items()}))
    return told


def train(job: Job) -> None:
    """A trainer: the entrypoint that torchrun's agent forks for each rank."""
    faults.arm()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    journal = os.open(job.journal(rank), os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def say(event: str, **fields: Any) -> None:
        os.write(
            journal, json.dumps({"event": event, "time": time.time(), "pid": os.getpid(), **fields}).encode() + b"\n"
        )

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S))
    policy = {
        "trigger": {"periodSteps": PERIOD_STEPS, "snapshotSteps": SNAPSHOT_STEPS},
        "retention": {"keepLast": KEEP_LAST},
    }
    state = begin()
    with pillion.Checkpointer(str(job.root), policy=policy) as checkpointer:
        tensors: dict[str, Any] = {"model": state, "step": 0}
        loaded = checkpointer.load(tensors) or 0
        report = checkpointer.last_load
        assert tensors["step"] == loaded
        say(
            "started",
            loaded=loaded,
            tier=str(report.tier) if report is not None else "",
            refused=dict(report.refused) if report is not None else {},
        )
        for step in range(loaded + 1, STEPS + 1):
            total = gradient(state["weights"], step, rank)
            dist.all_reduce(total)
            loss = update(state, total)
            tensors["step"] = step
            say("step", step=step, loss=loss)
            if checkpointer.due(step):
                checkpointer.save(tensors, step)
            time.sleep(STEP_S)
    say("done")
    if rank == 0:
        torch.save(state, job.folder / "final.new")
        os.replace(job.folder / "final.new", job.folder / "final.pt")
    dist.destroy_process_group()


def agent(job: Job, pod: int, port: int, environment: dict[str, str]) -> int:
    """
    Fork torchrun's agent of one pod; its pid. It ends with status 0 when the job is done.

    Args:
        port: of the rendezvous store.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(job.folder / f"agent.{pod}", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment | job.environment(pod))
        # A store for each start of the trainers, in rank 0's: what it held of those before would mislead them.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        config = LaunchConfig(
            min_nodes=job.pods,
            max_nodes=job.pods,
            nproc_per_node=WORLD // job.pods,
            run_id="campaign",
            rdzv_backend="c10d",
            rdzv_endpoint=f"127.0.0.1:{port}",
            rdzv_configs={
                "is_host": "false",
                "keep_alive_interval": 1,
                "keep_alive_max_attempt": 3,
                "join_timeout": 15,
            },
            max_restarts=MAX_RESTARTS,
            monitor_interval=0.05,
            start_method="fork",
            local_addr="127.0.0.1",
        )
        elastic_launch(config, train)(job)
        status = 0
    except BaseException as err:  # the process ends here, whatever it was
        print(f"the agent ends: {type(err).__name__}: {err}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def journal(job: Job, rank: int, *, newest_bytes: int | None = None) -> list[dict[str, Any]]:
    """What a rank has said so far, or only the end of it. A line that is not whole is passed over."""
    found = []
    if job.journal(rank).exists():
        with job.journal(rank).open("rb") as file:
            if newest_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - newest_bytes))
            text = file.read().decode(errors="replace")
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found
