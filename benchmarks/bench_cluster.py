"""
The control plane on a real cluster: webhook, controller, the way of a change to a job, and what injection adds to a pod's start.

    make bench-cluster ARGS="[--keep] [--only start,change,memory,webhook,burst,plain] [--json FILE]"

Called from: people. The cluster is the harness's own (`built`), made and taken down here; --keep uses one that is up and leaves it.
The exit status is 0 whether goals are met or not, and 1 when a part could not be measured. Must never: leave pods, nodes or namespaces behind.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import bench_crowd
from bench_crowd import POLICY, PREFIX
from cluster_load import Bench, Json, Sender, Wanted, say, until
from measures import Line, median_line

from cluster.harness import binaries
from cluster.harness.built import Built
from cluster.harness.machine import HarnessError
from pillion_operator.cluster.client import ApiError, Client, Unreachable
from pillion_operator.injection import annotations
from support import jobs
from support.deadlines import Deadline
from support.kube import Kube, condition
from support.release import NAMESPACE, Release

FAILURES: Final = (HarnessError, AssertionError, TimeoutError, OSError, ApiError, Unreachable)
"""What can go wrong with a cluster; anything else is a defect here."""
RARELY: Final = {"periodSteps": 1000000, "snapshotSteps": 5}
"""No save by itself."""
OFTEN: Final = {"periodSteps": 4, "snapshotSteps": 2}
"""A save every 0.4 s: a change shows within it."""
QUIET_STEPS: Final = 40
"""Without a save, by which the policy before the change is seen to hold again."""
REPORT_S: Final = 3.0
"""Between two reports of a job: what is asked for is asked anywhere in it."""
TRAINER: Final = ("/bin/sh", "-c", "date +%s.%N; exec sleep 1")
"""Says when it runs, by the clock that we read too."""
LEFT_OUT: Final = """\
What this leaves out: everything (etcd, API server, both nodes, the operator, kwok, and what makes the load) shares this machine's
cores, so a time here is the work and the wait for a core. Pods on fake nodes run nothing: no image, no sidecar, no storage; they name
their nodes, so no scheduler. One API server, without fsync in etcd. `change` and `start` use real pods, on a cluster that is otherwise idle, one job at a time.
The API server's histogram has edges at 5, 25, 100 and 500 ms: a quantile in between is interpolated."""


# --- real jobs ---------------------------------------------------------------------------------------------------


async def start(bench: Bench) -> list[Line]:
    """The same pod, injected and not, in turn: from its creation to its trainer."""
    kube = bench.kube
    kube.apply(jobs.policy(POLICY))
    # The first finds nothing in the page cache.
    await _start_s(bench, "start-first", True)
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(bench.wanted.repeat):
        for opts_in in (False, True) if number % 2 else (True, False):
            found[opts_in].append(await _start_s(bench, f"start-{number}-{'in' if opts_in else 'out'}", opts_in))
    added = [mine - other for mine, other in zip(found[True], found[False], strict=True)]
    return [
        median_line("added pod start time, image present", added, unit="s", goal=2.0),
        median_line("create until the trainer runs, injected", found[True], unit="s"),
        median_line("create until the trainer runs, not injected", found[False], unit="s"),
    ]


async def _start_s(bench: Bench, name: str, opts_in: bool) -> float:
    template = jobs.job(container={"command": list(TRAINER)})[-1]["spec"]["template"]
    notes = {annotations.POLICY: POLICY} if opts_in else {}
    pod = {"metadata": {"name": name, "annotations": notes}, "spec": template["spec"] | {"restartPolicy": "Never"}}
    path = f"/api/v1/namespaces/{bench.kube.namespace}/pods"
    begun_s = time.time()
    await bench.client.create(path, pod)

    async def has_ended() -> bool:
        status: Json = (await bench.client.get(f"{path}/{name}"))["status"]
        return bool(status.get("phase") == "Succeeded")

    await until(has_ended, f"the pod {name} to end", Deadline.POD_STARTED.s)
    runs_s = float(bench.kube.logs(name, jobs.CONTAINER).strip())
    bench.kube.delete("pod", name)
    return runs_s - begun_s


