"""
Tests of how many requests a save makes to a bucket beside its data, as a proxy in front of the store counts them. A store charges for each.

Called from: pytest.
"""

import functools
from collections import Counter
from typing import Any, Final

import torch

from pillion import checkpointer
from process.ranks import Job, Peer, Ranks
from support import deadlines
from support.deadlines import Deadline
from support.object_stores import behind
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.operations import Only, Operation, Seen
from support.object_stores.places import Place

FOLDER: Final = "team/run-1"
SAVE: Final = {Operation.LIST: 4, Operation.GET: 0, Operation.PUT: 4}
"""Most requests of a save of a new step in a job of one pod, without its data and its sign of life: part, manifest, marker and note are put."""
RETENTION: Final = {Operation.LIST: 9, Operation.GET: 7, Operation.HEAD: 3, Operation.PUT: 1, Operation.DELETE_MANY: 4}
"""Most requests of the retention behind it that removes one of three checkpoints."""


def begin(ranks: Ranks, place: Place, **more: Any) -> Job:
    """A trainer that saves the steps that it is told."""

    def train(peer: Peer) -> None:
        policy = {"storage": {"objectStore": {"endpoint": place.endpoint}}, **more}
        with checkpointer.Checkpointer(f"{place.url}/{FOLDER}", policy=policy) as opened:
            while (step := peer.hear()) is not None:
                opened.save({"w": torch.ones(9)}, step).result(Deadline.COMMITTED.s)
                peer.tell(step)

    return ranks.start(train, env=place.environment)


def save(job: Job, step: int) -> None:
    [trainer] = job.trainers
    trainer.say(step)
    assert trainer.hear() == step


def end(job: Job) -> None:
    [trainer] = job.trainers
    trainer.say(None)
    job.finish()


def counted(requests: list[Seen]) -> Counter[Operation]:
    """The requests without the data and the sign of life, which comes when it comes."""
    return Counter(
        each.operation
        for each in requests
        if not each.key.endswith(".distcp") and "/generations/" not in each.key.removesuffix("/generations/")
    )


def until_marker(requests: list[Seen]) -> list[Seen]:
    """What came up to the note of the newest step, which follows the marker."""
    last = max(index for index, each in enumerate(requests) if each.key.endswith("/newest.json"))
    return requests[: last + 1]


def test_a_save_and_its_retention_make_a_bounded_number_of_requests(
    ranks: Ranks, s3_bucket: Place, s3_proxy: FaultProxy
) -> None:
    """In a job of one pod that keeps two checkpoints: each save removes one."""
    job = begin(ranks, s3_proxy.place, retention={"keepLast": 2})
    for step in (1, 2, 3, 4):
        if step == 4:
            deadlines.eventually(lambda: removed(s3_bucket, 1), Deadline.SETTLE, "step 1 is removed whole")
            s3_proxy.forget()
        save(job, step)
    deadlines.eventually(lambda: removed(s3_bucket, 2), Deadline.SETTLE, "step 2 is removed whole")
    requests = s3_proxy.seen()
    end(job)
    saving = until_marker(requests)
    print("save", saved := counted(saving))
    print("retention", retained := counted(requests[len(saving) :]))
    assert all(saved[each] <= SAVE.get(each, 0) for each in saved), saved
    assert all(retained[each] <= RETENTION.get(each, 0) for each in retained), retained


def removed(place: Place, step: int) -> bool:
    """Whether a step is gone, with the tombstone, whose removal comes last. Asked behind the proxy's back."""
    return not any(name.startswith(f"step-{step}/") for name in behind.files(place, FOLDER))


def test_what_is_kept_costs_no_requests_of_later_saves(ranks: Ranks, s3_proxy: FaultProxy) -> None:
    """A policy that keeps all checkpoints looks at each of them once, and not after every save again."""
    job = begin(ranks, s3_proxy.place)
    looked = []
    for step in (1, 2, 3, 4, 5):
        s3_proxy.forget()
        save(job, step)
        marker = Only(operation=Operation.HEAD, key=rf"/step-{step}/\.metadata$")
        deadlines.eventually(functools.partial(s3_proxy.seen, marker), Deadline.SETTLE, "retention has looked at it")
        looked.append(counted(s3_proxy.seen()))
    end(job)
    print(looked)
    assert sum(looked[4].values()) <= sum(looked[1].values())
