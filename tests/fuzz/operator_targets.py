"""
The whole of: what whoever can reach the operator's ports, or make objects in a namespace, can reach: admission, reports, tokens,
policies and the other objects.

Called from: `targets`.
Must never: ask an API server; read a clock.
"""

import asyncio
import base64
import contextlib
import dataclasses
import json
from typing import Any, Final

from fuzz.targets import Feed, Target
from pillion.errors import SettingsError
from pillion.wire import home, policy
from pillion_operator.cluster import client
from pillion_operator.controller import checkpoints, commands, conditions, mirror, policies
from pillion_operator.home import authenticate, injected, registry, times
from pillion_operator.home.refusal import Refused
from pillion_operator.injection import (
    annotations,
    checkpoint_policy,
    decide,
    identity,
    overrides,
    quantities,
    shape,
    sidecar_spec,
)
from pillion_operator.injection.reasons import Reason
from pillion_operator.settings import Settings
from pillion_operator.webhook import review
from pillion_sidecar import settings as sidecar_settings
from support import json_patch, reports

SETTINGS: Final = Settings(sidecar_image="example/pillion-sidecar:1", home_url="https://home", liveness="Exec")
SPEC: Final[dict[str, Any]] = {
    "trigger": {"periodSteps": 200, "periodSeconds": 600, "snapshotSteps": 10, "onTermination": "Save"},
    "staging": {"sizeLimit": "2Gi", "slots": 2, "overlap": "Wait", "memoryAccounting": "Sidecar"},
    "storage": {
        "persistentVolumeClaim": {"claimName": "checkpoints", "subPath": "runs/a"},
        "writer": {"name": "a.b:C", "arguments": {"x": [1, {"y": 2.5}], "z": None}},
    },
    "retention": {"keepLast": 3, "keepEverySteps": 5000},
    "restore": {"mode": "Step", "step": 5, "onMissing": "Fail"},
    "drain": {"timeoutSeconds": 300},
    "failurePolicy": "Fail",
    "suspend": False,
    "sidecar": {"resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "1.5Gi"}}},
}
BUCKET: Final[dict[str, Any]] = {
    "url": "s3://bucket/prefix",
    "endpoint": "https://minio:9000",
    "region": "eu-central-1",
    "requesterPays": True,
    "caBundle": {"configMap": "ca", "key": "ca.crt"},
    "credentials": {"awsRoleArn": "arn:aws:iam::123456789012:role/a"},
    "encryption": {"kmsKeyId": "alias/a"},
    "storageClass": "STANDARD",
    "objectSize": "128Mi",
    "parallelism": 4,
    "bandwidthLimit": "2Gi",
    "checksum": "Auto",
}
POLICY: Final[dict[str, Any]] = {
    "apiVersion": policy.API_VERSION, "kind": policy.KIND,
    "metadata": {"name": "llm", "namespace": "team-a", "uid": "u", "generation": 3, "resourceVersion": "9"},
    "spec": SPEC,
    "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
               "lastCheckpoint": {"jobID": "run", "step": 3, "time": "2026-01-01T00:00:00Z"}, "recoveryPointSeconds": 5},
}  # fmt: skip
POD: Final[dict[str, Any]] = {
    "apiVersion": "v1", "kind": "Pod",
    "metadata": {
        "name": "train-0", "generateName": "train-", "namespace": "team-a", "uid": "u",
        "labels": {"jobset.sigs.k8s.io/jobset-name": "set", "app": "x", "pod-template-hash": "abc"},
        "annotations": {
            "pillion.dev/policy": "llm", "pillion.dev/client": "Injected", "pillion.dev/containers": "trainer",
            "pillion.dev/job-id": "run.7", "pillion.dev/sidecar-cpu-limit": "3", "pillion.dev/staging-size-limit": "1Gi",
            "kubectl.kubernetes.io/default-container": "trainer", "pillion.dev/save-now": "1",
        },
        "ownerReferences": [
            {"apiVersion": "batch/v1", "kind": "Job", "name": "train", "uid": "2", "controller": True},
        ],
        "managedFields": [{"time": "2026-01-01T00:00:00Z", "fieldsV1": {"f:metadata": {"f:annotations": {}}}}],
    },
    "spec": {
        "containers": [
            {
                "name": "trainer", "image": "example/any:1", "command": ["torchrun"],
                "env": [{"name": "PYTHONPATH", "value": "/a"}, {"name": "A", "valueFrom": {"fieldRef": {}}}],
                "envFrom": [{"configMapRef": {"name": "c"}}], "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                "resources": {"limits": {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "1"}, "requests": {"cpu": "2"}},
                "securityContext": {"runAsUser": 1000, "runAsGroup": 1000},
            },
            {"name": "logger", "image": "example/log:1"},
        ],
        "initContainers": [
            {"name": "istio-proxy", "image": "m", "restartPolicy": "Always"},
            {"name": "pillion-sidecar", "env": [{"name": "R", "value": "v"}], "resources": {"limits": {"memory": "1Gi"}}},
        ],
        "volumes": [{"name": "data", "emptyDir": {}}],
        "terminationGracePeriodSeconds": 60, "hostNetwork": True, "os": {"name": "linux"},
        "resources": {"requests": {"cpu": "4", "memory": "16Gi"}}, "securityContext": {"runAsUser": 1000},
    },
}  # fmt: skip
CHECKPOINT: Final[dict[str, Any]] = {
    "apiVersion": policy.API_VERSION, "kind": checkpoints.KIND,
    "metadata": {"name": "now", "namespace": "team-a", "uid": "u", "labels": {checkpoints.MIRROR_LABEL: "x"},
                 "creationTimestamp": "2026-01-01T00:00:00Z"},
    "spec": {"jobID": "run", "trigger": "OnDemand"},
    "status": {"step": 3, "worldSize": 8, "path": "run/step-3", "size": "1Gi",
               "conditions": [{"type": "Ready", "status": "Unknown", "reason": "Requested"}]},
}  # fmt: skip
WORDS: Final = (
    *SPEC, *POD["metadata"], *POD["spec"], *POD["spec"]["containers"][0], *annotations.KNOWN, *sidecar_spec.VOLUMES,
    *sidecar_spec.TRAINER_ENV, "pillion-sidecar", "pillion-client", "claimName", "path", "arguments", "limits", "requests",
    "cpu", "memory", "fieldRef", "value", "kubernetes.io/config.mirror", "Windows", "windows", "trainer", "logger", "100m", "1e3",
    "2Gi", "spec", "status", "metadata", annotations.INJECTED,
)  # fmt: skip
MAX_OPERATIONS: Final = 1000
"""Of a patch that is applied again here."""
UNREADABLE: Final = (TypeError, AttributeError, KeyError, ValueError)
"""What `cluster.reflector` and the handlers take for an object that cannot be read, which is counted and logged. The API server gives
only objects that fit their schema; what is asked of others is that they cost no more than that."""