async def change(bench: Bench) -> list[Line]:
    """From the answer to a change of a policy, or to a request for a save, to what a running job has made of it."""
    kube = bench.kube
    kube.apply(jobs.policy(POLICY, trigger=RARELY))
    kube.create(*jobs.job(env={"STEPS": "1000000"}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "step"), Deadline.TRAINED, "steps")
    pod = kube.pod_name("train")
    saved, told, policies = [], [], []
    for number in range(bench.wanted.repeat):
        # Anywhere between two reports.
        await asyncio.sleep(random.uniform(0, REPORT_S))
        asked_s, ready_s = await _save_now(bench, f"now-{number}")
        told.append(ready_s - asked_s)
        saved.append(await _committed_since(kube, pod, asked_s) - asked_s)
    for _ in range(bench.wanted.repeat):
        await asyncio.sleep(random.uniform(0, REPORT_S))
        kube.patch("checkpointpolicy", POLICY, {"spec": {"trigger": OFTEN}})
        asked_s = time.time()
        policies.append(await _committed_since(kube, pod, asked_s) - asked_s)
        kube.patch("checkpointpolicy", POLICY, {"spec": {"trigger": RARELY}})

        async def is_quiet() -> bool:
            return jobs.last(kube, pod, "step") > jobs.last(kube, pod, "committed") + QUIET_STEPS

        await until(is_quiet, "no more saves", Deadline.TRAINED.s)
    kube.delete("job", "train")
    goal = {"unit": "s", "goal": 5.0}
    return [
        _most("save-now: asked until the trainer's save is committed", saved, **goal),
        _most("save-now: asked until Ready=True", told, **goal),
        _most("policy change: until the first save by the new period", policies, unit="s", goal=10.0),
    ]


def _most(what: str, samples: list[float], **more: Any) -> Line:
    note = f"median {statistics.median(samples):.2f}"
    return Line(what=f"{what} (longest)", measured=max(samples), samples=tuple(samples), note=note, **more)


async def _save_now(bench: Bench, name: str) -> tuple[float, float]:
    """When it was asked, and when its object was seen to be Ready."""
    path = f"/apis/pillion.dev/v1alpha1/namespaces/{bench.kube.namespace}/checkpoints"
    head = {"apiVersion": "pillion.dev/v1alpha1", "kind": "Checkpoint", "metadata": {"name": name}}
    made = await bench.client.create(path, head | {"spec": {"jobID": "train"}})
    asked_s = time.time()
    version = made["metadata"]["resourceVersion"]
    async with asyncio.timeout(Deadline.COMMITTED.s):
        async with contextlib.aclosing(
            bench.client.watch(path, resource_version=version, field_selector=f"metadata.name={name}")
        ) as events:
            async for event in events:
                if condition(event.object, "Ready").get("status") == "True":
                    return asked_s, time.time()
    raise TimeoutError(f"the watch ended before the Checkpoint {name} was Ready")


async def _committed_since(kube: Kube, pod: str, since_s: float) -> float:
    """When the trainer saw its first commit since then, by its own log."""

    def found() -> list[float]:
        # A save takes a moment: what was committed at once had been asked for before.
        return [float(line["time"]) for line in jobs.said(kube, pod, "committed") if line["time"] > since_s]

    async def is_there() -> bool:
        return bool(found())

    await until(is_there, "a commit", Deadline.TRAINED.s)
    return found()[0]


# --- the whole ---------------------------------------------------------------------------------------------------

WITH_JOBS: Final[dict[str, Callable[[Bench], Awaitable[list[Line]]]]] = {"start": start, "change": change}
WITH_CROWD: Final[dict[str, Callable[[Bench, bench_crowd.Filled], Awaitable[list[Line]]]]] = {
    "memory": bench_crowd.memory,
    "webhook": bench_crowd.webhook,
    "burst": bench_crowd.burst,
    "plain": bench_crowd.plain,
}


