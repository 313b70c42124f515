"""
The whole of: the story that Pillion tells on a cluster, run and checked: `make demo-cluster`.

    cluster up, images built, chart installed, policy applied, a Job of two pods on two nodes annotated
      trainer killed  -> resumes from the arena          losses of repeated steps are the same, bit for bit
      pod deleted     -> its replacement resumes from storage
      job completes with the trainer's exit status; `kubectl` tells what happened; everything is taken down

Called from: a person. Exit status 0 only when everything that it says turned out true.
Must never: wait without a deadline of `support.deadlines`, or leave the cluster up unless --keep is said.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Final

import yaml

from cluster.harness import binaries, clusters, progress
from cluster.harness.machine import HarnessError
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, condition, container_status
from support.release import NAMESPACE, Release

EXAMPLES: Final = Path(__file__).parents[2] / "examples" / "cluster"
TEAM: Final = "team-a"
KILL: Final = """
import os, signal
for pid in filter(str.isdigit, os.listdir("/proc")):
    words = open(f"/proc/{pid}/cmdline").read().split("\\0")
    if any(word.endswith("train.py") for word in words) and "torch.distributed.run" not in words:
        os.kill(int(pid), signal.SIGKILL)
        print("killed", pid)
"""
_BEGUN: Final = time.monotonic()


class DemoFailed(Exception):
    """Something is not as the story tells it."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo-cluster", description=__doc__.splitlines()[1])
    parser.add_argument("--cluster", choices=clusters.PROVIDERS, default="auto")
    parser.add_argument("--keep", action="store_true", help="leave the cluster up at the end")
    given = parser.parse_args()
    try:
        cluster = clusters.choose(given.cluster)
        try:
            tell(cluster)
        finally:
            if not given.keep:
                say("The cluster is taken down.")
                cluster.down()
    except (HarnessError, DemoFailed, AssertionError) as err:
        print(f"\nFAILED: {err}", file=sys.stderr)
        return 1
    say("All of it was checked.")
    return 0


def tell(cluster: clusters.Cluster) -> None:
    """The story."""
    say(f"A cluster comes up ({cluster.name}).")
    cluster.up()
    say("The images are built from the Dockerfile, and brought to the nodes.")
    cluster.build_and_load()
    kube = Kube(cluster.kubectl, cluster.kubeconfig, TEAM)
    release = Release(Path(shutil.which("helm") or binaries.program("helm")), Kube(*_at(kube), NAMESPACE))
    say("$ helm install pillion charts/pillion -n pillion-system --create-namespace")
    with progress.step("installing the chart"):
        release.install()
    kube.run("create", "namespace", TEAM)
    folder = cluster.volume(TEAM)
    kube.apply(*jobs.claim(TEAM, folder))
    say("$ kubectl apply -f examples/cluster/policy.yaml -f examples/cluster/job.yaml")
    kube.apply(*documents("policy.yaml"), *documents("job.yaml"))
    kube.until(lambda: len(_running(kube)) == 2, Deadline.POD_STARTED, "two pods that run")
    show(kube, "get", "pods", "-o", "wide")

    kube.until(lambda: last_step(kube, 0) > 60, Deadline.TRAINED, "60 steps")
    show(kube, "get", "checkpoints")
    crash(kube)
    delete(kube)

    kube.until(lambda: condition(kube.get("job", "charlm"), "Complete"), Deadline.TRAINED, "the Job to complete")
    for pod in kube.pods("charlm"):
        status = container_status(pod, "trainer")["state"]["terminated"]["exitCode"]
        check(status == 0, f"{pod['metadata']['name']} ended with the trainer's status, {status}")
    show(kube, "get", "job", "charlm")
    show(kube, "get", "checkpoints", "-o", "wide")
    show(kube, "describe", "checkpointpolicy", "llm")
    warned = kube.warnings()
    check(not warned, f"a killed trainer and a deleted pod made no Warning{''.join(f': {each}' for each in warned)}")
    check((folder / "charlm" / "step-200" / ".metadata").exists(), "the last step is on the shared volume")