class NoDocument(ValueError):
    """The input is no JSON object: nothing comes to the code under test."""


def loaded(data: bytes) -> dict[str, Any]:
    """
    The object that an input is, as a client of the API server or a reader of YAML would hand it on.

    Raises:
        NoDocument.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise NoDocument from err
    if not isinstance(document, dict):
        raise NoDocument
    return document


def admission(**changes: Any) -> dict[str, Any]:
    """An AdmissionReview about the pod above."""
    request: dict[str, Any] = {
        "uid": "42", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": "CREATE", "namespace": "team-a",
        "object": POD, "dryRun": False,
    }  # fmt: skip
    return {"apiVersion": review.API_VERSION, "kind": "AdmissionReview", "request": request | changes}


def injected_pod() -> dict[str, Any]:
    """The pod above after its injection."""
    made = decide.inject(POD, checkpoint_policy.from_object(POLICY), SETTINGS)
    assert isinstance(made, decide.Inject), decide.message(made)
    return made.pod


def _statuses(_: contextlib.ExitStack) -> Feed:
    """The annotation of a pod that looks injected: whoever makes a pod can write it, and the API server checks nothing of it."""
    whole, found = injected_pod(), checkpoint_policy.from_object(POLICY)

    def feed(data: bytes) -> None:
        pod = json.loads(json.dumps(whole))
        pod["metadata"]["annotations"][annotations.STATUS] = data.decode("utf-8", "replace")
        decision = _decide(pod, found)
        if isinstance(decision, decide.Inject) and len(decision.patch) < MAX_OPERATIONS:
            assert json_patch.apply(pod, decision.patch) == decision.pod
        injected.project(pod)

    return feed


def _decide(pod: dict[str, Any], found: checkpoint_policy.CheckpointPolicy) -> decide.Decision:
    """As `webhook.server` decides; any other error than `NotAPod` would be caught there too, and is a finding here."""
    try:
        shape.require(pod)
    except shape.NotAPod as err:
        return decide.Deny(reason=Reason.INTERNAL_ERROR, details=(str(err),))
    before = json.dumps(pod)
    decision = decide.inject(pod, found, SETTINGS)
    assert json.dumps(pod) == before, "what is given is not changed"
    return decision


def _admission(_: contextlib.ExitStack) -> Feed:
    found = checkpoint_policy.from_object(POLICY)

    def feed(data: bytes) -> None:
        question = review.read(data)
        decision = None
        if question.pod is not None:
            decision = _decide(question.pod, found)
            # Our own application of a patch takes as many steps as there are operations, each.
            if isinstance(decision, decide.Inject) and len(decision.patch) < MAX_OPERATIONS:
                assert json_patch.apply(question.pod, decision.patch) == decision.pod
            review.about(question)
            decide.message(decision)
        answer = json.loads(review.answer(question, decision))
        assert answer["response"]["uid"] == question.uid

    return feed


MAX_VARIABLE_BYTES: Final = 128 * 1024
"""Longest variable of a process on Linux: MAX_ARG_STRLEN, execve(2)."""


def _policies(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        document = loaded(data)
        for embedded in (True, False):
            try:
                found = policy.parse(document, embedded=embedded)
            except policy.PolicyError as err:
                assert str(err)
                continue
            assert policy.parse(policy.dump(found), embedded=embedded) == found
        checkpoint_policy.from_object(document)
        # As a text a policy is the value of a variable. Reading more than that a second time is Python's time, not ours.
        sidecar_settings.read_policy(data.decode() if len(data) <= MAX_VARIABLE_BYTES else document)

    return feed


def _reports(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        report = home.decode_report(data)
        numbers = dataclasses.replace(report, metrics={})
        assert home.decode_report(home.encode(numbers)) == numbers
        known = registry.Registry()
        for second in (0.0, 5.0):
            received = known.receive(report, created="2026-01-01T00:00:00Z", now_s=second)
        job = received.job
        found = checkpoint_policy.from_object(POLICY)
        status = conditions.status(found, POLICY["status"], [job], 1, lambda of: mirror.name_of(of.report, 1, ()), 1e9)
        json.dumps(conditions.patch(POLICY["status"], status))
        objects = [checkpoints.project(CHECKPOINT)]
        for operation in (*mirror.plan(job.report, objects, 1e9), *commands.plan(objects, job, 1e9)):
            if not isinstance(operation, mirror.Delete):
                json.dumps(operation.status.to_json())
        commands.SaveAnnotations(0.0).open([commands.SaveAnnotation(about={}, uid="u", value="v", set_at="")], job, 1e9)
        registry.recovery_point_s(job, 1e9, with_snapshot=True)

    return feed


def _answers(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        answer = home.decode_answer(data)
        bare = dataclasses.replace(answer, policy=None)
        assert home.decode_answer(home.encode(bare)) == bare
        if answer.policy is not None:
            policy.parse(answer.policy, embedded=True)

    return feed


class NoApi:
    """An API server that is never there."""

    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `cluster.client.Client` does it."""
        raise client.Unreachable("nobody is there")

    async def get(self, path: str, *, metadata_only: bool = False) -> dict[str, Any]:
        """As `create`."""
        raise client.Unreachable("nobody is there")