class Results:
    """What was measured so far, also when a part fails; then the others still run."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.failed: list[str] = []

    async def take(self, name: str, part: Awaitable[list[Line]]) -> None:
        """Run a part, and print what it found."""
        try:
            lines = await part
        except FAILURES as err:
            self.failed.append(name)
            say(f"{name} FAILED: {type(err).__name__}: {err}")
            return
        say(f"{name}, load {os.getloadavg()[0]:.1f}")
        for line in lines:
            goal = "" if line.goal is None else f"{line.sense} {line.goal:g}"
            spread = f"{min(line.samples):.3f} to {max(line.samples):.3f}" if line.samples else ""
            text = f"  {line.what:66} {line.measured:9.3f} {line.unit:4} {goal:8} {line.verdict:7} {spread} {line.note}"
            print(text.rstrip(), flush=True)
        self.lines += lines


async def measure(cluster: Built, wanted: Wanted, only: list[str], results: Results) -> None:
    """The parts that are wanted, on a cluster with the product."""
    kube = Kube(cluster.kubectl, cluster.kubeconfig, f"{PREFIX}-{os.getpid()}")
    async with await Client.connect(str(cluster.kubeconfig)) as client, Sender.connect(client) as sender:
        bench = Bench(cluster=cluster, kube=kube, client=client, sender=sender, wanted=wanted)
        real = {name: part for name, part in WITH_JOBS.items() if name in only}
        if real:
            with _real_jobs(bench):
                for name, part in real.items():
                    await results.take(name, part(bench))
        crowded = {name: part for name, part in WITH_CROWD.items() if name in only}
        if crowded:
            async with bench_crowd.filled(bench) as of:
                for name, each in crowded.items():
                    await results.take(name, each(bench, of))


@contextlib.contextmanager
def _real_jobs(bench: Bench) -> Iterator[None]:
    """A namespace for pods that run, with a volume."""
    kube, cluster = bench.kube, bench.cluster
    folder = cluster.volume(kube.namespace)
    volume, claim = jobs.claim(kube.namespace, folder)
    kube.run("create", "namespace", kube.namespace)
    try:
        kube.apply(volume, claim, jobs.script())
        kube.until(lambda: kube.get("serviceaccount", "default"), Deadline.API, "the service account")
        kube.until(lambda: (kube.get("pvc", jobs.CLAIM) or {})["status"]["phase"] == "Bound", Deadline.API, "the claim")
        yield
    finally:
        kube.run("delete", "jobs,pods", "--all", "--force", "--grace-period=0", "--wait=false")
        kube.run("delete", "namespace", kube.namespace, "--wait=false")
        kube.delete("persistentvolume", volume["metadata"]["name"])
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parts = [*WITH_JOBS, *WITH_CROWD]
    parser = argparse.ArgumentParser(prog="make bench-cluster", description="Measure the control plane on a cluster.")
    parser.add_argument("--keep", action="store_true", help="use the cluster that is up, and leave it up")
    parser.add_argument("--installed", action="store_true", help="measure what is up and installed; leave both")
    parser.add_argument("--only", default=",".join(parts), help=f"of {', '.join(parts)}")
    parser.add_argument("--json", type=argparse.FileType("w", encoding="utf-8"), help="write every sample here")
    for name, default, text in (
        ("pods", 5000, "injected pods that exist"),
        ("jobs", 500, "jobs that report"),
        ("rate", 100, "pods a second"),
        ("seconds", 30, "at that rate"),
        ("burst", 1000, "pods at once"),
        ("plain", 200, "pods that do not opt in"),
        ("steady", 150, "seconds in which memory is watched"),
        ("repeat", 5, "samples of what is done one by one"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; {default}")
    given = parser.parse_args()
    only = given.only.split(",")
    if unknown := set(only) - set(parts):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    wanted = Wanted(**{each.name: getattr(given, each.name) for each in dataclasses.fields(Wanted)})
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    facts |= {"parts": given.only} | asdict(wanted)
    print("; ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    cluster, results = Built(), Results()
    try:
        with _up(cluster, keep=given.keep, there=given.installed), _installed(cluster, leave=given.installed):
            asyncio.run(measure(cluster, wanted, only, results))
    except FAILURES as err:
        results.failed.append("the cluster")
        say(f"FAILED: {type(err).__name__}: {err}")
    print(f"\n{LEFT_OUT}")
    if given.json is not None:
        rows = [asdict(line) | {"verdict": line.verdict} for line in results.lines]
        given.json.write(json.dumps({"facts": facts, "lines": rows}, indent=1) + "\n")
        given.json.close()
    verdicts = [line.verdict for line in results.lines]
    print(f"\n{verdicts.count('met')} goals met, {verdicts.count('MISSED')} missed; {len(results.failed)} parts failed")
    return 1 if results.failed else 0


@contextlib.contextmanager
def _up(cluster: Built, *, keep: bool, there: bool) -> Iterator[None]:
    if there and not cluster.is_up():
        raise HarnessError("no cluster is up")
    if not there and not (keep and cluster.is_up()):
        say("the cluster comes up")
        cluster.up()
    try:
        yield
    finally:
        if not (keep or there):
            cluster.down()


@contextlib.contextmanager
def _installed(cluster: Built, *, leave: bool) -> Iterator[None]:
    if leave:
        yield
        return
    say("images and chart")
    cluster.build_and_load()
    release = Release(
        Path(shutil.which("helm") or binaries.program("helm")), Kube(cluster.kubectl, cluster.kubeconfig, NAMESPACE)
    )
    try:
        release.install()
        yield
    finally:
        release.uninstall()


if __name__ == "__main__":
    sys.exit(main())
