"""
The parts of bench_cluster.py that need a crowd: thousands of injected pods on fake nodes, and hundreds of jobs that report.

Called from: bench_cluster.py, on a cluster with the product. Each part makes its pods in a namespace of its own, and removes them.
Must never: measure while the crowd is still being made, or call a time good that another replica's start is in.
"""

import asyncio
import base64
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import bench_controller
import cluster_load
import cluster_reports
import processors
from cluster_load import Bench, Crowd, Json, Made, Scrape, at, quantile, say, until, within
from measures import Line

from cluster.harness.built import CONTROL, Built
from cluster.harness.machine import HarnessError
from pillion_operator.injection import status
from support import jobs
from support.kube import condition
from support.release import NAMESPACE

POLICY: Final = "llm"
PREFIX: Final = "pillion-bench"
AUDIENCE: Final = "pillion.dev"
TOKEN_S: Final = 3600
"""Of the reporters' tokens; longer than any run."""
TOKENS_AT_ONCE: Final = 16
REPORTERS_START_S: Final = 120.0
"""For all jobs to have been answered once."""
REPORTERS_END_S: Final = 30.0
"""For what they saw to be printed."""
SAMPLE_S: Final = 2.0
"""Between two looks at the controller's memory."""
ROUNDS: Final = 3
"""Pods that opt in and pods that do not are made in turn, so often."""
DURATION: Final = "apiserver_admission_webhook_admission_duration_seconds"
CALLS: Final = "apiserver_admission_webhook_request_total"
GOROUTINES: Final = "go_sched_latencies_seconds"
"""How long goroutines of the API server could run before they did."""
WEBHOOKS: Final = "the webhook"
OURS: Final = {"name": cluster_load.WEBHOOK}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """The crowd, and the pods in it that speak for their jobs."""

    crowd: Crowd
    namespace: str
    first: tuple[Made, ...]
    """Of each job."""