def crash(kube: Kube) -> None:
    """Kill a trainer, and see that both resume from memory, with the same losses."""
    before = losses(kube, 0)
    say("One trainer is killed.")
    say("$ kubectl exec charlm-1-... -c trainer -- kill -KILL <trainer>")
    kube.exec(_name(kube, 1), "trainer", "python", "-c", KILL)
    loaded = kube.until(lambda: lines(kube, 0, "loaded"), Deadline.RECOVERED, "the trainers to load")
    killed_at = max(before)
    check(loaded[-1]["tier"] == "arena", f"it resumed from the arena, at step {loaded[-1]['step']}")
    check(loaded[-1]["step"] >= killed_at - 15, f"no more than some steps before step {killed_at} were lost")
    kube.until(lambda: last_step(kube, 0) > killed_at + 5, Deadline.TRAINED, "training to go on")
    check(_repeats_are_equal(kube), "steps that were trained twice had the same loss, bit for bit")


def delete(kube: Kube) -> None:
    """Delete a pod, and see that its replacement resumes from storage."""
    old = _name(kube, 1)
    say(f"$ kubectl delete pod {old}")
    kube.delete("pod", old)
    kube.until(lambda: _name(kube, 1) != old, Deadline.POD_GONE, "a replacement")

    def loaded() -> list[Json]:
        found = lines(kube, 0, "loaded")
        # None: the container of the other pod has started again, and its log with it.
        assert found
        assert found[-1]["tier"] == "storage"
        return found

    found = kube.until(loaded, Deadline.RECOVERED, "the job to load again")
    check(found[-1]["tier"] == "storage", f"it resumed from storage, at step {found[-1]['step']}")


def lines(kube: Kube, index: int, event: str) -> list[Json]:
    """What the trainer of rank 0 reported, of one kind; over the restarts of its container."""
    text = kube.logs(_name(kube, index), "trainer")
    found = [json.loads(each) for each in text.splitlines() if each.startswith('{"event"')]
    return [each for each in found if each["event"] == event]


def losses(kube: Kube, index: int) -> dict[int, list[float]]:
    """By step: the losses that rank 0 printed, more than one where the step was trained again."""
    found: dict[int, list[float]] = {}
    for line in kube.logs(_name(kube, index), "trainer").splitlines():
        if line.startswith('{"step"'):
            entry = json.loads(line)
            found.setdefault(entry["step"], []).append(entry["loss"])
    return found


def last_step(kube: Kube, index: int) -> int:
    """The newest step."""
    return max(losses(kube, index), default=0)


def _repeats_are_equal(kube: Kube) -> bool:
    again = [each for each in losses(kube, 0).values() if len(each) > 1]
    return bool(again) and all(len(set(each)) == 1 for each in again)


def documents(name: str) -> list[Json]:
    """An example's objects, with the image that the harness has built."""
    text = (EXAMPLES / name).read_text().replace("pillion-sidecar:0.1.0", jobs.IMAGE)
    return list(yaml.safe_load_all(text))


def _name(kube: Kube, index: int) -> str:
    found = [
        pod["metadata"]["name"]
        for pod in kube.pods("charlm")
        if pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == str(index)
    ]
    assert found, f"no pod of index {index}"
    return str(found[-1])


def _running(kube: Kube) -> list[Json]:
    return [pod for pod in kube.pods("charlm") if "running" in container_status(pod, "trainer").get("state", {})]


def _at(kube: Kube) -> tuple[Path, Path]:
    return kube.kubectl, kube.kubeconfig


def check(holds: bool, what: str) -> None:
    """
    Say what was checked.

    Raises:
        DemoFailed: it does not hold.
    """
    if not holds:
        raise DemoFailed(what)
    print(f"{_clock()}   checked: {what}", flush=True)


def show(kube: Kube, *arguments: str) -> None:
    """Run kubectl, and print command and answer."""
    say(f"$ kubectl {' '.join(arguments)}")
    print(kube.run(*arguments), flush=True)


def say(text: str) -> None:
    print(f"{_clock()} {text}", flush=True)


def _clock() -> str:
    elapsed = int(time.monotonic() - _BEGUN)
    return f"{elapsed // 60:02d}:{elapsed % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
