"""
The whole of: the parts that injection adds to a pod: the native sidecar, the container that installs the client, their volumes, and
the environment and mounts of the trainer containers.

    pod
    +-- pillion-sidecar   init container that stays; arena, storage, token for the controller, a /tmp of its own
    +-- pillion-client    init container that ends; copies the client library to a volume
    +-- trainer           arena, and the client read-only; never the storage, never the token

Called from: `decide`. Two subcommands of the sidecar's image are fixed here besides ``run``:
``pillion-sidecar notify`` notifies the supervisor in ``PILLION_RUNTIME_DIR`` that the pod is terminating, and returns at once;
``pillion-sidecar client --to DIR`` lays the client library out so that an installed one wins.

Must never: request a GPU, declare a port, give the sidecar a startup or readiness probe (a failing one would keep the
trainer from starting, or take its DNS name away), or mount the storage in another container.

What the API server fills in by default is written out, so that a second look at the same pod finds nothing to change.
"""

import json
from collections.abc import Sequence
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
"""
Empty volume at the path where the API server would mount the pod's API token, which the injected containers do not need. It also
saves a second review: the plug-in that mounts the token runs after injection, and causes one.
"""
VOLUMES: Final = (ARENA_VOLUME, STORAGE_VOLUME, CLIENT_VOLUME, TOKEN_VOLUME, TMP_VOLUME, NO_ACCOUNT_VOLUME)

RUNTIME_DIR: Final = "/pillion/arena"
STORAGE_DIR: Final = "/pillion/storage"
CLIENT_DIR: Final = "/pillion/client"
TOKEN_DIR: Final = "/pillion/token"
TOKEN_FILE: Final = "token"
ACCOUNT_DIR: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
"""
Path of the API token. Kubernetes documentation, "Configure Service Accounts for Pods": a container with its own mount there gets
no other.
"""
TRAINER_MOUNTS: Final = (RUNTIME_DIR, CLIENT_DIR)

PYTHONPATH: Final = "PYTHONPATH"
TRAINER_ENV: Final = (names.ENV_RUNTIME_DIR, names.ENV_ROOT, names.ENV_POD, names.ENV_RUN_ID)
"""Variables of a trainer container besides PYTHONPATH. A pod that sets one of them itself is refused."""

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
"""Minimum room in the arena's file system beside the slots: segment headers, partial pages, the socket, the log."""
HEADROOM_SHARE: Final = 50
"""Divisor of the arena's size for the headroom of a large arena: the kubelet evicts a pod whose volume exceeds its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts that injection adds to one pod."""

    sidecar: Json
    client: Json | None
    """None: the trainer has the client in its image."""
    volumes: list[Json]
    trainers: tuple[str, ...]
    """The trainer containers, by name."""
    trainer_env: list[Json]
    trainer_mounts: list[Json]
    drain_s: int
    """Seconds that are added to the pod's grace period."""


def build(
    bare: Json,
    effective: overrides.Effective,
    job: identity.Job,
    pod_annotations: annotations.PodAnnotations,
    declared: Json | None,
    trainers: tuple[str, ...],
    settings: Settings,
) -> Parts:
    """
    The parts for one pod.

    Args:
        bare: the pod without them.
        effective: the policy and the image for this pod.
        job: the training that the pod belongs to.
        pod_annotations: the pod's annotations.
        declared: the sidecar that the pod declares itself, or None.
        trainers: names of the trainer containers.
        settings: the operator's.
    """
    injects_client = pod_annotations.client is annotations.ClientSource.INJECTED
    # The pod's other containers show which amounts the namespace requires and allows.
    others = [each for each in (*pods.containers(bare), *pods.init_containers(bare)) if each.get("name") != SIDECAR]
    sidecar = _sidecar(bare, effective, others, declared, trainers, settings)
    sidecar["env"] = _environment(effective.policy, job, pod_annotations.policy, declared, settings)
    client = _client(bare, effective, others, trainers, settings) if injects_client else None
    return Parts(
        sidecar=sidecar,
        client=client,
        volumes=_volumes(effective.policy, injects_client, settings),
        trainers=trainers,
        trainer_env=_trainer_environment(job),
        trainer_mounts=_trainer_mounts(injects_client),
        drain_s=effective.policy.drain.timeout_seconds,
    )


def _sidecar(
    bare: Json,
    effective: overrides.Effective,
    others: Sequence[Json],
    declared: Json | None,
    trainers: tuple[str, ...],
    settings: Settings,
) -> Json:
    """The container of the sidecar, without its environment."""
    section, staging = effective.policy.sidecar, effective.policy.staging
    pays_for_arena = staging.memory_accounting is policy.MemoryAccounting.SIDECAR
    charged_bytes = _with_headroom(staging.size_limit_bytes) if pays_for_arena else 0
    sidecar: Json = {
        "name": SIDECAR,
        "image": effective.image,
        "imagePullPolicy": effective.image_pull_policy,
        "restartPolicy": "Always",
        "command": ["pillion-sidecar", "run"],
        "env": [],
        "resources": amounts.of_sidecar(section.resources, others, charged_bytes, amounts.said(bare, declared)),
        "volumeMounts": _sidecar_mounts(effective.policy, settings),
        "securityContext": users.of_sidecar(section, bare, trainers, declared, settings),
        "lifecycle": {"preStop": {"exec": {"command": ["pillion-sidecar", "notify"]}}},
    }
    if section.env_from:
        sidecar["envFrom"] = [policy.dump_section(each) for each in section.env_from]
    if settings.liveness == "Exec":
        sidecar["livenessProbe"] = {
            "exec": {"command": ["pillion-sidecar", "ping"]},
            "initialDelaySeconds": 60,
            "periodSeconds": 60,
            "timeoutSeconds": 30,
            "successThreshold": 1,
            "failureThreshold": 5,
        }
    return sidecar


