"""
The whole of: what injection lays into a pod: the native sidecar, the container that lays out the client, their volumes, and
what the trainer containers get.

    pod
    +-- pillion-sidecar   init container that stays; arena, storage, token for the controller, a /tmp of its own
    +-- pillion-client    init container that ends; copies the client library to a volume
    +-- trainer           arena, and the client read-only; never the storage, never the token

Called from: `decide`. Two subcommands of the sidecar's image are fixed here besides ``run``:
``pillion-sidecar notify`` tells the supervisor in ``PILLION_RUNTIME_DIR`` that the pod is terminating and returns at once;
``pillion-sidecar client --to DIR`` lays the client library out so that an installed one wins.

Must never: request a GPU, declare a port, give the sidecar a startup or readiness probe (a failing one would keep the
trainer from starting, or take its DNS name away), or mount the storage in another container.

What the API server fills in by default is written out, so that a second look at the same pod finds nothing to change.
"""

import json
from dataclasses import dataclass
from typing import Final

from pillion.wire import names, policy
from pillion_operator.injection import amounts, annotations, identity, overrides, pods, users
from pillion_operator.injection.pods import Json
from pillion_operator.settings import Settings

SIDECAR: Final = "pillion-sidecar"
CLIENT: Final = "pillion-client"

ARENA_VOLUME: Final = "pillion-arena"
STORAGE_VOLUME: Final = "pillion-storage"
CLIENT_VOLUME: Final = "pillion-client"
TOKEN_VOLUME: Final = "pillion-token"
TMP_VOLUME: Final = "pillion-tmp"
NO_ACCOUNT_VOLUME: Final = "pillion-no-account"
"""Empty, and where the API server would mount the pod's API token: our containers have no business with it. A pod that is as the
API server wants it is also looked at once, not twice (the plug-in that mounts the token runs after us and asks us again)."""
VOLUMES: Final = (ARENA_VOLUME, STORAGE_VOLUME, CLIENT_VOLUME, TOKEN_VOLUME, TMP_VOLUME, NO_ACCOUNT_VOLUME)

RUNTIME_DIR: Final = "/pillion/arena"
STORAGE_DIR: Final = "/pillion/storage"
CLIENT_DIR: Final = "/pillion/client"
TOKEN_DIR: Final = "/pillion/token"
TOKEN_FILE: Final = "token"
ACCOUNT_DIR: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Kubernetes documentation, "Configure Service Accounts for Pods": a container with a mount there gets no other."""
TRAINER_MOUNTS: Final = (RUNTIME_DIR, CLIENT_DIR)

PYTHONPATH: Final = "PYTHONPATH"
TRAINER_ENV: Final = (names.ENV_RUNTIME_DIR, names.ENV_ROOT, names.ENV_POD, names.ENV_RUN_ID)
"""What a trainer container gets besides PYTHONPATH. A pod that sets one of them itself is refused."""

_DOWNWARD: Final = {
    names.ENV_POD: "metadata.uid",
    names.ENV_POD_NAME: "metadata.name",
    names.ENV_POD_NAMESPACE: "metadata.namespace",
    names.ENV_POD_IP: "status.podIP",
    names.ENV_NODE_NAME: "spec.nodeName",
    # Empty in a pod without that annotation.
    names.ENV_COMPLETION_INDEX: "metadata.annotations['batch.kubernetes.io/job-completion-index']",
}

HEADROOM_LEAST_BYTES: Final = 64 * 2**20
"""Room in the arena's file system for what is no slot: segment headers, pages at the ends, the socket, the log."""
HEADROOM_SHARE: Final = 50
"""One part in so many of a large arena: the kubelet evicts a pod whose volume is fuller than its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is laid into one pod."""

    sidecar: Json
    client: Json | None
    """None: the trainer has the client in its image."""
    volumes: list[Json]
    trainers: tuple[str, ...]
    """The trainer containers, by name."""
    trainer_env: list[Json]
    trainer_mounts: list[Json]
    drain_s: int
    """What the pod's grace period is raised by."""


