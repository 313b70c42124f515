"""
The whole of: which job a pod belongs to, and the id under which that job's checkpoints are kept.

Called from: `decide`. The id is the same for every pod of a job and after every restart, as it is part of the path of the
job's checkpoints. Must never: use what differs between the pods of a job, or between its attempts.
"""

from dataclasses import dataclass
from typing import Final

from pillion_operator.injection import pods
from pillion_operator.injection.pods import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a pod belongs to."""

    kind: str
    """Kind of the object that the user made, as far as the pod tells: ``PyTorchJob``, ``JobSet``, ..., or ``Pod``."""
    name: str
    """Its name."""
    id: str
    """Names the job's checkpoints in its namespace; a part of a path."""


_LABELS: Final = (
    ("TrainJob", "trainer.kubeflow.org/trainjob-name"),
    ("JobSet", "jobset.sigs.k8s.io/jobset-name"),
    ("LeaderWorkerSet", "leaderworkerset.sigs.k8s.io/name"),
    ("PyTorchJob", "training.kubeflow.org/job-name"),
    ("VolcanoJob", "volcano.sh/job-name"),
    ("Job", "batch.kubernetes.io/job-name"),
    ("Job", "job-name"),
)
"""The user's object first: a TrainJob makes a JobSet, which makes Jobs, and each of them labels the pod."""

_LWS_GROUP: Final = "leaderworkerset.sigs.k8s.io/group-index"
_TEMPLATE_HASH: Final = "pod-template-hash"


def identify(pod: Json) -> Job | None:
    """The job of a pod, by the labels of its controllers, then by its owner, then by its own name. None: it has no name."""
    labels = pods.metadata_map(pod, "labels")
    # Volcano has the name in an annotation of every pod, and in a label since 1.3.
    known = pods.metadata_map(pod, "annotations") | labels
    for kind, label in _LABELS:
        if name := known.get(label):
            # Each group of a LeaderWorkerSet is a world of its own.
            group = labels.get(_LWS_GROUP, "") if kind == "LeaderWorkerSet" else ""
            return Job(kind=kind, name=name, id=f"{name}-{group}" if group else name)
    if owner := pods.controller(pod):
        kind, name = str(owner.get("kind")), str(owner.get("name"))
        template_hash = labels.get(_TEMPLATE_HASH, "")
        if kind == "ReplicaSet" and template_hash:
            return Job(
                kind="Deployment",
                name=name.removesuffix(f"-{template_hash}"),
                id=name.removesuffix(f"-{template_hash}"),
            )
        return Job(kind=kind, name=name, id=name)
    metadata = pod.get("metadata") or {}
    name = metadata.get("name") or str(metadata.get("generateName") or "").rstrip("-.")
    return Job(kind="Pod", name=name, id=name) if name else None
