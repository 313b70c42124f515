"""
The whole of: the decision about one pod: inject it, leave it alone, or refuse it.

Called from: the webhook, and `pillion-operator inject`. A decision is a value; the reason in it feeds event, metric and log alike.
Must never: raise for the content of a pod or a policy; change its arguments.
"""

from dataclasses import dataclass
from typing import Final

from pillion.wire import policy
from pillion_operator.injection import (
    annotations,
    apply,
    doubts,
    identity,
    overrides,
    patch,
    pods,
    sidecar_spec,
    status,
    storage_spec,
    trainers,
)
from pillion_operator.injection.checkpoint_policy import CheckpointPolicy
from pillion_operator.injection.pods import Json
from pillion_operator.injection.reasons import Reason
from pillion_operator.settings import Settings

_MIRROR: Final = "kubernetes.io/config.mirror"
_OS_LABEL: Final = "kubernetes.io/os"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inject:
    """The pod gets a sidecar."""

    pod: Json
    """The pod as it shall be. Equal to what was given where all was there already."""
    patch: list[patch.Operation]
    """The patch from the given pod to `pod`. Empty: nothing is left to do."""
    status: status.Status
    warnings: tuple[str, ...] = ()
    """Warnings about settings that probably do not do what their author means."""
    reason: Reason = Reason.INJECTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """The pod starts as it is."""

    reason: Reason
    details: tuple[str, ...] = ()
    """Details of this pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deny:
    """The pod is not created; its controller tries again."""

    reason: Reason
    details: tuple[str, ...] = ()


Decision = Inject | Skip | Deny


def message(decision: Decision) -> str:
    """A decision in words: the reason's sentence, then what is particular."""
    details = decision.warnings if isinstance(decision, Inject) else decision.details
    return " ".join([decision.reason.sentence, *([f"({'; '.join(details)})"] if details else [])])


def inject(
    pod: Json,
    checkpoint_policy: CheckpointPolicy | None,
    settings: Settings,
    *,
    parsed: annotations.Parsed | None = None,
    made_by: identity.Job | identity.Unclear | None = None,
    namespace: str = "",
) -> Decision:
    """
    Decide about a pod.

    Args:
        pod: as the API server sends it.
        checkpoint_policy: the policy that its annotation names; None: there is none.
        settings: the operator's.
        parsed: the pod's annotations where the caller has parsed them; a pod may have thousands. None: they are parsed here.
        made_by: what the pod belongs to, for a template, which no controller has labelled yet. None: read from the pod.
        namespace: the pod's, which a pod that is being made may not name. Empty: the one in its metadata.
    """
    namespace = namespace or pods.namespace(pod)
    raw = pods.metadata_map(pod, "annotations")
    if _MIRROR in raw:
        return Skip(reason=Reason.MIRROR_POD)
    if not raw.get(annotations.POLICY):
        return Skip(reason=Reason.NOT_OPTED_IN)
    pod_annotations, problems = parsed or annotations.parse(raw)
    if not pod_annotations.inject:
        return Skip(reason=Reason.OPTED_OUT)
    # A pod that cannot be injected starts unchanged or is refused, depending on the policy.
    failure_policy = (checkpoint_policy.failure_policy if checkpoint_policy else None) or settings.failure_policy
    refuse = Deny if failure_policy is policy.FailurePolicy.FAIL else Skip
    if checkpoint_policy is None:
        if problems:
            return refuse(reason=Reason.BAD_ANNOTATION, details=tuple(problems))
        return refuse(reason=Reason.POLICY_MISSING, details=(f"policy {pod_annotations.policy}",))
    if checkpoint_policy.spec is None:
        return refuse(
            reason=Reason.POLICY_INVALID, details=(f"policy {checkpoint_policy.name}", *checkpoint_policy.problems)
        )
    if checkpoint_policy.spec.suspend:
        return Skip(reason=Reason.POLICY_SUSPENDED, details=(f"policy {checkpoint_policy.name}",))

    earlier = status.read(pod)
    bare = apply.without(pod, earlier)
    declared = pods.named(pods.init_containers(bare), sidecar_spec.SIDECAR)
    effective, in_annotations, in_container = overrides.apply(
        checkpoint_policy.spec, pod_annotations, bare, declared, settings
    )
    chosen, not_there = trainers.choose(bare, pod_annotations, earlier)
    belongs_to = identity.identify(bare, pod_annotations.job_id, made_by=made_by)
    unclear = [belongs_to.why] if isinstance(belongs_to, identity.Unclear) else []
    for reason, details in (
        (Reason.UNSUPPORTED_POD, [*_unsupported(bare), *_without_namespace(effective.policy, namespace)]),
        (Reason.BAD_ANNOTATION, [*problems, *in_annotations, *not_there]),
        (Reason.JOB_UNCLEAR, unclear),
        (Reason.BAD_SIDECAR_CONTAINER, [*_misplaced(bare), *in_container]),
        (Reason.RESERVED_NAME, _collisions(bare, chosen)),
    ):
        if details:
            return refuse(reason=reason, details=tuple(details))
    assert isinstance(belongs_to, identity.Job), "what is unclear was refused"

    parts = sidecar_spec.build(bare, effective, belongs_to, pod_annotations, declared, chosen, settings, namespace)
    if declared and (details := overrides.container_problems(declared, parts.sidecar)):
        return refuse(reason=Reason.BAD_SIDECAR_CONTAINER, details=tuple(details))
    done, before = apply.insert(pod, bare, parts)
    warnings = doubts.find(
        bare, done, effective.policy, pod_annotations, declared, chosen, settings, checkpoint_policy.claim_modes
    )
    what = status.Status(
        policy=pod_annotations.policy,
        policy_uid=checkpoint_policy.uid,
        policy_generation=checkpoint_policy.generation,
        job_kind=belongs_to.kind,
        job_name=belongs_to.name,
        job_id=belongs_to.id,
        image=effective.image,
        containers=chosen,
        before=before,
        warnings=tuple(warnings),
    )
    apply.mark(done, what, parts)
    return Inject(pod=done, patch=patch.diff(pod, done), status=what, warnings=what.warnings)