class NoCache:
    """A cache without pods."""

    def get(self, namespace: str, name: str) -> injected.Pod | None:
        """As `cluster.reflector.Reflector` does it."""
        return None


def _tokens(stack: contextlib.ExitStack) -> Feed:
    pods = injected.Pods(NoCache(), NoApi())
    authenticator = authenticate.Authenticator(NoApi(), reports.AUDIENCE, pods, clock=lambda: reports.NOW_S)
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)

    def feed(data: bytes) -> None:
        # The payload alone is what a stranger can put something into.
        payload = base64.urlsafe_b64encode(data).decode() if data[:1] == b"{" else data.decode("latin-1")
        loop.run_until_complete(authenticator.authenticate(f"Bearer a.{payload}.c"))

    return feed


def _token_reviews(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        authenticate.judge(loaded(data), reports.AUDIENCE)

    return feed


def _objects(_: contextlib.ExitStack) -> Feed:
    jobs = [registry.Registry().receive(reports.report(1, 2), created="", now_s=0.0).job]

    def feed(data: bytes) -> None:
        document = loaded(data)
        match document.get("kind"):
            case "Pod":
                injected.project(document)
                identity.identify(document)
            case checkpoints.KIND:
                objects = [checkpoints.project(document)]
                mirror.plan(jobs[0].report, objects, 1e9)
                commands.plan(objects, jobs[0], 1e9)
            case _:
                found = policies.project(document)
                after = conditions.status(found.parsed, found.status, jobs, 1, lambda _: "n", 1e9)
                conditions.patch(found.status, after)

    return feed


def _texts(_: contextlib.ExitStack) -> Feed:
    """Whatever a person may write into an annotation, a quantity, a time or an image."""

    def feed(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        lines = text.split("\n")
        noted = {name: lines[n % len(lines)] for n, name in enumerate(annotations.KNOWN)}
        noted[f"pillion.dev/{lines[0]}"] = lines[-1]
        pod_annotations, _ = annotations.parse(noted)
        limited = {"metadata": {"annotations": noted | {"kubernetes.io/limit-ranger": text}}, "spec": {}}
        overrides.apply(_FOUND, pod_annotations, limited, None, SETTINGS)
        found = identity.identify(
            {"metadata": {"name": lines[0], "labels": noted, "annotations": noted}}, pod_annotations.job_id
        )
        assert isinstance(found, identity.Unclear) or annotations.is_job_id(found.id)
        for name in ("cpu", "memory"):
            quantities.same(name, lines[0], lines[-1])
            quantities.add(name, lines[0], lines[-1])
        seconds = times.parse(lines[0])
        assert seconds is None or times.parse(times.text(seconds)) is not None
        mirror.object_name(lines[0], 1)

    return feed


_FOUND: Final = policy.parse(SPEC, embedded=False)


def _encoded(*documents: Any) -> list[bytes]:
    return [json.dumps(each).encode() for each in documents]


TARGETS: Final = (
    Target(
        name="admission", make=_admission, allowed=(review.BadReview,), words=WORDS, weight=3,
        seeds=lambda: _encoded(admission(), admission(object=injected_pod()), admission(operation="DELETE", object=None)),
    ),
    Target(
        name="status-annotations",
        make=_statuses,
        allowed=(),
        words=(*WORDS, "before", "declared", "python_path", "grace_s", "grace_set_s", "resources_set", "version"),
        seeds=lambda: [injected_pod()["metadata"]["annotations"][annotations.STATUS].encode()],
    ),
    Target(
        name="policies", make=_policies, allowed=(NoDocument, UnicodeDecodeError, SettingsError), words=WORDS,
        weight=3, seeds=lambda: _encoded(POLICY, SPEC, {"storage": {"path": "/data"}}, {"storage": {"objectStore": BUCKET}}),
    ),
    Target(
        name="reports", make=_reports, allowed=(home.BadReport,), words=(*WORDS, "version", "metrics", "listed", "step"),
        seeds=lambda: [home.encode(reports.report(1, 2, 3)), home.encode(reports.report())], weight=2,
    ),
    Target(
        name="answers", make=_answers, allowed=(home.BadReport, policy.PolicyError), words=(*WORDS, "interval_s", "commands"),
        seeds=lambda: [home.encode(home.Answer(policy=SPEC, policy_generation=2, commands=(home.Command(id="a"),)))],
    ),
    Target(
        name="tokens", make=_tokens, allowed=(Refused,), words=("aud", "exp", reports.AUDIENCE),
        seeds=lambda: _encoded({"aud": [reports.AUDIENCE], "exp": reports.NOW_S + 60}, {"aud": reports.AUDIENCE, "exp": 1}),
    ),
    Target(
        name="token-reviews", make=_token_reviews, allowed=UNREADABLE, weight=0.3,
        seeds=lambda: _encoded(reports.review()["status"]),
        words=("user", "extra", "username", "audiences", "authenticated", "system:serviceaccount:a:b"),
    ),
    Target(
        name="objects", make=_objects, allowed=UNREADABLE, words=WORDS, weight=1.5,
        seeds=lambda: _encoded(POLICY, CHECKPOINT, injected_pod()),
    ),
    Target(
        name="texts", make=_texts, allowed=(), is_json=False, words=(*WORDS, "2026-01-01T00:00:00Z", "registry/a@sha256:"),
        seeds=lambda: [b"96Gi\n2026-01-01T00:00:00Z\nexample/pillion-sidecar:2", b"500m\n1e3\ntrainer,logger\nrun.7"],
    ),
)  # fmt: skip
