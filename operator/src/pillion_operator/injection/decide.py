"""
The whole of: the decision about one pod: inject it, leave it alone, or refuse it.

Called from: the webhook, and `pillion-operator inject`. A decision is a value; the reason in it feeds event, metric and log alike.
Must never: raise for anything that a pod or a policy says; change what it is given.
"""

from dataclasses import dataclass
from typing import Final

from pillion.wire import policy
from pillion_operator.injection import annotations, apply, identity, overrides, patch, pods, sidecar_spec, status
from pillion_operator.injection.checkpoint_policy import CheckpointPolicy
from pillion_operator.injection.pods import Json
from pillion_operator.injection.reasons import Reason
from pillion_operator.settings import Settings

_MIRROR: Final = "kubernetes.io/config.mirror"
_DEFAULT_CONTAINER: Final = "kubectl.kubernetes.io/default-container"
_ACCELERATORS: Final = ("nvidia.com/gpu", "amd.com/gpu", "google.com/tpu")
_NOT_TRAINERS: Final = ("istio-proxy", "linkerd-proxy")
"""Sidecars of another make that may stand first among the regular containers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inject:
    """The pod gets a sidecar."""

    pod: Json
    """The pod as it shall be. Equal to what was given where all was there already."""
    patch: list[patch.Operation]
    """What makes `pod` of the pod that was given. Empty: nothing is left to do."""
    status: status.Status
    reason: Reason = Reason.INJECTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """The pod starts as it is."""

    reason: Reason
    details: tuple[str, ...] = ()
    """What is particular to this pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deny:
    """The pod is not created; its controller tries again."""

    reason: Reason
    details: tuple[str, ...] = ()


Decision = Inject | Skip | Deny


def message(decision: Decision) -> str:
    """A decision in words: the reason's sentence, then what is particular."""
    details = () if isinstance(decision, Inject) else decision.details
    return " ".join([decision.reason.sentence, *([f"({'; '.join(details)})"] if details else [])])


def inject(
    pod: Json, found: CheckpointPolicy | None, settings: Settings, *, job: identity.Job | None = None
) -> Decision:
    """
    Decide about a pod.

    Args:
        pod: as the API server sends it.
        found: the policy that its annotation names; None: there is none.
        settings: the operator's.
        job: what the pod belongs to, for a template, which no controller has labelled yet. None: the pod tells.
    """
    wishes, problems = annotations.parse(pods.metadata_map(pod, "annotations"))
    if _MIRROR in pods.metadata_map(pod, "annotations"):
        return Skip(reason=Reason.MIRROR_POD)
    if not pods.metadata_map(pod, "annotations").get(annotations.POLICY):
        return Skip(reason=Reason.NOT_OPTED_IN)
    if not wishes.inject:
        return Skip(reason=Reason.OPTED_OUT)
    # Who cannot be injected starts untouched, or not at all, as the policy says.
    failure_policy = (found.failure_policy if found else None) or settings.failure_policy
    refuse = Deny if failure_policy is policy.FailurePolicy.FAIL else Skip
    if found is None:
        if problems:
            return refuse(reason=Reason.BAD_ANNOTATION, details=tuple(problems))
        return refuse(reason=Reason.POLICY_MISSING, details=(f"policy {wishes.policy}",))
    if found.spec is None:
        return refuse(reason=Reason.POLICY_INVALID, details=(f"policy {found.name}", *found.problems))
    if found.spec.suspend:
        return Skip(reason=Reason.POLICY_SUSPENDED, details=(f"policy {found.name}",))

    bare = apply.remove(pod)
    declared = pods.named(pods.init_containers(bare), sidecar_spec.SIDECAR)
    effective, in_annotations, in_container = overrides.apply(found.spec, wishes, declared, settings)
    trainers, not_there = _trainers(bare, wishes, status.read(pod))
    belongs_to = job or identity.identify(bare)
    job_id = wishes.job_id or (belongs_to.id if belongs_to else "")
    unsupported = _unsupported(bare)
    if not job_id:
        unsupported.append(f"it has no name and no owner: say which job it is with {annotations.JOB_ID}")
    for reason, details in (
        (Reason.UNSUPPORTED_POD, unsupported),
        (Reason.BAD_ANNOTATION, [*problems, *in_annotations, *not_there]),
        (Reason.BAD_SIDECAR_CONTAINER, [*_misplaced(bare), *in_container]),
        (Reason.RESERVED_NAME, _collisions(bare, trainers)),
    ):
        if details:
            return refuse(reason=reason, details=tuple(details))

    whose = identity.Job(
        kind=belongs_to.kind if belongs_to else "Pod", name=belongs_to.name if belongs_to else job_id, id=job_id
    )
    parts = sidecar_spec.build(bare, effective, whose, wishes, declared, trainers, settings)
    done, before = apply.insert(pod, bare, parts)
    what = status.Status(
        policy=wishes.policy,
        policy_uid=found.uid,
        policy_generation=found.generation,
        job_kind=whose.kind,
        job_name=whose.name,
        job_id=whose.id,
        image=effective.image,
        containers=trainers,
        before=before,
    )
    apply.mark(done, what)
    return Inject(pod=done, patch=patch.diff(pod, done), status=what)


