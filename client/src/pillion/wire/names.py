"""
Every name that two parts of Pillion share: environment variables, files, store keys. Declared here, once.

Producer: the injector (environment), the sidecar (files, store keys). Consumer: client, sidecar, operator, users.
Breaking: renaming or removing any of them. Not breaking: adding one.
"""

from __future__ import annotations

import re
from typing import Final

# --- environment -------------------------------------------------------------------------------------------------

ENV_RUNTIME_DIR: Final = "PILLION_RUNTIME_DIR"
"""Folder of the arena and the control socket (a tmpfs). Set by the injector; without it the client starts a sidecar."""
ENV_ROOT: Final = "PILLION_ROOT"
"""Directory of the checkpoints, or URL in a bucket, if `Checkpointer()` is called without an argument."""
ENV_POD: Final = "PILLION_POD"
"""Identity of the pod: its UID. Ranks with the same value share one sidecar. Unset: this host."""
ENV_POLICY: Final = "PILLION_POLICY"
"""The policy as a JSON document, or the path of a YAML or JSON file."""
ENV_RUN_ID: Final = "PILLION_RUN_ID"
"""Name of the run, the same across restarts. Unset: torchrun's run id."""
ENV_PEER_TIMEOUT_S: Final = "PILLION_PEER_TIMEOUT_S"
ENV_LINGER_S: Final = "PILLION_LINGER_S"
ENV_LOG_LEVEL: Final = "PILLION_LOG_LEVEL"
ENV_IMPORT_PATH: Final = "PILLION_IMPORT_PATH"
"""Import path of the trainer, as directories separated like PATH. An embedded sidecar's executor imports from it as well."""
ENV_PREFIX_STORE: Final = "DCP_USE_PREFIX_STORE"
"""torch's own switch. Exactly "1": a prefix of the job's store. Any other value: a separate store. Unset: the policy's `store`."""

ENV_FAULTS: Final = "PILLION_FAULTS"
"""Faults of a test (`pillion.testing.faults`). Neither the injector nor the chart sets it."""

# --- environment of an injected sidecar --------------------------------------------------------------------------

ENV_POD_NAME: Final = "PILLION_POD_NAME"
ENV_POD_NAMESPACE: Final = "PILLION_POD_NAMESPACE"
ENV_POD_IP: Final = "PILLION_POD_IP"
ENV_NODE_NAME: Final = "PILLION_NODE_NAME"
ENV_COMPLETION_INDEX: Final = "PILLION_JOB_COMPLETION_INDEX"
ENV_POLICY_NAME: Final = "PILLION_POLICY_NAME"
"""Name of the CheckpointPolicy object that `PILLION_POLICY` was read from."""
ENV_JOB_KIND: Final = "PILLION_JOB_KIND"
ENV_JOB_NAME: Final = "PILLION_JOB_NAME"
ENV_OWNER_UID: Final = "PILLION_OWNER_UID"
"""UID of the object that owns the pod, the same for every retry of it. Empty: the pod does not have it."""
ENV_HOME_URL: Final = "PILLION_HOME_URL"
"""URL to which the sidecar calls home (`pillion.wire.home`). Unset: it does not call home."""
ENV_HOME_CA: Final = "PILLION_HOME_CA"
"""Certificates (PEM) for verifying the server at `PILLION_HOME_URL`."""
ENV_TOKEN_FILE: Final = "PILLION_TOKEN_FILE"
"""File with the service account token for calling home. The kubelet renews it."""
ENV_STORAGE_CA: Final = "PILLION_STORAGE_CA"
"""File with certificates (PEM) that are trusted for an object store, beside those of the system."""
ENV_LOCAL_DIR: Final = "PILLION_LOCAL_DIR"
"""Directory on a disk of the node, for copies of saves. Unset: the policy's `storage.local.path`, which only a run without a cluster has."""
ENV_METRICS_PORT: Final = "PILLION_METRICS_PORT"
"""Port of the sidecar's Prometheus endpoint. Unset or 0: no endpoint."""

