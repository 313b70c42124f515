"""
The whole of: a small job of two ranks under torchrun's agent, in one pod or two, whose every step can be told by arithmetic (`campaign.training`).

Called from: `campaign.runs` (starts it, ends it, reads its journal).
Must never: import torch anew for each run; workers are forked from a process that has it, by torchrun's own start method `fork`.

The job's store lives in rank 0's trainer, as in a cluster, and dies with it. What a rank does is in journal.<rank>, one JSON line each:
started, step, rolled, done.
"""

import datetime
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import pillion
from campaign import training
from campaign.training import STEPS, WORLD, Training
from pillion.testing import faults

SNAPSHOT_STEPS: Final = 2
PERIOD_STEPS: Final = 10
KEEP_LAST: Final = 3
LOCAL_STEPS: Final = 4
"""Steps between the saves to the disks of the nodes, in a job that has such."""
POLICY: Final[dict[str, Any]] = {
    "trigger": {"periodSteps": PERIOD_STEPS, "snapshotSteps": SNAPSHOT_STEPS},
    "retention": {"keepLast": KEEP_LAST},
}
STEP_S: Final = 0.01
CALLBACK_S: Final = 0.03
RAISES_SHARE: Final = 0.2
ROLLED: Final = "rolled"
"""The file that says that the job went back once."""
GROUP_TIMEOUT_S: Final = 20.0
"""Bound for a collective: a peer that is stopped for longer ends the attempt."""
MAX_RESTARTS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job."""

    folder: Path
    pods: int
    stuck: bool = False
    """A worker of a data loader of rank 0 is stuck for as long as the job goes on."""
    rollback_at: int = 0
    """The step at which all go back to an older one, once; 0: never."""
    disks: bool = False
    """Whether each pod has a disk of its node in front of storage."""

    def disk(self, pod: int) -> Path:
        return self.folder / f"disk.{pod}"

    def policy(self) -> dict[str, Any]:
        """In a trainer: its policy."""
        if not self.disks:
            return POLICY
        disk = self.disk(int(os.environ["PILLION_POD"].rpartition("-")[2]))
        return POLICY | {
            "trigger": POLICY["trigger"] | {"localSteps": LOCAL_STEPS},
            "storage": {"local": {"path": str(disk)}},
        }

    @property
    def root(self) -> Path:
        return self.folder / "checkpoints"

    def journal(self, rank: int) -> Path:
        return self.folder / f"journal.{rank}"

    def environment(self, pod: int) -> dict[str, str]:
        return {"PILLION_POD": f"{self.folder.name}-{pod}"}


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
    of = Training(rank)
    # Kept for as long as the trainer lives, and longer.
    helper = training.stuck(job.folder) if job.stuck and rank == 0 else None
    with pillion.Checkpointer(str(job.root), policy=job.policy()) as checkpointer:
        loaded = _load(checkpointer, of)
        report = checkpointer.last_load
        say(
            "started",
            loaded=loaded,
            tier=str(report.tier) if report is not None else "",
            refused=dict(report.refused) if report is not None else {},
        )
        items = of.position.items()
        while of.position.step < STEPS:
            total = of.gradient(next(items))
            dist.all_reduce(total)
            loss = of.update(total)
            step = of.position.step
            say("step", step=step, loss=loss)
            if checkpointer.due(step):
                handle = checkpointer.save(of.state_dict(), step, overlap=step % 4 == 0)
                handle.committed.add_done_callback(_call_back)
            time.sleep(STEP_S)
            if step == job.rollback_at and _to_roll_back(job, checkpointer):
                say("rolled", loaded=_load(checkpointer, of, step=_agreed(checkpointer)))
                (job.folder / ROLLED).touch()
                items = of.position.items()
    say("done")
    (job.folder / training.ENDED).touch()
    del helper
    if rank == 0:
        torch.save(of.mark(), job.folder / "final.new")
        os.replace(job.folder / "final.new", job.folder / "final.pt")
    dist.destroy_process_group()


def _load(checkpointer: pillion.Checkpointer, of: Training, step: int | None = None) -> int:
    state = of.template()
    loaded = checkpointer.load(state, step)
    if loaded is None:
        return 0
    of.restore(state)
    assert of.position.step == loaded
    return loaded


def _call_back(_: object) -> None:
    """What users do at a commit: something slow, and now and then something wrong."""
    time.sleep(CALLBACK_S)
    if random.random() < RAISES_SHARE:
        raise RuntimeError("the user's callback")


def _to_roll_back(job: Job, checkpointer: pillion.Checkpointer) -> bool:
    """Whether all ranks go back to an older step now: once a job, as after a spike of the loss, and where there is one."""
    wanted = torch.tensor(int(not (job.folder / ROLLED).exists() and checkpointer.latest() is not None))
    dist.all_reduce(wanted, op=dist.ReduceOp.MIN)
    return bool(wanted)


def _agreed(checkpointer: pillion.Checkpointer) -> int:
    """The newest committed step that every rank has seen."""
    newest = checkpointer.latest()
    step = torch.tensor(newest.step if newest is not None else 0)
    dist.all_reduce(step, op=dist.ReduceOp.MIN)
    return int(step)


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
