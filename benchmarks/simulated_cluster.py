"""
A whole controller process whose API server is simulated: pods, policies, checkpoints and tokens are made up in memory.

    python simulated_cluster.py JOBS PODS CHECKPOINTS

Called from: bench_controller.py, which sends the reports. Prints a line of JSON once it leads: port and certificate authority. Ends with its
standard input. Everything of the controller is real but the API server and kopf's connection to it; kopf is imported, as its
memory counts.
"""

import asyncio
import base64
import json
import sys
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import kopf

from pillion_operator import listener
from pillion_operator.certificates import issue
from pillion_operator.cluster import client, paths
from pillion_operator.controller import app, checkpoints, mirror, policies
from pillion_operator.injection import annotations, status
from pillion_operator.settings import CertificateMode, Settings

Json = dict[str, Any]

NAMESPACE = "team-a"
POLICY = "llm"
AUDIENCE = "pillion.dev"
HOME = "pillion-home.pillion-system.svc"
SPEC: Json = {
    "trigger": {"periodSteps": 200},
    "staging": {"sizeLimit": "96Gi"},
    "storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}},
}
STEP = 100
"""Training steps between the checkpoints of a job."""


def job_id(job: int) -> str:
    return f"llm-pretraining-{job:04d}"


def pod_name(job: int, index: int) -> str:
    return f"{job_id(job)}-{index}-x7k2p"


def pod_uid(job: int, index: int) -> str:
    return f"00000000-0000-4000-8000-{job:06d}{index:06d}"


def token(job: int) -> str:
    """Looks like a service account's token of the job's first pod; only our simulated API server takes it."""
    bound = {"namespace": NAMESPACE, "pod": {"name": pod_name(job, 0), "uid": pod_uid(job, 0)}}
    claims = {"aud": [AUDIENCE], "exp": 4102444800, "job": job, "kubernetes.io": bound}
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"e30.{body}.{'s' * 342}"


class SimulatedApi:
    """What the controller asks of `cluster.client.Client`, in memory."""

    def __init__(self, num_jobs: int, num_pods: int, num_checkpoints: int) -> None:
        self._num_jobs, self._num_pods, self._num_checkpoints = num_jobs, num_pods, num_checkpoints
        self._fresh: dict[str, Json] = {}
        self._made = 0
        now = datetime.now(UTC)
        authority = issue.make_authority(now)
        leaf = issue.make_leaf(authority, (HOME,), now)
        self.authority = authority.certificate
        data = {"tls.crt": leaf.chain, "tls.key": leaf.key, "ca.crt": authority.certificate}
        self._secret = {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}

    async def get(self, path: str, **_: Any) -> Json:
        raise client.NotFound(404, "NotFound", path)

    async def pages(self, path: str, **_: Any) -> AsyncGenerator[Json]:
        items = self._items(path)
        for begin in range(0, max(len(items), 1), client.PAGE_SIZE):
            # Through text, as from a server, so that decoding and its garbage are part of what is measured.
            page = json.dumps([make() for make in items[begin : begin + client.PAGE_SIZE]])
            yield {"metadata": {"resourceVersion": "1"}, "items": json.loads(page)}

    async def watch(self, path: str, **_: Any) -> AsyncGenerator[client.WatchEvent]:
        await asyncio.Event().wait()
        yield client.WatchEvent("BOOKMARK", {})

    async def create(self, path: str, body: Json, **_: Any) -> Json:
        if path.endswith("/tokenreviews"):
            return self._review(body["spec"]["token"])
        self._made += 1
        metadata = dict(body["metadata"]) | {"uid": f"uid-{self._made}", "creationTimestamp": "2026-11-24T00:00:00Z"}
        made = body | {"metadata": metadata}
        if path.endswith("/checkpoints"):
            self._fresh[f"{path}/{metadata['name']}"] = made
        return made

    async def replace(self, path: str, body: Json, **_: Any) -> Json:
        return body

    async def patch(self, path: str, body: Json, **_: Any) -> Json:
        status_now = {"status": body.get("status") or {}}
        if "/checkpointpolicies/" in path:
            return policy_object() | status_now
        # An object gets its status right after it was made. It is not kept: this process's memory is what is measured.
        found = self._fresh.pop(path, None) or {"metadata": {"name": path.rsplit("/", 1)[1], "namespace": NAMESPACE}}
        return found | status_now

    async def delete(self, *_: Any, **__: Any) -> Json:
        return {}

    def _items(self, path: str) -> list[Callable[[], Json]]:
        if path == paths.PODS.everywhere:
            per_job = self._num_pods // self._num_jobs
            return [partial(_pod, j, i) for j in range(self._num_jobs) for i in range(per_job)]
        if path == paths.CHECKPOINTS.everywhere:
            steps = range(STEP, (self._num_checkpoints + 1) * STEP, STEP)
            return [partial(_checkpoint, j, s) for j in range(self._num_jobs) for s in steps]
        if path.endswith("/secrets"):
            return [lambda: {"metadata": {"name": "pillion-tls", "namespace": "pillion-system"}, "data": self._secret}]
        return []

    def _review(self, given: str) -> Json:
        payload = given.split(".")[1]
        job = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["job"]
        prefix = "authentication.kubernetes.io/"
        extra = {f"{prefix}pod-name": [pod_name(job, 0)], f"{prefix}pod-uid": [pod_uid(job, 0)]}
        user = {"username": f"system:serviceaccount:{NAMESPACE}:default", "extra": extra}
        return {"status": {"authenticated": True, "audiences": [AUDIENCE], "user": user}}