def build(
    bare: Json,
    effective: overrides.Effective,
    job: identity.Job,
    wishes: annotations.Wishes,
    declared: Json | None,
    trainers: tuple[str, ...],
    settings: Settings,
) -> Parts:
    """The parts for a pod without them (`bare`)."""
    of = effective.policy
    root = f"{STORAGE_DIR}/{job.id}"
    claim = of.storage.persistent_volume_claim
    assert claim is not None, "the policy's reader asks for a claim in a cluster"
    arena_bytes = _with_headroom(of.staging.size_limit_bytes)
    injects_client = wishes.client is annotations.Client.INJECTED

    env: list[Json] = [
        _literal(names.ENV_RUNTIME_DIR, RUNTIME_DIR),
        _literal(names.ENV_ROOT, root),
        _literal(names.ENV_RUN_ID, job.id),
        _literal(names.ENV_POLICY, json.dumps(policy.dump(of), separators=(",", ":"), sort_keys=True)),
        _literal(names.ENV_POLICY_NAME, wishes.policy),
        _literal(names.ENV_JOB_KIND, job.kind),
        _literal(names.ENV_JOB_NAME, job.name),
        # Always: the kubelet sets it, too, for a Service `pillion-metrics` in the pod's namespace.
        _literal(names.ENV_METRICS_PORT, str(settings.sidecar_metrics_port)),
        _literal(names.ENV_LOG_LEVEL, settings.log_level),
        # torch and tempfile want a home and a /tmp; the root file system is read-only.
        _literal("HOME", "/tmp"),
        # An image made for GPUs would see them all where the NVIDIA runtime is the default; "void" is none, for that runtime.
        _literal("NVIDIA_VISIBLE_DEVICES", "void"),
        *(_from_field(name, path) for name, path in _DOWNWARD.items()),
    ]
    env += [_literal(names.ENV_OWNER_UID, job.uid)] if job.uid else []
    no_account = _mount(NO_ACCOUNT_VOLUME, ACCOUNT_DIR) | {"readOnly": True}
    mounts = [
        _mount(ARENA_VOLUME, RUNTIME_DIR),
        _mount(STORAGE_VOLUME, STORAGE_DIR),
        _mount(TMP_VOLUME, "/tmp"),
        no_account,
    ]
    if claim.sub_path:
        mounts[1]["subPath"] = claim.sub_path
    volumes: list[Json] = [
        {"name": ARENA_VOLUME, "emptyDir": {"medium": "Memory"}},
        {"name": STORAGE_VOLUME, "persistentVolumeClaim": {"claimName": claim.claim_name}},
        {"name": TMP_VOLUME, "emptyDir": {"sizeLimit": "256Mi"}},
        {"name": NO_ACCOUNT_VOLUME, "emptyDir": {"sizeLimit": "1Mi"}},
    ]
    if arena_bytes:
        volumes[0]["emptyDir"]["sizeLimit"] = policy.format_bytes(arena_bytes)
    if injects_client:
        volumes.append({"name": CLIENT_VOLUME, "emptyDir": {"sizeLimit": "64Mi"}})
    if settings.home_url:
        env += [
            _literal(names.ENV_HOME_URL, settings.home_url),
            _literal(names.ENV_TOKEN_FILE, f"{TOKEN_DIR}/{TOKEN_FILE}"),
        ]
        env += [_literal(names.ENV_HOME_CA, settings.home_ca)] if settings.home_ca else []
        mounts.append(_mount(TOKEN_VOLUME, TOKEN_DIR) | {"readOnly": True})
        volumes.append(_token_volume(settings))

    # The pod's own word for a variable wins over the policy's, which is for many pods.
    own = {each.get("name") for each in (declared or {}).get("env") or []}
    env += [_variable(each) for each in of.sidecar.env if each.name not in own]
    beside = [each for each in (*pods.containers(bare), *pods.init_containers(bare)) if each.get("name") != SIDECAR]
    charged_bytes = arena_bytes if of.staging.memory_accounting is policy.MemoryAccounting.SIDECAR else 0
    sidecar: Json = {
        "name": SIDECAR,
        "image": effective.image,
        "imagePullPolicy": effective.image_pull_policy,
        "restartPolicy": "Always",
        "command": ["pillion-sidecar", "run"],
        "env": env,
        "resources": amounts.of_sidecar(of.sidecar.resources, beside, charged_bytes, amounts.said(bare, declared)),
        "volumeMounts": mounts,
        "securityContext": users.of_sidecar(of.sidecar, bare, trainers, declared, settings),
        "lifecycle": {"preStop": {"exec": {"command": ["pillion-sidecar", "notify"]}}},
    }
    if of.sidecar.env_from:
        sidecar["envFrom"] = [policy.dump_section(each) for each in of.sidecar.env_from]
    if settings.liveness == "Exec":
        sidecar["livenessProbe"] = {
            "exec": {"command": ["pillion-sidecar", "ping"]},
            "initialDelaySeconds": 60,
            "periodSeconds": 60,
            "timeoutSeconds": 30,
            "successThreshold": 1,
            "failureThreshold": 5,
        }
    client: Json = {
        "name": CLIENT,
        "image": effective.image,
        "imagePullPolicy": effective.image_pull_policy,
        "command": ["pillion-sidecar", "client", "--to", CLIENT_DIR],
        "resources": amounts.of_client(of.sidecar.resources, beside),
        "volumeMounts": [_mount(CLIENT_VOLUME, CLIENT_DIR), no_account],
        "securityContext": users.of_client(of.sidecar, bare, trainers, settings),
    }
    return Parts(
        sidecar=sidecar,
        client=client if injects_client else None,
        volumes=volumes,
        trainers=trainers,
        trainer_env=[
            _literal(names.ENV_RUNTIME_DIR, RUNTIME_DIR),
            _literal(names.ENV_ROOT, root),
            _literal(names.ENV_RUN_ID, job.id),
            _from_field(names.ENV_POD, _DOWNWARD[names.ENV_POD]),
        ],
        trainer_mounts=[
            _mount(ARENA_VOLUME, RUNTIME_DIR),
            *([_mount(CLIENT_VOLUME, CLIENT_DIR) | {"readOnly": True}] if injects_client else []),
        ],
        drain_s=of.drain.timeout_seconds,
    )


