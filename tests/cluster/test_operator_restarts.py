"""
The story: pods of the operator are deleted at random while a job saves, and neither a save, an object nor an admission is lost.

Called from: pytest. PILLION_CAMPAIGN_SEED chooses another order, PILLION_CAMPAIGN_ROUNDS more rounds.
"""

import os
import random
import time
from collections.abc import Callable
from typing import Final

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Kube
from support.release import Release

ROUNDS: Final = int(os.environ.get("PILLION_CAMPAIGN_ROUNDS", "4"))
SEED: Final = int(os.environ.get("PILLION_CAMPAIGN_SEED", "4"))
PERIOD: Final = 10
KEPT: Final = 100000
AT_ONCE: Final = ("--force", "--grace-period=0")
ASLEEP: Final = {"command": ["sleep", "600"]}
"""A pod that is admitted and does nothing."""


def test_nothing_is_lost_while_the_operators_pods_come_and_go(
    training: Training, release: Release, record_property: Callable[[str, object], None]
) -> None:
    """Each round deletes some of its four pods, with or without their grace: a new pod is injected, and every commit gets its object."""
    kube = training.kube
    chance = random.Random(SEED)
    policy = jobs.policy(trigger={"periodSteps": PERIOD}, retention={"keepLast": KEPT})
    training.run(policy, *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: kube.newest_checkpoint() > 0, Deadline.TRAINED, "a checkpoint")

    for number in range(ROUNDS):
        before = jobs.newest(training.volume)
        begun = time.monotonic()
        delete_some(release.kube, chance)
        admitted(kube, f"new-{number}")
        record_property(f"admitted_{number}_s", round(time.monotonic() - begun, 1))
        goes_on(training, before)

    seen = jobs.newest(training.volume)
    begun = time.monotonic()
    kube.until(lambda: kube.newest_checkpoint() >= seen, Deadline.RECOVERED, "the newest to be listed")
    record_property("listed_s", round(time.monotonic() - begun, 1))
    committed = jobs.committed(training.volume)
    assert committed == list(range(PERIOD, committed[-1] + 1, PERIOD)), "a save that was due is not on storage"
    expected = set(range(PERIOD, seen + 1, PERIOD))

    def listed() -> bool:
        found = [each["status"].get("step") for each in kube.all("checkpoints") if "status" in each]
        assert len(found) == len(set(found)), "two objects for one checkpoint"
        missing = expected - set(found)
        assert not missing, sorted(missing)
        return True

    kube.until(listed, Deadline.HOME, "an object for every commit")
    (pod,) = kube.pods("train")
    assert jobs.said(kube, pod["metadata"]["name"], "failed") == []
    assert all(status["restartCount"] == 0 for status in pod["status"]["containerStatuses"])


def delete_some(system: Kube, chance: random.Random) -> None:
    """Delete one to all of the operator's pods."""
    # Not those that are on their way out already.
    names = sorted(
        each["metadata"]["name"] for each in system.all("pods") if "deletionTimestamp" not in each["metadata"]
    )
    chosen = chance.sample(names, chance.randint(1, len(names)))
    options = AT_ONCE if chance.random() < 0.5 else ()
    print("delete", *chosen, *options)
    for name in chosen:
        system.delete("pod", name, "--ignore-not-found", *options)


def admitted(kube: Kube, job: str) -> None:
    """Make a Job that opts in, and wait until it has its pod, with the sidecar in it."""
    kube.create(*jobs.job(job, container=ASLEEP))
    (pod,) = kube.until(lambda: kube.pods(job), Deadline.ROLLED_OUT, "a pod that opted in")
    assert any(each["name"] == "pillion-sidecar" for each in pod["spec"].get("initContainers", []))
    kube.delete("job", job)


def goes_on(training: Training, before: int) -> None:
    """Wait for a commit that is newer."""
    training.kube.until(lambda: jobs.newest(training.volume) > before, Deadline.TRAINED, "commits meanwhile")
