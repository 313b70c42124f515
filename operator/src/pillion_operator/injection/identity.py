"""
The whole of: the training that a pod belongs to, and the id of its checkpoints. A pod without a certain id is refused.

Called from: `decide`. The id is the same for every pod of a training and for each retry of it, as it is part of the path of its
checkpoints; and no other training has it. An owner of a kind that runs one training gives the id; the pod's own annotation wins.
Must never: guess. An id that is too coarse mixes trainings, and one that is too fine begins each retry from nothing.

Of labels, only those are read that the pod's known owner puts there. Sources: the controllers' documentation of their labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pillion_operator.injection import annotations, pods
from pillion_operator.injection.pods import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The training that a pod belongs to."""

    kind: str
    """Kind of the object that the user created, as far as the pod shows it: ``PyTorchJob``, ``JobSet``, ..., or ``Pod``."""
    name: str
    """Its name."""
    id: str
    """Names the job's checkpoints in its namespace; a part of a path."""
    uid: str = ""
    """UID of that object. Empty: not in the pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unclear:
    """The training that a pod belongs to is ambiguous."""

    why: str
    """The cause, and the annotation to set."""


_BATCH_JOB: Final = ("batch", "Job")
_STATEFUL_SET: Final = ("apps", "StatefulSet")
_REPLICA_SET: Final = ("apps", "ReplicaSet")
_RAY_CLUSTER: Final = ("ray.io", "RayCluster")
_ONE_TRAINING: Final = {
    ("batch.volcano.sh", "Job"): "VolcanoJob",
    ("trainer.kubeflow.org", "TrainJob"): "TrainJob",
    ("jobset.x-k8s.io", "JobSet"): "JobSet",
    **{("kubeflow.org", kind): kind for kind in ("PyTorchJob", "TFJob", "MPIJob", "XGBoostJob", "PaddleJob", "JAXJob")},
}
"""Owners that run one training. The id is their name, and each retry has the same owner."""
_MAKERS_OF_A_JOB: Final = (
    ("TrainJob", "trainer.kubeflow.org/trainjob-name", ""),
    ("JobSet", "jobset.sigs.k8s.io/jobset-name", "jobset.sigs.k8s.io/jobset-uid"),
    ("MPIJob", "training.kubeflow.org/job-name", ""),
)
"""
Kinds that create Jobs, with the labels of their name and UID on the pods. The user's own object comes first: a TrainJob creates a
JobSet.
"""

_LWS_NAME: Final = "leaderworkerset.sigs.k8s.io/name"
_LWS_GROUP: Final = "leaderworkerset.sigs.k8s.io/group-index"
_TEMPLATE_HASH: Final = "pod-template-hash"
_RAY_MADE_FROM_KIND: Final = "ray.io/originated-from-crd"
_RAY_MADE_FROM_NAME: Final = "ray.io/originated-from-cr-name"
_POD_GROUP: Final = "kueue.x-k8s.io/pod-group-name"
_COMPLETION_INDEX: Final = "batch.kubernetes.io/job-completion-index"
_INDEX_FAILURES: Final = "batch.kubernetes.io/job-index-failure-count"
"""Annotation on each pod of a Job with `backoffLimitPerIndex`: one index is retried while the others train on."""
_AIRFLOW: Final = ("dag_id", "task_id")

_INDICES: Final = {
    "index": (_COMPLETION_INDEX, "apps.kubernetes.io/pod-index"),
    "job-index": ("jobset.sigs.k8s.io/job-index",),
}
"""Labels or annotations that hold an index, by its name in `pillion.dev/job-id`. Each is the same for every retry."""
_HINTS: Final = {
    "Workflow": ', such as "{{workflow.name}}-{{inputs.parameters.name}}"',
    "flyteworkflow": ", such as the execution's id and the task's name",
    "RayCluster": ", such as the RayJob's name in the templates of head and workers, as KubeRay does not label pods with it",
}
"""Example of an id, by kind of a well-known owner of several trainings."""
_HINT: Final = f" with {annotations.JOB_ID}, the same for each of its retries and different for every other training"


def identify(pod: Json, job_id: str = "", *, made_by: Job | Unclear | None = None) -> Job | Unclear:
    """
    The job of a pod.

    Args:
        pod: the pod, without what injection put there.
        job_id: the pod's annotation, which may contain `$(index)`. Empty: the pod has none.
        made_by: the object whose template the pod is. None: the pod is one that its controller made.
    """
    job = made_by or _by_owner(pod)
    if job_id:
        resolved = _resolved(pod, job_id, is_template=made_by is not None)
        if isinstance(resolved, Unclear):
            return resolved
        owner = pods.controller(pod) or {}
        kind, name = str(owner.get("kind") or "Pod"), str(owner.get("name") or pods.name(pod) or resolved)
        owner_job = job if isinstance(job, Job) else Job(kind=kind, name=name, id="", uid=str(owner.get("uid") or ""))
        job = Job(kind=owner_job.kind, name=owner_job.name, id=resolved, uid=owner_job.uid)
    if isinstance(job, Job) and not annotations.is_job_id(job.id):
        return Unclear(
            why=f"{job.kind} {job.name!r:.80} has no valid id: allowed is {annotations.JOB_ID_ALLOWED}; set an id{_HINT}"
        )
    return job


def _by_owner(pod: Json) -> Job | Unclear:
    labels = pods.metadata_map(pod, "labels")
    owner = pods.controller(pod)
    if owner is None:
        return _of_nobody(pod, labels)
    group = str(owner.get("apiVersion") or "").rpartition("/")[0]
    kind, name, uid = (str(owner.get(key) or "") for key in ("kind", "name", "uid"))
    match (group, kind):
        case owner_kind if owner_kind in _ONE_TRAINING:
            return Job(kind=_ONE_TRAINING[owner_kind], name=name, id=name, uid=uid)
        case owner_kind if owner_kind == _BATCH_JOB:
            return _of_a_job(pod, name, uid)
        case owner_kind if owner_kind == _STATEFUL_SET:
            if lws := labels.get(_LWS_NAME):
                # Each group of a LeaderWorkerSet is a world of its own.
                return Job(kind="LeaderWorkerSet", name=lws, id=f"{lws}-{labels.get(_LWS_GROUP, '0')}")
            return Job(kind=kind, name=name, id=name, uid=uid)
        case owner_kind if owner_kind == _REPLICA_SET:
            template_hash = labels.get(_TEMPLATE_HASH, "")
            if template_hash and name.endswith(f"-{template_hash}"):
                made_by = name.removesuffix(f"-{template_hash}")
                return Job(kind="Deployment", name=made_by, id=made_by)
            return Job(kind=kind, name=name, id=name, uid=uid)
        case owner_kind if owner_kind == _RAY_CLUSTER and labels.get(_RAY_MADE_FROM_KIND) == "RayJob":
            # Each retry of a RayJob is by another RayCluster. KubeRay 1.5 puts these labels on the RayCluster; the user, on the templates.
            made_by = labels.get(_RAY_MADE_FROM_NAME, "")
            return Job(kind="RayJob", name=made_by, id=made_by)
    if gang := labels.get(_POD_GROUP):
        return Job(kind="PodGroup", name=gang, id=gang)
    what = f"{kind} {name!r:.80}" + (f" of {group}" if group else "")
    return Unclear(why=f"{what} may run several trainings: name this one{_HINT}{_HINTS.get(kind, '')}")


def _of_a_job(pod: Json, name: str, uid: str) -> Job | Unclear:
    labels = pods.metadata_map(pod, "labels")
    for kind, label, uid_label in _MAKERS_OF_A_JOB:
        if made_by := labels.get(label):
            return Job(kind=kind, name=made_by, id=made_by, uid=labels.get(uid_label, ""))
    if _INDEX_FAILURES in pods.metadata_map(pod, "annotations"):
        return Unclear(
            why=f"Job {name!r:.80} retries each index separately (backoffLimitPerIndex), so each index is a training of its own:"
            f' set {annotations.JOB_ID}: "{name:.80}-$(index)"'
        )
    return Job(kind="Job", name=name, id=name, uid=uid)


def _of_nobody(pod: Json, labels: Mapping[str, str]) -> Job | Unclear:
    if gang := labels.get(_POD_GROUP):
        return Job(kind="PodGroup", name=gang, id=gang)
    metadata = pod.get("metadata") or {}
    if all(each in labels for each in _AIRFLOW):
        hint = ', such as "{{ dag.dag_id }}-{{ task.task_id }}-{{ ts_nodash }}"'
        return Unclear(why=f"Airflow gives each retry a new pod name: name the training{_HINT}{hint}")
    if prefix := metadata.get("generateName"):
        return Unclear(
            why=f"each pod of the generateName {prefix!r:.80} has a different name and no owner: name the training{_HINT}"
        )
    if name := pods.name(pod):
        return Job(kind="Pod", name=name, id=name)
    return Unclear(why=f"the pod has no name and no owner: name the training{_HINT}")


def _resolved(pod: Json, job_id: str, *, is_template: bool) -> str | Unclear:
    """The annotation's id with the pod's own indices in it."""
    marks = pods.metadata_map(pod, "labels") | pods.metadata_map(pod, "annotations")
    values = {name: next((marks[each] for each in places if each in marks), None) for name, places in _INDICES.items()}
    named = annotations.JOB_ID_FIELD.findall(job_id)
    if missing := [name for name in named if values.get(name) is None]:
        where = " or ".join(_INDICES[missing[0]])
        text = f"{annotations.JOB_ID}: the pod has no $({missing[0]}); its source is {where}"
        if is_template:
            text += "; it differs between the pods of a template, so only the webhook can inject them"
        return Unclear(why=text)
    return annotations.JOB_ID_FIELD.sub(lambda match: str(values[match[1]]), job_id)