@contextlib.asynccontextmanager
async def filled(bench: Bench) -> AsyncIterator[Filled]:
    """So many injected pods on fake nodes."""
    wanted = bench.wanted
    num_nodes = max(1, -(-wanted.pods * 11 // 10 // cluster_load.PODS_A_NODE))
    crowd = Crowd(bench.cluster, bench.client, bench.sender, f"{PREFIX}-{os.getpid()}", num_nodes)
    try:
        await crowd.come()
        namespace = await crowd.namespace("jobs")
        await _policy(bench, namespace)
        pods = crowd.pods(namespace, wanted.pods, policy=POLICY, num_jobs=wanted.jobs)
        begun_s = time.monotonic()
        made = await bench.sender.make_all(pods, cluster_load.FILLERS)
        say(f"{len(made)} pods on {num_nodes} fake nodes, made in {time.monotonic() - begun_s:.0f} s")
        _all_injected(made)
        first = {each.pod["metadata"]["labels"][cluster_load.JOB_LABEL]: each for each in reversed(made)}
        yield Filled(crowd=crowd, namespace=namespace, first=tuple(first.values()))
    finally:
        await crowd.gone()


async def _policy(bench: Bench, namespace: str) -> None:
    path = f"/apis/pillion.dev/v1alpha1/namespaces/{namespace}/checkpointpolicies"
    await bench.client.create(path, jobs.policy(POLICY))


def _all_injected(made: list[Made]) -> None:
    bad = [each for each in made if not each.is_injected]
    if bad:
        raise HarnessError(f"{len(bad)} of {len(made)} pods are not injected; the first: {bad[0].status} {bad[0].pod}")


async def memory(bench: Bench, of: Filled) -> list[Line]:
    """The active controller while jobs report."""
    leader = await bench.leader()
    pid = process_of((await bench.operator_pods("controller"))[leader], "controller")
    names = {"namespace": of.namespace, "policy": POLICY}

    async def knows_all() -> bool:
        text = await bench.sender.text(f"/api/v1/namespaces/{NAMESPACE}/pods/{leader}:8080/proxy/metrics")
        number = Scrape.of(text).total("pillion_policy_injected_pods", **names)
        return number == bench.wanted.pods

    await until(knows_all, f"the controller to know {bench.wanted.pods} pods")
    before_mib = bench_controller.memory_mib(pid)
    given = await _reporters_input(bench, of)
    with _reporters(bench.cluster) as process:
        begun_s = time.monotonic()
        _tell(process, json.dumps(given))
        await _hear(process, REPORTERS_START_S)
        path = f"/apis/pillion.dev/v1alpha1/namespaces/{of.namespace}/checkpoints"
        number = len(of.first) * cluster_reports.CHECKPOINTS

        async def all_mirrored() -> bool:
            found: list[Json] = (await bench.client.list(path))["items"]
            return len([each for each in found if condition(each, "Ready").get("status") == "True"]) >= number

        await until(all_mirrored, f"{number} Checkpoint objects")
        mirrored_s = time.monotonic() - begun_s
        say(f"all {len(of.first)} jobs report; {number} Checkpoint objects after {mirrored_s:.0f} s")
        _tell(process, "measure")
        begun_s, used_s = time.monotonic(), bench_controller.cpu_s(pid)
        seen: list[tuple[float, float]] = []
        while (passed_s := time.monotonic() - begun_s) < bench.wanted.steady:
            seen.append((passed_s, bench_controller.memory_mib(pid)))
            await asyncio.sleep(SAMPLE_S)
        used_s = bench_controller.cpu_s(pid) - used_s
        _tell(process, "end")
        result = await _hear(process, REPORTERS_END_S)
    if await bench.leader() != leader:
        raise HarnessError("another replica leads by now; what was measured is of no use")
    sizes = [mib for _, mib in seen]
    tenth = max(1, len(sizes) // 10)
    first_mib, last_mib = statistics.median(sizes[:tenth]), statistics.median(sizes[-tenth:])
    slope = statistics.linear_regression([s / 60 for s, _ in seen], sizes).slope if len(seen) > 1 else 0.0
    latencies = result["latencies_s"]
    who = f"{bench.wanted.pods} pods, {len(of.first)} jobs"
    limits: dict[str, Any] = {"goal": bench_controller.GOAL_MIB, "unit": "MiB"}
    note = f"every {result['interval_s']:.1f} s each; refused {result['refused'] or 0}"
    return [
        Line(what=f"controller's memory, {bench.wanted.pods} pods, no job reports", measured=before_mib, unit="MiB"),
        Line(what=f"controller's memory, {who}, at the end", measured=last_mib, samples=tuple(sizes), **limits),
        Line(
            what=f"its growth over {passed_s:.0f} s",
            measured=(last_mib / first_mib - 1) * 100,
            unit="%",
            goal=bench_controller.GROWTH_GOAL_PERCENT,
            note=f"slope {slope:+.2f} MiB a minute",
        ),
        Line(what="its CPU", measured=used_s / passed_s * 100, unit="%", note="of a core"),
        Line(what="reports a second", measured=len(latencies) / passed_s, unit="/s", note=note),
        Line(what="report answered, median", measured=at(latencies, 0.5) * 1000, unit="ms"),
        Line(what="report answered, p99", measured=at(latencies, 0.99) * 1000, unit="ms"),
        Line(
            what=f"first report until {number} Checkpoint objects are Ready",
            measured=mirrored_s,
            unit="s",
            note=f"the jobs begin within {cluster_reports.RAMP_S:.0f} s",
        ),
    ]


async def _reporters_input(bench: Bench, of: Filled) -> Json:
    """Where to report, and a token for each job, bound to its pod, as the kubelet would ask for it."""
    path = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices/pillion-home"
    entry = await bench.client.get(path)
    secret = await bench.client.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/pillion-tls")
    slots = asyncio.Semaphore(TOKENS_AT_ONCE)

    async def one(made: Made) -> Json:
        metadata = made.pod["metadata"]
        what = status.read(made.pod)
        assert what is not None
        bound = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
        spec = {"audiences": [AUDIENCE], "expirationSeconds": TOKEN_S, "boundObjectRef": bound}
        async with slots:
            made_token = await bench.client.create(
                f"/api/v1/namespaces/{of.namespace}/serviceaccounts/default/token", {"spec": spec}
            )
        return {
            "namespace": of.namespace,
            "pod": metadata["name"],
            "pod_uid": metadata["uid"],
            "policy": what.policy,
            "kind": what.job_kind,
            "job": what.job_id,
            "token": made_token["status"]["token"],
        }

    return {
        "address": entry["endpoints"][0]["addresses"][0],
        "port": entry["ports"][0]["port"],
        "name": f"pillion-home.{NAMESPACE}.svc",
        "authority": base64.b64decode(secret["data"]["ca.crt"]).decode(),
        "jobs": await asyncio.gather(*(one(each) for each in of.first)),
    }


@contextlib.contextmanager
def _reporters(cluster: Built) -> Iterator[subprocess.Popen[str]]:
    """The program of the reporters, in the control machine's network; it is gone at the end."""
    where = f"/run/netns/{cluster.machines[CONTROL].namespace}"
    command = ["nsenter", f"--net={where}", sys.executable, str(Path(cluster_reports.__file__))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


async def _hear(process: subprocess.Popen[str], limit_s: float) -> Json:
    """Its next line. A thread that waits in vain is freed when the program ends."""
    assert process.stdout is not None
    line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), limit_s)
    if not line:
        raise HarnessError("the program of the reporters has ended")
    found: Json = json.loads(line)
    return found


def process_of(pod_uid: str, word: str) -> int:
    """The process of a pod whose command has that word; a container's control group is named after its pod."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_of_pod = folder.name.isdecimal() and pod_uid in (folder / "cgroup").read_text()
            if is_of_pod and word in (folder / "cmdline").read_text().split("\0"):
                return int(folder.name)
    raise HarnessError(f"no process of the pod {pod_uid} has {word!r} in its command")


# --- admission ---------------------------------------------------------------------------------------------------


async def webhook(bench: Bench, of: Filled) -> list[Line]:
    """Pods at a rate; in turn with pods that do not opt in."""
    wanted, crowd = bench.wanted, of.crowd
    namespace = await crowd.namespace("rate")
    await _policy(bench, namespace)
    number = wanted.rate * wanted.seconds // ROUNDS
    before, own_before = await bench.scrape(), await bench.scrape_pods("webhook")
    injected: list[Made] = []
    plain: list[Made] = []
    meter = processors.Meter(await _groups(bench))
    for _ in range(ROUNDS):
        with meter.counting():
            injected += await bench.sender.make_at_rate(crowd.pods(namespace, number, policy=POLICY), wanted.rate)
        plain += await bench.sender.make_at_rate(crowd.pods(namespace, number // 3), wanted.rate)
    counted = (await bench.scrape()).since(before)
    own = (await bench.scrape_pods("webhook")).since(own_before)
    await crowd.leave(namespace)
    _all_injected(injected)
    seen, mine = counted.buckets(DURATION, **OURS), own.buckets("pillion_admission_duration_seconds")
    waits = counted.buckets(GOROUTINES)
    our_share = meter.used[WEBHOOKS]
    theirs_s, ours_s = [each.seconds for each in plain], [each.seconds for each in injected]
    at_rate = f"{wanted.rate} pods/s, {wanted.pods} exist"
    note = f"{within(seen, 0.025):.2%} within 25 ms, {within(seen, 0.1):.2%} within 100 ms, of {seen[-1][1]:.0f}"
    return [
        Line(
            what=f"webhook p99, by the API server; {at_rate}",
            measured=quantile(seen, 0.99) * 1000,
            unit="ms",
            goal=50.0,
            note=note,
        ),
        Line(what="webhook p50, by the API server", measured=quantile(seen, 0.5) * 1000, unit="ms"),
        Line(
            what="webhook p99, by itself",
            measured=quantile(mine, 0.99) * 1000,
            unit="ms",
            note=f"{within(mine, 0.05):.2%} within 50 ms",
        ),
        Line(what="webhook p50, by itself", measured=quantile(mine, 0.5) * 1000, unit="ms"),
        Line(what="create of an injected pod, p99", measured=at(ours_s, 0.99) * 1000, unit="ms", samples=tuple(ours_s)),
        Line(
            what="create of a pod that did not opt in, p99",
            measured=at(theirs_s, 0.99) * 1000,
            unit="ms",
            samples=tuple(theirs_s),
        ),
        Line(what="create of an injected pod, median", measured=at(ours_s, 0.5) * 1000, unit="ms"),
        Line(what="create of a pod that did not opt in, median", measured=at(theirs_s, 0.5) * 1000, unit="ms"),
        Line(what="create, injected / not opted in, medians", measured=at(ours_s, 0.5) / at(theirs_s, 0.5)),
        Line(what="webhook calls an injected pod", measured=seen[-1][1] / len(injected)),
        Line(what="webhook's processor a call", measured=our_share.ran_s / len(injected) * 1000, unit="ms"),
        Line(what="its wait for a processor a call", measured=our_share.waited_s / len(injected) * 1000, unit="ms"),
        Line(what="connections that it accepted a call", measured=our_share.accepted / len(injected)),
        Line(
            what="API server's goroutines' wait for a processor, p99", measured=quantile(waits, 0.99) * 1000, unit="ms"
        ),
        *meter.lines(),
        Line(what="requests that were refused", measured=sum(each.status != 201 for each in injected + plain), goal=0),
    ]


async def _groups(bench: Bench) -> dict[str, list[int]]:
    """The processes that share the machine's processors, by what they are."""
    found = await bench.operator_pods("webhook")
    return {
        WEBHOOKS: [process_of(uid, "webhook") for uid in found.values()],
        "the API server": processors.pids_of("kube-apiserver"),
        "etcd": processors.pids_of("etcd"),
        "kwok": processors.pids_of("kwok"),
        "what makes the load": [os.getpid()],
    }


async def burst(bench: Bench, of: Filled) -> list[Line]:
    """Many pods at once."""
    namespace = await of.crowd.namespace("burst")
    await _policy(bench, namespace)
    number = bench.wanted.burst
    before = await bench.scrape()
    begun_s = time.perf_counter()
    made = await bench.sender.make_all(of.crowd.pods(namespace, number, policy=POLICY), cluster_load.MAX_MUTATING)
    passed_s = time.perf_counter() - begun_s
    counted = (await bench.scrape()).since(before)
    await of.crowd.leave(namespace)
    seen = counted.buckets(DURATION, **OURS)
    refused = [each for each in made if each.status != 201]
    times_s = [each.seconds for each in made]
    slowest = next(edge for edge, below in seen if below == seen[-1][1])
    many = f"burst of {number}, {cluster_load.MAX_MUTATING} in flight"
    return [
        Line(what=f"{many}: injected", measured=sum(each.is_injected for each in made), goal=number, sense=">="),
        Line(what=f"{many}: refused", measured=len(refused), goal=0, note=str(refused[0].pod)[:200] if refused else ""),
        Line(what=f"{many}: slowest create", measured=max(times_s), unit="s", goal=5.0, samples=tuple(times_s)),
        Line(what=f"{many}: slowest webhook call, at most", measured=slowest, unit="s", note="edge of the bucket"),
        Line(what=f"{many}: all made", measured=passed_s, unit="s"),
    ]


async def plain(bench: Bench, of: Filled) -> list[Line]:
    """Pods that did not opt in never reach us."""
    namespace = await of.crowd.namespace("plain")
    before = (await bench.scrape()).total(CALLS, **OURS)
    made = await bench.sender.make_all(of.crowd.pods(namespace, bench.wanted.plain), cluster_load.FILLERS)
    calls = (await bench.scrape()).total(CALLS, **OURS) - before
    await of.crowd.leave(namespace)
    refused = sum(each.status != 201 for each in made)
    return [
        Line(
            what=f"webhook calls for {len(made)} pods that did not opt in",
            measured=calls,
            goal=0,
            note=f"{refused} refused",
        )
    ]
