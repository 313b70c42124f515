"""
The whole of: a job of two injected pods, each with its own sidecar: who calls home, and that a change of the policy reaches the ranks of
both at one step.

Called from: pytest.
Must never: let the pods share anything but the job's store and the storage.
"""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pillion import checkpointer
from pillion.wire import home, names
from process.injected import Injected
from process.ranks import Body, Peer, Ranks, committed
from support import controller as controllers
from support.controller import Controller
from support.deadlines import Deadline
from support.processes import Processes

NEVER = {"trigger": {"periodSteps": 1_000_000}}


@pytest.fixture
def controller(tmp_path: Path, nothing_left: str) -> Iterator[Controller]:
    with controllers.listening(tmp_path / "controller") as listening:
        yield listening


def pods(processes: Processes, tmp_path: Path, controller: Controller, **policy: object) -> list[Injected]:
    """Two sidecars, as of an Indexed Job."""
    return [
        Injected(
            processes,
            tmp_path / f"arena-{index}",
            tmp_path / "run",
            policy=policy,
            pod=f"uid-{index}",
            env=controller.env(**{names.ENV_POD_NAME: f"llm-{index}", names.ENV_COMPLETION_INDEX: str(index)}),
        )
        for index in range(2)
    ]


def in_step(sidecars: list[Injected]) -> Body:
    """A rank that takes its steps with the other, as training does, until rank 0 hears something; the steps it saved."""

    def train(peer: Peer) -> list[int]:
        os.environ.update(sidecars[peer.rank].trainer)
        opened = checkpointer.Checkpointer()
        step, saved, going_on = 0, [], torch.ones(1)
        peer.tell(opened._session._store_mode)
        while True:
            going_on[0] = float(peer.rank != 0 or not peer._pipe.poll(0.005))
            dist.all_reduce(going_on, dist.ReduceOp.MIN)
            if not going_on[0]:
                break
            step += 1
            if opened.due(step):
                saved.append(step)
                opened.save({"w": torch.full((500,), float(step)), f"own{peer.rank}": torch.ones(3)}, step)
        opened.wait(Deadline.COMMITTED.s)
        opened.close()
        return saved

    return train


def test_a_change_reaches_both_pods_at_one_step_and_only_the_coordinator_reports(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """The ranks save the same steps; a save that is asked for is one of them; the second pod never calls home."""
    sidecars = pods(processes, tmp_path, controller, **NEVER)
    job = ranks.start(in_step(sidecars), num_ranks=2, pods=["uid-0", "uid-1"])
    assert job.hear() == ["prefix", "prefix"]
    heard = controller.hears("of the session", lambda report: report.session)
    assert (heard.pod, heard.num_pods, heard.world_size) == ("llm-0", 2, 2)
    policy = {"trigger": {"periodSteps": 100}, "retention": {"keepLast": 2}, "drain": {"timeoutSeconds": 9}}
    controller.answer = dataclasses.replace(controller.answer, policy=policy, policy_generation=5)
    controller.hears(
        "of saves under the new policy",
        lambda report: report.metrics["saves_committed"] >= 3 and len(report.checkpoints) == 2,
    )
    assert sidecars[1].ask("status")["policy_generation"] == 5
    assert sidecars[1].ask("policy")["policy"]["drain"] == {"timeoutSeconds": 9}
    controller.answer = dataclasses.replace(
        controller.answer, policy=policy | {"suspend": True}, policy_generation=6, commands=(home.Command(id="now"),)
    )
    heard = controller.hears(
        "of the demand", lambda report: [each.progress for each in report.acknowledgements] == ["Done"]
    )
    job[0].say()
    mine, others = job.finish()
    assert mine == others
    # A save by the period may come first and serve the demand; the one that the trainers had announced for it follows all the same.
    assert heard.acknowledgements[0].step in mine
    assert len([step for step in mine if step % 100]) <= 1
    assert {report.pod for report in controller.reports} == {"llm-0"}


def test_a_pod_whose_sidecar_was_replaced_begins_under_the_policy_of_the_others(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Its environment is of the pod's start, and nobody tells it more before its trainer asks: rank 0's sidecar decides for all."""
    sidecars = pods(processes, tmp_path, controller, **NEVER)
    job = ranks.start(in_step(sidecars), num_ranks=2, pods=["uid-0", "uid-1"])
    job.hear()
    policy = {"trigger": {"periodSteps": 50}}
    controller.answer = dataclasses.replace(controller.answer, policy=policy, policy_generation=5)
    controller.hears("of a commit", lambda report: report.metrics["saves_committed"] >= 1)
    job[0].say()
    job.finish()
    sidecars[1].run.signal(signal.SIGKILL)
    sidecars[1].run.wait(Deadline.PROCESS_EXIT)
    sidecars[1].start()
    assert sidecars[1].ask("policy")["policy"]["trigger"]["periodSteps"] == 1_000_000
    before = controller.reports[-1].metrics["saves_committed"]
    job = ranks.start(in_step(sidecars), num_ranks=2, pods=["uid-0", "uid-1"], attempt=1)
    job.hear()
    controller.hears("of more commits", lambda report: report.metrics["saves_committed"] >= before + 2)
    job[0].say()
    mine, others = job.finish()
    assert mine == others
    assert mine[0] == 50
    assert all(step % 50 == 0 for step in mine)


def test_a_store_of_its_own_is_what_the_policy_of_the_pod_says(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """The trainer has no policy in its environment: rank 0's sidecar says which store the pods meet in, and they commit."""
    sidecars = pods(processes, tmp_path, controller, store="Own", trigger={"periodSteps": 20})
    job = ranks.start(in_step(sidecars), num_ranks=2, pods=["uid-0", "uid-1"])
    assert job.hear() == ["own", "own"]
    controller.hears("of a commit", lambda report: report.committed_step > 0)
    job[0].say()
    mine, others = job.finish()
    assert mine == others
    assert committed(tmp_path / "run") == mine