def _literal(name: str, value: str) -> Json:
    # The kubelet expands $(NAME) in a value and reads $$ as one $.
    return {"name": name, "value": value.replace("$", "$$")}


def _variable(of: policy.EnvVar) -> Json:
    # The API server leaves an empty value out.
    return {key: value for key, value in policy.dump_section(of).items() if value != ""}


def _from_field(name: str, path: str) -> Json:
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _mount(volume: str, path: str) -> Json:
    return {"name": volume, "mountPath": path}


def _token_volume(settings: Settings) -> Json:
    token = {
        "audience": settings.token_audience,
        "expirationSeconds": settings.token_expiration_s,
        "path": TOKEN_FILE,
    }
    # 0644: the sidecar's user is not known to the kubelet as the only one of the pod, and the volume is mounted nowhere else.
    return {"name": TOKEN_VOLUME, "projected": {"defaultMode": 0o644, "sources": [{"serviceAccountToken": token}]}}


def _with_headroom(arena_bytes: int | None) -> int:
    """Size of the arena's file system, in whole MiB; 0 where the policy sets no limit."""
    if arena_bytes is None:
        return 0
    whole = arena_bytes + max(HEADROOM_LEAST_BYTES, arena_bytes // HEADROOM_SHARE)
    return -(-whole // 2**20) * 2**20
