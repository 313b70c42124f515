"""
The whole of: injection without a cluster: the pods and pod templates of the documents of a file.

Called from: `__main__`, for people, and for schedulers that count the resources of a template before any pod exists (Kueue,
Volcano). A template gets what the webhook would give its pods; the webhook then finds nothing left to do.
Must never: read a file, or change its arguments.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pillion.wire import policy
from pillion_operator.injection import annotations, apply, checkpoint_policy, decide, identity, pods
from pillion_operator.injection.pods import Json
from pillion_operator.settings import Settings

_TEMPLATES: Final = {
    "Job": ("spec.template",),
    "Deployment": ("spec.template",),
    "ReplicaSet": ("spec.template",),
    "StatefulSet": ("spec.template",),
    "JobSet": ("spec.replicatedJobs.*.template.spec.template",),
    "PyTorchJob": ("spec.pytorchReplicaSpecs.*.template",),
    "TFJob": ("spec.tfReplicaSpecs.*.template",),
    "MPIJob": ("spec.mpiReplicaSpecs.*.template",),
    "XGBoostJob": ("spec.xgbReplicaSpecs.*.template",),
    "PaddleJob": ("spec.paddleReplicaSpecs.*.template",),
    "JAXJob": ("spec.jaxReplicaSpecs.*.template",),
    "RayJob": ("spec.rayClusterSpec.headGroupSpec.template", "spec.rayClusterSpec.workerGroupSpecs.*.template"),
    "LeaderWorkerSet": ("spec.leaderWorkerTemplate.leaderTemplate", "spec.leaderWorkerTemplate.workerTemplate"),
    "VolcanoJob": ("spec.tasks.*.template",),
}
"""
Paths of the pod templates, by kind. A kind that makes several jobs out of one template (a CronJob, a training runtime) is not
here: the job's id is in the pod, and differs between them.
"""

_MADE_ELSEWHERE: Final = ("TrainJob",)
"""Kinds of training jobs whose documents hold no pod template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of one pod or template."""

    where: str
    """``Kind/name``, and the path of the template in it."""
    decision: decide.Decision


def inject(
    documents: Sequence[Json], policies: Sequence[checkpoint_policy.CheckpointPolicy], settings: Settings
) -> tuple[list[Json], list[Outcome]]:
    """The documents with each pod and template injected where it is to be, and what became of each."""
    result = copy.deepcopy(list(documents))
    outcomes = []
    for document in result:
        for where, pod, job in _pods(document):
            wanted = pods.metadata_map(pod, "annotations").get(annotations.POLICY, "")
            policy_object = next((each for each in policies if each.name in ("", wanted)), None)
            if policy_object and (modes := _claim_modes(documents, document, policy_object)):
                policy_object = dataclasses.replace(policy_object, claim_modes=modes)
            # A template has no namespace of its own: its pods are where the document is.
            namespace = pods.namespace(document)
            decision = decide.inject(pod, policy_object, settings, made_by=job, namespace=namespace)
            if isinstance(decision, decide.Inject):
                _replace(pod, decision.pod)
            outcomes.append(Outcome(where=where, decision=decision))
    return result, outcomes


def remove(documents: Sequence[Json]) -> list[Json]:
    """The documents with what injection did taken out again."""
    result = copy.deepcopy(list(documents))
    for document in result:
        for _, pod, _ in _pods(document):
            _replace(pod, apply.remove(pod))
    return result


def is_policy(document: Mapping[str, Any]) -> bool:
    """Whether a document is a CheckpointPolicy object."""
    return document.get("kind") == policy.KIND and document.get("apiVersion") == policy.API_VERSION


def made_elsewhere(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """``Kind/name`` of the training jobs whose pods no document here describes."""
    kinds = [document for document in documents if document.get("kind") in _MADE_ELSEWHERE]
    return [f"{each['kind']}/{(each.get('metadata') or {}).get('name') or ''}" for each in kinds]


def _claim_modes(
    documents: Sequence[Json], document: Json, policy_object: checkpoint_policy.CheckpointPolicy
) -> tuple[str, ...]:
    """Access modes of the claim that a policy names, where one of the documents is it; else empty."""
    wanted = policy_object.spec.storage.persistent_volume_claim if policy_object.spec else None
    namespace = (document.get("metadata") or {}).get("namespace")
    for each in documents if wanted else ():
        metadata = each.get("metadata") or {}
        is_claim = each.get("kind") == "PersistentVolumeClaim" and metadata.get("name") == (
            wanted and wanted.claim_name
        )
        if is_claim and metadata.get("namespace") == namespace:
            return tuple((each.get("spec") or {}).get("accessModes") or ())
    return ()


def _pods(document: Json) -> Iterator[tuple[str, Json, identity.Job | identity.Unclear | None]]:
    """The pods in a document: the place, the pod, and its job where the document names it."""
    kind = str(document.get("kind"))
    name = str((document.get("metadata") or {}).get("name") or "")
    if kind == "Pod":
        yield f"Pod/{name}", document, None
        return
    if kind == "Job" and str(document.get("apiVersion")).startswith("batch.volcano.sh/"):
        kind = "VolcanoJob"
    for path in _TEMPLATES.get(kind, ()):
        for at, template in _at(document, path.split(".")):
            job = _job(kind, name, document) if name else None
            yield f"{kind}/{name} {at}", template, job


def _job(kind: str, name: str, document: Json) -> identity.Job | identity.Unclear:
    """The training that the pods of a template belong to."""
    if kind != "LeaderWorkerSet":
        return identity.Job(kind=kind, name=name, id=name)
    if (document.get("spec") or {}).get("replicas", 1) != 1:
        return identity.Unclear(
            why=f"each group of LeaderWorkerSet {name!r:.80} is a training of its own with the same template: only the webhook can inject them"
        )
    return identity.Job(kind=kind, name=name, id=f"{name}-0")


def _at(value: Any, path: Sequence[str], done: str = "") -> Iterator[tuple[str, Json]]:
    if not path:
        if isinstance(value, dict):
            yield done, value
        return
    entries: list[tuple[str, Any]] = []
    if path[0] != "*":
        entries = [(f"{done}.{path[0]}".lstrip("."), value.get(path[0]))] if isinstance(value, dict) else []
    elif isinstance(value, dict):
        entries = [(f"{done}.{key}", each) for key, each in value.items()]
    elif isinstance(value, list):
        entries = [(f"{done}[{index}]", each) for index, each in enumerate(value)]
    for at, entry in entries:
        yield from _at(entry, path[1:], at)


def _replace(old: Json, new: Json) -> None:
    old.clear()
    old.update(new)