def _trainers(
    bare: Json, wishes: annotations.Wishes, earlier: status.Status | None
) -> tuple[tuple[str, ...], list[str]]:
    """The trainer containers: the annotation's, else those with an accelerator, else the main one; and what is wrong."""
    names = [str(each.get("name")) for each in pods.containers(bare)]
    if wishes.containers:
        missing = [name for name in wishes.containers if name not in names]
        there = f"allowed: containers of the pod, which are {', '.join(names)}"
        return wishes.containers, [f"{annotations.CONTAINERS}: got {name!r}; {there}" for name in missing]
    # A webhook in between may have put another container first: what was chosen stays chosen.
    if earlier and set(earlier.containers) <= set(names):
        return earlier.containers, []
    if training := tuple(str(each["name"]) for each in pods.containers(bare) if _has_accelerator(each)):
        return training, []
    main = pods.metadata_map(bare, "annotations").get(_DEFAULT_CONTAINER, "")
    candidates = [name for name in names if name not in _NOT_TRAINERS] or names
    return ((main,) if main in candidates else tuple(candidates[:1])), []


def _has_accelerator(container: Json) -> bool:
    resources = container.get("resources") or {}
    asked = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    return any(str(asked.get(name, "0")) != "0" for name in _ACCELERATORS)


def _unsupported(bare: Json) -> list[str]:
    problems = [] if pods.containers(bare) else ["it has no container"]
    if (pods.spec(bare).get("os") or {}).get("name") == "windows":
        problems.append("its operating system is windows; shared memory of Linux is needed")
    return problems


def _misplaced(bare: Json) -> list[str]:
    if pods.named(pods.containers(bare), sidecar_spec.SIDECAR) is None:
        return []
    return [f"container {sidecar_spec.SIDECAR}: declare it under initContainers, where a native sidecar is"]


def _collisions(bare: Json, trainers: tuple[str, ...]) -> list[str]:
    """Names and paths of ours that the pod uses for something else, all of them."""
    found = [
        f"volume {each['name']}"
        for each in pods.spec(bare).get("volumes") or []
        if each.get("name") in sidecar_spec.VOLUMES
    ]
    if pods.named([*pods.init_containers(bare), *pods.containers(bare)], sidecar_spec.CLIENT):
        found.append(f"container {sidecar_spec.CLIENT}")
    for container in pods.containers(bare):
        if container.get("name") in trainers:
            where = f"container {container['name']}"
            set_already = {each.get("name") for each in container.get("env") or []}
            found += [f"{where}: variable {name}" for name in sidecar_spec.TRAINER_ENV if name in set_already]
            mounted = {str(each.get("mountPath")).rstrip("/") for each in container.get("volumeMounts") or []}
            found += [f"{where}: mount {path}" for path in sidecar_spec.TRAINER_MOUNTS if path in mounted]
    if found and status.read(bare) is None and annotations.INJECTED in pods.metadata_map(bare, "labels"):
        found.append(f"the pod looks injected, but its annotation {annotations.STATUS} is missing or unreadable")
    return found
