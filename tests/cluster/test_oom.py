"""
The story: the kernel kills the sidecar for its memory, training goes on, and the next sidecar takes over what is in the arena.

Called from: pytest.
"""

import itertools
import time
from collections.abc import Callable
from typing import Final

import pytest

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import KubectlFailed, container_status

SIDECAR: Final = "pillion-sidecar"
LONGEST_PAUSE_S: Final = 10.0
"""Between two words of a trainer that says one every 2 s, on a machine that is busy with starting a container."""

HOG: Final = """
import glob
for path in glob.glob("/proc/[0-9]*/oom_score_adj"):
    with open(path, "w") as file:
        # Where the kernel kills one process only (cgroup v1), it is the container's first one. Under v2 all of them go.
        file.write("1000" if path == "/proc/1/oom_score_adj" else "0")
held = []
while True:
    held.append(b"x" * 2**20)
"""
"""Takes memory until the container's limit is reached."""


@pytest.mark.may_warn("SaveFailed", "ArenaTooSmall")
def test_a_sidecar_that_is_killed_for_its_memory_takes_over_again(
    training: Training, record_property: Callable[[str, object], None]
) -> None:
    """OOMKilled is the container's last state; the trainer did not restart nor pause, and later saves commit."""
    kube = training.kube
    resources = {"requests": {"cpu": "50m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}}
    training.run(jobs.policy(sidecar={"resources": resources}), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "committed"), Deadline.TRAINED, "a commit")
    name = kube.pod_name("train")
    inode = kube.exec(name, jobs.CONTAINER, "stat", "-c", "%i", "/pillion/arena/segment-0.arena")

    begun = time.monotonic()
    with pytest.raises(KubectlFailed, match=r"137|closed|EOF"):
        kube.exec(name, SIDECAR, "python3", "-c", HOG, deadline=Deadline.SETTLE)
    killed_at = jobs.last(kube, name, "step")

    def killed() -> bool:
        (pod,) = kube.pods("train")
        terminated = container_status(pod, SIDECAR)["lastState"].get("terminated", {})
        return bool(terminated.get("reason") == "OOMKilled")

    kube.until(killed, Deadline.API, "the kubelet to say why the container ended")
    kube.until(lambda: jobs.last(kube, name, "committed") > killed_at, Deadline.RECOVERED, "a save after it to commit")
    record_property("committed_s", round(time.monotonic() - begun, 1))
    kube.until(lambda: kube.newest_checkpoint() > killed_at, Deadline.HOME, "the new sidecar to call home")

    times = [line["time"] for line in jobs.said(kube, name, "step")]
    pause_s = max(after - before for before, after in itertools.pairwise(times))
    record_property("longest_pause_s", round(pause_s, 1))
    assert pause_s < LONGEST_PAUSE_S
    (pod,) = kube.pods("train")
    assert container_status(pod, SIDECAR)["restartCount"] == 1
    assert container_status(pod, jobs.CONTAINER)["restartCount"] == 0
    again = kube.exec(name, jobs.CONTAINER, "stat", "-c", "%i", "/pillion/arena/segment-0.arena")
    assert again == inode, "the arena is the same: adopted, not made anew"