def _unsupported(bare: Json) -> list[str]:
    problems = [] if pods.containers(bare) else ["the pod has no container"]
    spec = pods.spec(bare)
    if "windows" in ((spec.get("os") or {}).get("name"), (spec.get("nodeSelector") or {}).get(_OS_LABEL)):
        problems.append("its operating system is Windows; Pillion needs the shared memory of Linux")
    return problems


def _without_namespace(effective: policy.Policy, namespace: str) -> list[str]:
    if namespace or not storage_spec.needs_namespace(effective.storage):
        return []
    return ["its namespace, a folder of the object store, is not known: set metadata.namespace"]


def _misplaced(bare: Json) -> list[str]:
    if pods.named(pods.containers(bare), sidecar_spec.SIDECAR) is None:
        return []
    return [f"container {sidecar_spec.SIDECAR}: declare it under initContainers, as a native sidecar"]


def _collisions(bare: Json, chosen: tuple[str, ...]) -> list[str]:
    """All reserved names and paths that the pod uses for something else."""
    collisions = [
        f"volume {each['name']}"
        for each in pods.spec(bare).get("volumes") or []
        if each.get("name") in sidecar_spec.VOLUMES
    ]
    if pods.named([*pods.init_containers(bare), *pods.containers(bare)], sidecar_spec.CLIENT):
        collisions.append(f"container {sidecar_spec.CLIENT}")
    for container in pods.containers(bare):
        if container.get("name") in chosen:
            where = f"container {container['name']}"
            set_already = {each.get("name") for each in container.get("env") or []}
            collisions += [f"{where}: variable {name}" for name in sidecar_spec.TRAINER_ENV if name in set_already]
            mounted = {str(each.get("mountPath")).rstrip("/") for each in container.get("volumeMounts") or []}
            collisions += [f"{where}: mount {path}" for path in sidecar_spec.TRAINER_MOUNTS if path in mounted]
    # A pod whose status could be read has lost the label by now, with the parts.
    if collisions and annotations.INJECTED in pods.metadata_map(bare, "labels"):
        collisions.append(f"the pod looks injected, but its annotation {annotations.STATUS} is missing or unreadable")
    return collisions