SET_BY_INJECTION: Final = (
    *(ENV_RUNTIME_DIR, ENV_ROOT, ENV_POD, ENV_POLICY, ENV_RUN_ID, ENV_LOG_LEVEL),
    *(ENV_POD_NAME, ENV_POD_NAMESPACE, ENV_POD_IP, ENV_NODE_NAME, ENV_COMPLETION_INDEX),
    *(ENV_POLICY_NAME, ENV_JOB_KIND, ENV_JOB_NAME, ENV_OWNER_UID),
    *(ENV_HOME_URL, ENV_HOME_CA, ENV_TOKEN_FILE, ENV_METRICS_PORT, ENV_STORAGE_CA, ENV_LOCAL_DIR),
    *("HOME", "NVIDIA_VISIBLE_DEVICES"),
)
"""Variables of the sidecar's container that injection sets, and a policy cannot set."""

# --- the runtime directory ---------------------------------------------------------------------------------------

CONTROL_SOCKET: Final = "control.sock"
SIDECAR_LOCK: Final = "sidecar.lock"
"""Lock file. The running sidecar of this directory holds it with flock."""
SIDECAR_LOG: Final = "sidecar.log"
RUNTIME_PREFIX: Final = "pillion-"


def segment_file(local_rank: int) -> str:
    """Return the name of one local rank's segment file."""
    return f"segment-{local_rank}.arena"


# --- storage -----------------------------------------------------------------------------------------------------

STEP_PREFIX: Final = "step-"
COMMIT_MARKER: Final = ".metadata"
"""Commit marker of DCP and of Pillion. A directory without it holds no checkpoint."""
MANIFEST: Final = "pillion-manifest.json"
OLD_MANIFEST: Final = "manifest.json"
"""Name of the manifest in releases before 0.2. It is read only if its content is a manifest; a user's file stays untouched."""
INTERNAL_DIR: Final = ".pillion"
"""Directory below the root, for generations and the sidecar's log. Loading a checkpoint does not need it."""
_NUMBER: Final = r"(0|[1-9][0-9]{0,18})"
"""A number as Pillion writes it. A foreign name such as ``step-007`` does not match."""
_STEP: Final = re.compile(rf"step-{_NUMBER}")
_DATA_FILE: Final = re.compile(rf"__{_NUMBER}_{_NUMBER}\.([0-9a-z-]+)\.distcp")
_PART_FILE: Final = re.compile(rf"part-{_NUMBER}\.([0-9a-z-]+)\.json")


def beside(root: str, job: str) -> str:
    """Return the root of another job in the same storage: roots of one policy are directories side by side."""
    return f"{root.rpartition('/')[0]}/{job}"


def step_directory(step: int) -> str:
    return f"{STEP_PREFIX}{step}"


def parse_step_directory(name: str) -> int | None:
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def data_file(rank: int, number: int, generation: str) -> str:
    """Return DCP's file name with the generation in it, so that an older attempt never writes into a newer one's file."""
    return f"__{rank}_{number}.{generation}.distcp"


def part_file(first_rank: int, generation: str) -> str:
    """Return the name of a pod's part file, which lies beside its data."""
    return f"part-{first_rank}.{generation}.json"


def parse_part_file(name: str) -> tuple[int, str] | None:
    match = _PART_FILE.fullmatch(name)
    return (int(match.group(1)), match.group(2)) if match else None


def parse_data_file(name: str) -> tuple[int, int, str] | None:
    match = _DATA_FILE.fullmatch(name)
    return (int(match.group(1)), int(match.group(2)), match.group(3)) if match else None


# --- the job's store ---------------------------------------------------------------------------------------------


def store_prefix(run_id: str, session: str) -> str:
    """
    Return the prefix of every store key of one session.

    Each start of the trainers draws a new session, so a restart never meets the keys of the previous attempt. (The constant prefix of
    torch's own executor breaks elastic restarts.)
    """
    return f"pillion/{run_id}/{session}"
