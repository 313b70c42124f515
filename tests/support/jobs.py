"""
The whole of: the objects of a training job on a test cluster, as a user would write them.

Called from: the tests of the level cluster.
Must never: contain anything of Pillion but the annotation; the rest is injection's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from support.kube import Json, Kube

TRAINER: Final = Path(__file__).parents[1] / "cluster" / "trainer.py"
IMAGE: Final = "localhost/pillion/sidecar:test"
"""Stands for the user's image: its system Python has a torch, and no client library."""
PYTHON: Final = "/usr/bin/python3"
CONTAINER: Final = "trainer"
CLAIM: Final = "checkpoints"


def policy(name: str = "llm", **spec: Any) -> Json:
    """A CheckpointPolicy that saves often; `spec` replaces parts of it."""
    return {
        "apiVersion": "pillion.dev/v1alpha1",
        "kind": "CheckpointPolicy",
        "metadata": {"name": name},
        "spec": {
            "trigger": {"periodSteps": 20, "snapshotSteps": 5},
            "staging": {"sizeLimit": "64Mi"},
            "storage": {"persistentVolumeClaim": {"claimName": CLAIM}},
            "retention": {"keepLast": 3},
            "drain": {"timeoutSeconds": 20},
            "sidecar": {
                "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
            },
        }
        | spec,
    }


def claim(namespace: str, folder: Path, *, name: str = CLAIM) -> tuple[Json, Json]:
    """A volume that every node sees, and a claim to it."""
    volume = f"{namespace}-{name}"
    return (
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume, "labels": {"pillion-test": namespace}},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteMany"],
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": "",
                "hostPath": {"path": str(folder)},
                "claimRef": {"namespace": namespace, "name": name},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": "1Gi"}},
                "storageClassName": "",
                "volumeName": volume,
            },
        },
    )


def script() -> Json:
    """The trainer, as a ConfigMap."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "trainer"},
        "data": {"trainer.py": TRAINER.read_text()},
    }


def job(
    name: str = "train",
    *,
    pods: int = 1,
    annotations: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    restart_policy: str = "OnFailure",
    backoff_limit: int = 6,
    pod: Mapping[str, Any] | None = None,
    container: Mapping[str, Any] | None = None,
    max_restarts: int = 3,
) -> list[Json]:
    """
    An Indexed Job, and for several pods the headless Service that gives them names.

    Args:
        annotations: of the pod template; default: the opt-in to the policy `llm`.
        pod, container: merged into the pod's spec and into its container.
    """
    annotations = {"pillion.dev/policy": "llm"} if annotations is None else annotations
    variables = {"STEP_S": "0.1", "USE_LIBUV": "0", "OMP_NUM_THREADS": "1"} | dict(env or {})
    command = [PYTHON, "-u", "/trainer/trainer.py"]
    documents: list[Json] = []
    if pods > 1:
        documents.append(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name},
                "spec": {"clusterIP": "None", "selector": {"job-name": name}, "publishNotReadyAddresses": True},
            }
        )
        command = [
            *(PYTHON, "-m", "torch.distributed.run", f"--nnodes={pods}", "--nproc-per-node=1"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={name}-0.{name}:29400", f"--rdzv-id={name}"),
            *(f"--max-restarts={max_restarts}", "/trainer/trainer.py"),
        ]
        # Each rendezvous gets a store of its own: torchrun's outlives a restart, with gloo's addresses of the dead in it.
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | variables
    spec = {
        "restartPolicy": restart_policy,
        "enableServiceLinks": False,
        **({"subdomain": name} if pods > 1 else {}),
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": CONTAINER,
                "image": IMAGE,
                "imagePullPolicy": "Never",
                "command": command,
                "env": [{"name": key, "value": value} for key, value in variables.items()],
                "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}},
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "trainer", "mountPath": "/trainer"}],
            }
            | dict(container or {})
        ],
        "volumes": [{"name": "trainer", "configMap": {"name": "trainer"}}],
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"job-name": name}},
            }
        ],
    } | dict(pod or {})
    documents.append(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name},
            "spec": {
                "completions": pods,
                "parallelism": pods,
                "completionMode": "Indexed",
                "backoffLimit": backoff_limit,
                "template": {"metadata": {"annotations": dict(annotations)}, "spec": spec},
            },
        }
    )
    return documents


def said(kube: Kube, pod: str, event: str, *options: str, container: str = CONTAINER) -> list[Json]:
    """Return a trainer's messages of this kind, in order. With '--previous' they are those of its container before the restart."""
    return events(kube.logs(pod, container, *options), event)


def events(text: str, event: str) -> list[Json]:
    """The events of that kind in what trainers have printed, in order."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith('{"event"')]
    return [line for line in found if line["event"] == event]


def last(kube: Kube, pod: str, event: str, *options: str, container: str = CONTAINER) -> int:
    """The newest step of which a trainer has said that; -1 where it has not."""
    return max((int(line["step"]) for line in said(kube, pod, event, *options, container=container)), default=-1)


def committed(volume: Path, job: str = "train") -> list[int]:
    """The steps of a job with a commit marker on the volume, oldest first."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in volume.glob(f"{job}/step-*/.metadata"))


def newest(volume: Path, job: str = "train") -> int:
    """The newest of them; -1 where there is none."""
    return max(committed(volume, job), default=-1)
