"""
The whole of: the parts that injection adds to a pod: the native sidecar, the container that installs the client, their volumes, and
the environment and mounts of the trainer containers.

    pod
    +-- pillion-sidecar   init container that stays; arena, storage, local disk, credentials, token for the controller, a /tmp of its own
    +-- pillion-client    init container that ends; copies the client library to a volume
    +-- trainer           arena, and the client read-only; never the storage, its credentials, or the token

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
from pillion_operator.injection import amounts, annotations, entries, identity, overrides, pods, storage_spec, users
from pillion_operator.injection.pods import Json
from pillion_operator.settings import Settings

SIDECAR: Final = "pillion-sidecar"
CLIENT: Final = "pillion-client"

ARENA_VOLUME: Final = "pillion-arena"
CLIENT_VOLUME: Final = "pillion-client"
TOKEN_VOLUME: Final = "pillion-token"
TMP_VOLUME: Final = "pillion-tmp"
NO_ACCOUNT_VOLUME: Final = "pillion-no-account"
"""
Empty volume at the path where the API server would mount the pod's API token, which the injected containers do not need. It also
saves a second review: the plug-in that mounts the token runs after injection, and causes one.
"""
VOLUMES: Final = (ARENA_VOLUME, *storage_spec.VOLUMES, CLIENT_VOLUME, TOKEN_VOLUME, TMP_VOLUME, NO_ACCOUNT_VOLUME)

RUNTIME_DIR: Final = "/pillion/arena"
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

MIN_HEADROOM_BYTES: Final = 64 * 2**20
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
    namespace: str,
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
        namespace: the pod's. Empty: not known, where `storage_spec.needs_namespace` allows it.
    """
    injects_client = pod_annotations.client is annotations.ClientSource.INJECTED
    # The pod's other containers show which amounts the namespace requires and allows.
    others = [each for each in (*pods.containers(bare), *pods.init_containers(bare)) if each.get("name") != SIDECAR]
    sidecar = _sidecar(bare, effective, others, declared, trainers, settings)
    root = storage_spec.root(effective.policy.storage, namespace, job.id)
    sidecar["env"] = _environment(effective.policy, job, root, pod_annotations.policy, declared, settings)
    client = _client(bare, effective, others, trainers, settings) if injects_client else None
    return Parts(
        sidecar=sidecar,
        client=client,
        volumes=_volumes(effective.policy, injects_client, settings),
        trainers=trainers,
        trainer_env=_trainer_environment(job, root),
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
        "resources": amounts.of_sidecar(
            section.resources,
            others,
            charged_bytes,
            amounts.declared_amounts(bare, declared),
            storage_spec.disk_bytes(effective.policy.storage),
        ),
        "volumeMounts": _sidecar_mounts(effective.policy, settings),
        "securityContext": users.of_sidecar(section, bare, trainers, declared, settings),
        "lifecycle": {"preStop": {"exec": {"command": ["pillion-sidecar", "notify"]}}},
    }
    # The last source of a name counts: the storage's credentials are the ones that its section names.
    sources = [policy.dump_section(each) for each in section.env_from]
    sources += [each for each in storage_spec.env_from(effective.policy.storage) if each not in sources]
    if sources:
        sidecar["envFrom"] = sources
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
        "volumeMounts": [entries.mount(CLIENT_VOLUME, CLIENT_DIR), _no_account()],
        "securityContext": users.of_client(section, bare, trainers, settings),
    }


