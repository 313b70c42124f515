"""
The story: pods of a job are deleted and evicted and their containers killed at random, and each time the job goes on from where it is promised.

Called from: pytest. PILLION_CAMPAIGN_SEED chooses another order of faults, PILLION_CAMPAIGN_ROUNDS more of them.
"""

import enum
import os
import random
import time
from collections.abc import Callable
from typing import Final

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cluster import trainer
from cluster.conftest import Training
from cluster.harness.clusters import Cluster
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, container_status

ROUNDS: Final = int(os.environ.get("PILLION_CAMPAIGN_ROUNDS", "3"))
SEED: Final = int(os.environ.get("PILLION_CAMPAIGN_SEED", "4"))
ROUND_S: Final = 300
"""The wall for each round: what it waits for is bounded by deadlines of their own, most of them twice."""
MIB: Final = 4
KEPT: Final = 100000
ROUNDS_A_JOB: Final = 3
"""The Job controller waits twice as long after each failure, from 10 s on, and it is not what is tested: then a new Job follows."""
MAX_RESTARTS: Final = 2
"""Of one container: the kubelet makes the next one wait, longer each time, and it is not the kubelet that is tested."""


class Fault(enum.Enum):
    """What happens to one of the pods."""

    DELETE = "delete pod"
    VANISH = "delete pod without grace"
    EVICT = "evict pod"
    KILL_TRAINER = "kill trainer"
    KILL_SIDECAR = "kill sidecar"


@pytest.mark.timeout(ROUNDS * ROUND_S)
@pytest.mark.may_warn("SaveFailed", "StorageError", "LoadFailed")
def test_every_fault_is_followed_by_a_step_that_was_not_lost(
    training: Training, cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    """Both ranks load one step, not older than the newest commit known before; and stock DCP loads every checkpoint."""
    kube = training.kube
    chance = random.Random(SEED)
    kube.apply(jobs.policy(retention={"keepLast": KEPT}, drain={"timeoutSeconds": 10}))
    for number in range(ROUNDS):
        known = jobs.newest(training.volume)
        if number % ROUNDS_A_JOB == 0:
            step = start(training, known)
            assert step >= known, "what the job before had committed is lost"
            known = jobs.newest(training.volume)
        rank = chance.randrange(2)
        pod = kube.pods("train")[rank]
        fault = allowed(pod, chance.choice(list(Fault)))
        begun_s, begun = time.time(), time.monotonic()
        reached = trained(kube)
        inject(kube, cluster, pod, fault)
        print(f"round {number}: {fault.value} of rank {rank}; step {known} is committed")
        if fault is Fault.KILL_SIDECAR:
            step = known
        else:
            step, tier = loads(kube, begun_s)
            assert step >= known, "what was committed is lost"
            record_property(f"{number}_{fault.name}_{rank}_{tier}_loaded_s", round(time.monotonic() - begun, 1))
            record_property(f"{number}_{fault.name}_{rank}_{tier}_steps_lost", max(0, reached - step))
        committed(training, step)
        record_property(f"{number}_{fault.name}_{rank}_committed_s", round(time.monotonic() - begun, 1))

    end(kube)
    steps = jobs.committed(training.volume)
    record_property("checkpoints", len(steps))
    for step in steps:
        numel = MIB * 2**20 // 4
        state = {f"weights{rank}": torch.zeros(numel) for rank in range(2)}
        dcp.load(state, checkpoint_id=training.volume / "train" / f"step-{step}")
        for rank in range(2):
            assert torch.equal(state[f"weights{rank}"], trainer.values(step, rank, numel)), (step, rank)


def start(training: Training, known: int) -> int:
    """A Job of the same name as the one before, and so with its checkpoints; the step that it begins at."""
    kube, begun_s = training.kube, time.time()
    if known >= 0:
        end(kube)
    env = {"STEPS": "100000", "STEP_S": "0.2", "MIB": str(MIB)}
    # How often it may begin anew is the campaign's to say.
    kube.create(
        *jobs.job(pods=2, env=env, pod={"terminationGracePeriodSeconds": 5}, backoff_limit=KEPT, max_restarts=KEPT)
    )
    step = loads(kube, begun_s)[0] if known >= 0 else 0
    committed(training, max(step, known))
    return step


def end(kube: Kube) -> None:
    """Delete the Job, and wait until its pods are gone."""
    kube.delete("job", "train", "--cascade=foreground")
    kube.until(lambda: not kube.all("pods"), Deadline.POD_GONE, "the job to be gone")
    kube.until(lambda: kube.get("job", "train") is None, Deadline.API, "the job to be gone")
    kube.delete("service", "train")


def allowed(pod: Json, fault: Fault) -> Fault:
    """The fault, or a new pod in its place where the kubelet's back-off would be what is measured."""
    restarts = max(container_status(pod, name)["restartCount"] for name in (jobs.CONTAINER, "pillion-sidecar"))
    return fault if restarts < MAX_RESTARTS or fault in (Fault.VANISH, Fault.EVICT) else Fault.DELETE


def trained(kube: Kube) -> int:
    """The newest step that a trainer has spoken of."""
    events = ("step", "snapshot", "committed")
    return max(jobs.last(kube, pod["metadata"]["name"], event) for pod in kube.pods("train") for event in events)


def inject(kube: Kube, cluster: Cluster, pod: Json, fault: Fault) -> None:
    """Do it."""
    name = pod["metadata"]["name"]
    if fault is Fault.EVICT:
        kube.evict(name)
    elif fault in (Fault.DELETE, Fault.VANISH):
        kube.delete("pod", name, *(("--force", "--grace-period=0") if fault is Fault.VANISH else ()))
    else:
        container = jobs.CONTAINER if fault is Fault.KILL_TRAINER else "pillion-sidecar"
        cluster.kill(pod["spec"]["nodeName"], container_status(pod, container)["containerID"])


def loads(kube: Kube, since_s: float) -> tuple[int, str]:
    """What the trainers of both ranks have loaded since then, step and tier; their newest, where one had to load twice."""

    def found() -> list[Json]:
        newest: dict[int, Json] = {}
        for pod in kube.pods("train"):
            for line in jobs.said(kube, pod["metadata"]["name"], "loaded"):
                if line["time"] > since_s:
                    newest[line["rank"]] = line
        assert set(newest) == {0, 1}, newest
        assert len({line["step"] for line in newest.values()}) == 1, newest
        return list(newest.values())

    lines = kube.until(found, Deadline.RECOVERED, "both ranks to load")
    assert all(line["equal"] for line in lines)
    return lines[0]["step"], lines[0]["tier"]


def committed(training: Training, after: int) -> None:
    """Wait for two commits that are newer: the first may have been on its way when the fault came."""
    known = {step for step in jobs.committed(training.volume) if step > after}

    def more() -> bool:
        return len({step for step in jobs.committed(training.volume) if step > after} - known) > 1

    training.kube.until(more, Deadline.RECOVERED, f"commits after step {after}")