def policy_object() -> Json:
    metadata = {"name": POLICY, "namespace": NAMESPACE, "uid": "policy", "generation": 1, "resourceVersion": "1"}
    return {"apiVersion": "pillion.dev/v1alpha1", "kind": "CheckpointPolicy", "metadata": metadata, "spec": SPEC}


def _pod(job: int, index: int) -> Json:
    name = job_id(job)
    what = status.Status(
        policy=POLICY,
        policy_uid="policy",
        policy_generation=1,
        job_kind="Job",
        job_name=name,
        job_id=name,
        image="registry.example/pillion-sidecar:0.1.0",
        containers=("trainer",),
        before=status.Before(grace_s=30, grace_set_s=330),
    )
    fields: Json = {f"f:field-{number}": {} for number in range(60)}
    return {
        "metadata": {
            "name": pod_name(job, index),
            "namespace": NAMESPACE,
            "uid": pod_uid(job, index),
            "creationTimestamp": "2026-11-24T00:00:00Z",
            "labels": {annotations.INJECTED: "true", "batch.kubernetes.io/job-name": name},
            "annotations": {annotations.POLICY: POLICY, annotations.STATUS: status.dump(what)},
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": f"job-{job}", "controller": True}
            ],
            # What an API server adds to every object, and what most of its bytes are.
            "managedFields": [{"manager": "kube-controller-manager", "fieldsV1": {"f:spec": fields}}],
        }
    }


def _checkpoint(job: int, step: int) -> Json:
    name = mirror.object_name(job_id(job), step)
    condition = {
        "type": "Ready",
        "status": "True",
        "reason": mirror.COMMITTED,
        "message": mirror.COMMITTED_TEXT,
        "lastTransitionTime": "2026-11-24T00:00:00Z",
    }
    return {
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": f"{job}-{step}-0000-4000-8000-000000000000",
            "creationTimestamp": "2026-11-24T00:00:00Z",
            "labels": {checkpoints.MIRROR_LABEL: checkpoints.mark(NAMESPACE, name, job_id(job))},
        },
        "spec": {"jobID": job_id(job), "trigger": "Periodic"},
        "status": {
            "policy": POLICY,
            "step": step,
            "path": f"{job_id(job)}/step-{step}",
            "size": "12Gi",
            "worldSize": 64,
            "startTime": "2026-11-24T00:00:00Z",
            "completionTime": "2026-11-24T00:00:00Z",
            "conditions": [condition],
        },
    }


class _Watcher:
    """In the place of kopf's connection."""

    def __init__(self, known: policies.Policies) -> None:
        self._known = known

    async def relist(self) -> None:
        self._known.put(policies.project(policy_object()))

    async def run(self, _: object) -> None:
        await asyncio.Event().wait()


async def serve(num_jobs: int, num_pods: int, num_checkpoints: int) -> None:
    listener.limit_tls_memory()
    api: Any = SimulatedApi(num_jobs, num_pods, num_checkpoints)
    settings = Settings(
        namespace="pillion-system",
        pod_name="controller",
        pod_ip="192.0.2.1",
        listen_address="127.0.0.1",
        home_port=0,
        health_port=0,
        certificate_mode=CertificateMode.PROVIDED,
    )
    controller = app.Controller(api, settings)
    watcher: Any = _Watcher(controller.reconciler.policies)
    controller.watcher = watcher
    stop = asyncio.Event()
    running = asyncio.create_task(controller.run(stop))
    while not controller.home_port or not controller.serving.ready:
        await asyncio.sleep(0.05)
    print(json.dumps({"port": controller.home_port, "authority": api.authority}), flush=True)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, sys.stdin.read)
    stop.set()
    await running


if __name__ == "__main__":
    assert kopf is not None
    asyncio.run(serve(*map(int, sys.argv[1:4])))