def _environment(
    effective: policy.Policy, job: identity.Job, root: str, policy_name: str, declared: Json | None, settings: Settings
) -> list[Json]:
    """The sidecar's variables; those of the policy come last, as they may refer to the others."""
    env = [
        entries.literal(names.ENV_RUNTIME_DIR, RUNTIME_DIR),
        entries.literal(names.ENV_ROOT, root),
        entries.literal(names.ENV_RUN_ID, job.id),
        entries.literal(names.ENV_POLICY, json.dumps(policy.dump(effective), separators=(",", ":"), sort_keys=True)),
        entries.literal(names.ENV_POLICY_NAME, policy_name),
        entries.literal(names.ENV_JOB_KIND, job.kind),
        entries.literal(names.ENV_JOB_NAME, job.name),
        # Always: the kubelet sets it, too, for a Service `pillion-metrics` in the pod's namespace.
        entries.literal(names.ENV_METRICS_PORT, str(settings.sidecar_metrics_port)),
        entries.literal(names.ENV_LOG_LEVEL, settings.log_level),
        # torch and tempfile want a home and a /tmp; the root file system is read-only.
        entries.literal("HOME", "/tmp"),
        # An image made for GPUs would see them all where the NVIDIA runtime is the default; "void" is none, for that runtime.
        entries.literal("NVIDIA_VISIBLE_DEVICES", "void"),
        *(entries.from_field(name, path) for name, path in _DOWNWARD.items()),
    ]
    env += [entries.literal(names.ENV_OWNER_UID, job.uid)] if job.uid else []
    if settings.home_url:
        env += [
            entries.literal(names.ENV_HOME_URL, settings.home_url),
            entries.literal(names.ENV_TOKEN_FILE, f"{TOKEN_DIR}/{TOKEN_FILE}"),
        ]
        env += [entries.literal(names.ENV_HOME_CA, settings.home_ca)] if settings.home_ca else []
    env += storage_spec.environment(effective.storage)
    # A variable that the pod declares wins over the policy's, which is for many pods.
    own = {each.get("name") for each in (declared or {}).get("env") or []}
    return env + [entries.variable(each) for each in effective.sidecar.env if each.name not in own]


def _sidecar_mounts(effective: policy.Policy, settings: Settings) -> list[Json]:
    token = [entries.mount(TOKEN_VOLUME, TOKEN_DIR, is_read_only=True)] if settings.home_url else []
    storage = storage_spec.mounts(effective.storage)
    return [
        entries.mount(ARENA_VOLUME, RUNTIME_DIR),
        *storage,
        entries.mount(TMP_VOLUME, "/tmp"),
        _no_account(),
        *token,
    ]


def _volumes(effective: policy.Policy, injects_client: bool, settings: Settings) -> list[Json]:
    """The volumes that the pod gets."""
    arena: Json = {"medium": "Memory"}
    if arena_bytes := _with_headroom(effective.staging.size_limit_bytes):
        arena["sizeLimit"] = policy.format_bytes(arena_bytes)
    volumes: list[Json] = [
        {"name": ARENA_VOLUME, "emptyDir": arena},
        *storage_spec.volumes(effective.storage),
        {"name": TMP_VOLUME, "emptyDir": {"sizeLimit": "256Mi"}},
        {"name": NO_ACCOUNT_VOLUME, "emptyDir": {"sizeLimit": "1Mi"}},
    ]
    if injects_client:
        volumes.append({"name": CLIENT_VOLUME, "emptyDir": {"sizeLimit": "64Mi"}})
    if settings.home_url:
        audience, expiration_s = settings.token_audience, settings.token_expiration_s
        volumes.append(entries.token_volume(TOKEN_VOLUME, audience, expiration_s, TOKEN_FILE))
    return volumes


def _trainer_environment(job: identity.Job, root: str) -> list[Json]:
    return [
        entries.literal(names.ENV_RUNTIME_DIR, RUNTIME_DIR),
        entries.literal(names.ENV_ROOT, root),
        entries.literal(names.ENV_RUN_ID, job.id),
        entries.from_field(names.ENV_POD, _DOWNWARD[names.ENV_POD]),
    ]


def _trainer_mounts(injects_client: bool) -> list[Json]:
    client = [entries.mount(CLIENT_VOLUME, CLIENT_DIR, is_read_only=True)] if injects_client else []
    return [entries.mount(ARENA_VOLUME, RUNTIME_DIR), *client]


def _no_account() -> Json:
    """The mount that keeps the pod's API token out of a container."""
    return entries.mount(NO_ACCOUNT_VOLUME, ACCOUNT_DIR, is_read_only=True)


def _with_headroom(arena_bytes: int | None) -> int:
    """Size of the arena's file system, in whole MiB; 0 where the policy sets no limit."""
    if arena_bytes is None:
        return 0
    whole = arena_bytes + max(MIN_HEADROOM_BYTES, arena_bytes // HEADROOM_SHARE)
    return -(-whole // 2**20) * 2**20