def _client(
    bare: Json, effective: overrides.Effective, others: Sequence[Json], trainers: tuple[str, ...], settings: Settings
) -> Json:
    """The container that lays out the client library, and ends."""
    section = effective.policy.sidecar
    return {
        "name": CLIENT,
        "image": effective.image,
        "imagePullPolicy": effective.image_pull_policy,
        "command": ["pillion-sidecar", "client", "--to", CLIENT_DIR],
        "resources": amounts.of_client(section.resources, others),
        "volumeMounts": [_mount(CLIENT_VOLUME, CLIENT_DIR), _no_account()],
        "securityContext": users.of_client(section, bare, trainers, settings),
    }


def _environment(
    effective: policy.Policy, job: identity.Job, policy_name: str, declared: Json | None, settings: Settings
) -> list[Json]:
    """The sidecar's variables; those of the policy come last, as they may refer to the others."""
    env = [
        _literal(names.ENV_RUNTIME_DIR, RUNTIME_DIR),
        _literal(names.ENV_ROOT, _root(job)),
        _literal(names.ENV_RUN_ID, job.id),
        _literal(names.ENV_POLICY, json.dumps(policy.dump(effective), separators=(",", ":"), sort_keys=True)),
        _literal(names.ENV_POLICY_NAME, policy_name),
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
    if settings.home_url:
        env += [
            _literal(names.ENV_HOME_URL, settings.home_url),
            _literal(names.ENV_TOKEN_FILE, f"{TOKEN_DIR}/{TOKEN_FILE}"),
        ]
        env += [_literal(names.ENV_HOME_CA, settings.home_ca)] if settings.home_ca else []
    # A variable that the pod declares wins over the policy's, which is for many pods.
    own = {each.get("name") for each in (declared or {}).get("env") or []}
    return env + [_variable(each) for each in effective.sidecar.env if each.name not in own]


def _sidecar_mounts(effective: policy.Policy, settings: Settings) -> list[Json]:
    storage = _mount(STORAGE_VOLUME, STORAGE_DIR)
    if sub_path := _claim(effective).sub_path:
        storage["subPath"] = sub_path
    token = [_mount(TOKEN_VOLUME, TOKEN_DIR) | {"readOnly": True}] if settings.home_url else []
    return [_mount(ARENA_VOLUME, RUNTIME_DIR), storage, _mount(TMP_VOLUME, "/tmp"), _no_account(), *token]


def _volumes(effective: policy.Policy, injects_client: bool, settings: Settings) -> list[Json]:
    """The volumes that the pod gets."""
    arena: Json = {"medium": "Memory"}
    if arena_bytes := _with_headroom(effective.staging.size_limit_bytes):
        arena["sizeLimit"] = policy.format_bytes(arena_bytes)
    volumes: list[Json] = [
        {"name": ARENA_VOLUME, "emptyDir": arena},
        {"name": STORAGE_VOLUME, "persistentVolumeClaim": {"claimName": _claim(effective).claim_name}},
        {"name": TMP_VOLUME, "emptyDir": {"sizeLimit": "256Mi"}},
        {"name": NO_ACCOUNT_VOLUME, "emptyDir": {"sizeLimit": "1Mi"}},
    ]
    if injects_client:
        volumes.append({"name": CLIENT_VOLUME, "emptyDir": {"sizeLimit": "64Mi"}})
    if settings.home_url:
        volumes.append(_token_volume(settings))
    return volumes


def _trainer_environment(job: identity.Job) -> list[Json]:
    return [
        _literal(names.ENV_RUNTIME_DIR, RUNTIME_DIR),
        _literal(names.ENV_ROOT, _root(job)),
        _literal(names.ENV_RUN_ID, job.id),
        _from_field(names.ENV_POD, _DOWNWARD[names.ENV_POD]),
    ]


def _trainer_mounts(injects_client: bool) -> list[Json]:
    client = [_mount(CLIENT_VOLUME, CLIENT_DIR) | {"readOnly": True}] if injects_client else []
    return [_mount(ARENA_VOLUME, RUNTIME_DIR), *client]


def _root(job: identity.Job) -> str:
    """Folder of the job's checkpoints, as the sidecar sees it."""
    return f"{STORAGE_DIR}/{job.id}"


def _claim(effective: policy.Policy) -> policy.VolumeClaim:
    claim = effective.storage.persistent_volume_claim
    assert claim is not None, "the policy's reader requires a claim in a cluster"
    return claim


def _no_account() -> Json:
    """The mount that keeps the pod's API token out of a container."""
    return _mount(NO_ACCOUNT_VOLUME, ACCOUNT_DIR) | {"readOnly": True}


def _literal(name: str, value: str) -> Json:
    # The kubelet expands $(NAME) in a value and reads $$ as one $.
    return {"name": name, "value": value.replace("$", "$$")}


def _variable(variable: policy.EnvVar) -> Json:
    # The API server leaves an empty value out.
    return {key: value for key, value in policy.dump_section(variable).items() if value != ""}


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
