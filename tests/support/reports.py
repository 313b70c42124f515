"""
The whole of: reports, jobs and Checkpoint objects for tests: sensible in every field, and other where a test says so.

Called from: the tests of call-home and controller.
Must never: read a clock; `NOW_S` is now.
"""

import base64
import dataclasses
import json
from typing import Any, Final

from pillion.wire import home
from pillion_operator.controller import checkpoints
from pillion_operator.home import times
from pillion_operator.home.registry import Job, Registry
from pillion_operator.injection import annotations, status

Json = dict[str, Any]

NOW_S: Final = 1_800_000_000.0
NAMESPACE: Final = "team-a"
POLICY: Final = "llm"
JOB: Final = "run"
AUDIENCE: Final = "pillion.dev"


def at(seconds: float) -> str:
    """A time so many seconds from now, as text."""
    return times.text(NOW_S + seconds)


def stored(step: int, **changes: Any) -> home.CommittedCheckpoint:
    """A checkpoint on storage; its save took a second, `step` seconds after an hour ago."""
    begun_s = step - 3600.0
    made = home.CommittedCheckpoint(
        step=step,
        path=f"{JOB}/step-{step}",
        size_bytes=2**30,
        world_size=8,
        started=at(begun_s),
        completed=at(begun_s + 1),
    )
    return dataclasses.replace(made, **changes)


def report(*steps: int, **changes: Any) -> home.Report:
    """A report of a job that has these checkpoints on storage."""
    kept = tuple(stored(step) for step in sorted(steps, reverse=True))
    made = home.Report(
        namespace=NAMESPACE,
        pod=f"{JOB}-0",
        pod_uid="pod-uid-0",
        policy=POLICY,
        job_kind="Job",
        job_name=JOB,
        job_id=JOB,
        session="a" * 32,
        num_pods=1,
        committed_step=kept[0].step if kept else -1,
        committed_time=kept[0].completed if kept else "",
        checkpoints=kept,
        listed=True,
    )
    return dataclasses.replace(made, **changes)


def job(*steps: int, **changes: Any) -> Job:
    """A job whose newest report is `report`."""
    made = report(*steps, **changes)
    return Registry().receive(made, created=at(-7200), now_s=0.0).job


def request(name: str = "now", **changes: Any) -> checkpoints.Checkpoint:
    """A Checkpoint object that a user made a moment ago."""
    made = checkpoints.Checkpoint(
        namespace=NAMESPACE,
        name=name,
        uid=f"uid-{name}",
        created=at(-1),
        job_id=JOB,
        trigger=checkpoints.ON_DEMAND,
        is_ours=False,
        status=checkpoints.Status(),
    )
    return dataclasses.replace(made, **changes)


def pod(name: str = f"{JOB}-0", **changes: Any) -> Json:
    """An injected pod as the API server gives its metadata; `changes` are of the metadata."""
    what = status.Status(
        policy=POLICY,
        policy_uid="policy-uid",
        policy_generation=1,
        job_kind="Job",
        job_name=JOB,
        job_id=JOB,
        image="example/pillion-sidecar:1",
        containers=("trainer",),
        before=status.Before(),
    )
    metadata = {
        "namespace": NAMESPACE,
        "name": name,
        "uid": f"pod-uid-{name.rsplit('-', 1)[-1]}",
        "creationTimestamp": at(-7200),
        "labels": {annotations.INJECTED: "true"},
        "annotations": {annotations.STATUS: status.dump(what)},
        "ownerReferences": [
            {"apiVersion": "batch/v1", "kind": "Job", "name": JOB, "uid": "job-uid", "controller": True}
        ],
    }
    return {"metadata": metadata | changes}


def token(
    audience: str = AUDIENCE,
    *,
    end_s: float = NOW_S + 3600,
    name: str = "",
    pod: str = f"{JOB}-0",
    uid: str = "pod-uid-0",
    namespace: str = NAMESPACE,
) -> str:
    """Return a text in the form of a service account's token that is bound to a pod. Each `name` gives another token."""
    bound = {"namespace": namespace, "pod": {"name": pod, "uid": uid}}
    claims = json.dumps({"aud": [audience], "exp": end_s, "name": name, "kubernetes.io": bound}).encode()
    return f"e30.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.signature"


def review(
    *, pod: str = f"{JOB}-0", uid: str = "pod-uid-0", namespace: str = NAMESPACE, audience: str = AUDIENCE
) -> Json:
    """A TokenReview that says whose token it is."""
    prefix = "authentication.kubernetes.io/"
    extra = {f"{prefix}pod-name": [pod], f"{prefix}pod-uid": [uid]}
    user = {"username": f"system:serviceaccount:{namespace}:default", "extra": extra}
    return {"status": {"authenticated": True, "audiences": [audience], "user": user}}
